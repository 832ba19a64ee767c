// gemm.cuh - what the two GEMM tilings share: arguments, weight fragments, group folding, and the fused ends.
#pragma once

#include "ecmfq/numerics.cuh"
#include "ecmfq/problem.cuh"

namespace ecmfq {

// One of the layer's two grouped GEMMs, as its kernels need it. Weights are the 16-row operand, tokens the 8-column one.
struct GemmArguments {
  const int8_t* qweight;          // one expert after the other
  const float* channel_scale;     // [E, weight rows], canonical order
  const int8_t* multiplier;       // [E, weight rows, cols / 128], canonical order; null when not grouped
  const int8_t* act_q;            // kGateUp: by token; kDown: by row
  const float* act_scale;         // likewise
  const int32_t* expert_offsets;  // [E + 1]
  const int32_t* row_pair;        // [pairs]
  const int32_t* topk_ids;        // [pairs]
  float* out;  // kGateUp: [rows, intermediate_size]; kDown: [pairs, out_stride], column 0 = weight row first_row_tile * 32
  int32_t num_experts;
  int32_t top_k;
  int32_t cols;               // the sum's length: H for kGateUp, I for kDown
  int32_t weight_rows;        // 2I or H
  int32_t intermediate_size;  // I
  int32_t first_row_tile;     // this launch does 32-row tiles [first_row_tile, first_row_tile + row_tiles)
  int32_t row_tiles;
  int32_t out_stride;
  int32_t sorted_slots;  // decode: blocks along y
};

// Where row `row` reads its activations and where its results go.
template <Gemm kGemm>
ECMFQ_DEVICE int source_row(const GemmArguments& a, int row) {
  return kGemm == Gemm::kGateUp ? a.row_pair[row] / a.top_k : row;
}
template <Gemm kGemm>
ECMFQ_DEVICE int target_row(const GemmArguments& a, int row) {
  return kGemm == Gemm::kGateUp ? row : a.row_pair[row];
}

// A lane's 16 weight bytes of a tile -> the fragments of two 16 x 32 operands.
struct WeightFragments {
  uint32_t half[2][4];
};
ECMFQ_DEVICE WeightFragments unpack(const uint4& words) {
  WeightFragments f;
  f.half[0][0] = even_columns(words.x);
  f.half[0][1] = even_columns(words.y);
  f.half[0][2] = odd_columns(words.x);
  f.half[0][3] = odd_columns(words.y);
  f.half[1][0] = even_columns(words.z);
  f.half[1][1] = even_columns(words.w);
  f.half[1][2] = odd_columns(words.z);
  f.half[1][3] = odd_columns(words.w);
  return f;
}

// The multipliers of one group of 128 columns for the four tile rows (lane / 4 + 0, 8, 16, 24) that a lane accumulates.
struct GroupMultipliers {
  int32_t row[4];
};
template <Gemm kGemm>
ECMFQ_DEVICE GroupMultipliers load_multipliers(const GemmArguments& a, int expert, int row_tile, int group, int lane) {
  GroupMultipliers m;
  const int groups = a.cols / kGroupSize;
  const int8_t* of_expert = a.multiplier + static_cast<int64_t>(expert) * a.weight_rows * groups;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int row = canonical_row<kGemm>(row_tile, word_row(lane, w), a.intermediate_size);
    m.row[w] = of_expert[static_cast<int64_t>(row) * groups + group];
  }
  return m;
}

// total += multiplier * accumulator / 16, and the accumulator starts again. d[0], d[1] are rows lane / 4, d[2], d[3] rows + 8.
ECMFQ_DEVICE void fold_group(int32_t (&total)[2][4], int32_t (&acc)[2][4], const GroupMultipliers& m) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      total[h][q] += m.row[2 * h + (q >> 1)] * (acc[h][q] >> kNibbleShift);
      acc[h][q] = 0;
    }
  }
}

// The two channels that meet in a lane: tile rows `channel` and `channel + 16`, channel in 0..15. Loaded once a tile, since the
// compiler cannot know that stores to `out` leave the scales alone.
struct ChannelPair {
  int32_t column[2];  // in `out`; for kGateUp the first alone
  float scale[2];
};
template <Gemm kGemm>
ECMFQ_DEVICE ChannelPair load_channels(const GemmArguments& a, int expert, int row_tile, int channel) {
  ChannelPair c;
  const float* scale = a.channel_scale + static_cast<int64_t>(expert) * a.weight_rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = canonical_row<kGemm>(row_tile, channel + 16 * i, a.intermediate_size);
    c.column[i] = row - a.first_row_tile * kTileRows;  // kGateUp starts at tile 0
    c.scale[i] = scale[row];
  }
  return c;
}

// The fused end for one exact sum of each of the two channels. `out_row`: a.out + target_row * out_stride.
template <Gemm kGemm>
ECMFQ_DEVICE void finish(const ChannelPair& c, float* out_row, float act_scale, int32_t first, int32_t second) {
  const float x = dequantize(first, act_scale, c.scale[0]);
  const float y = dequantize(second, act_scale, c.scale[1]);
  if (kGemm == Gemm::kGateUp) {
    out_row[c.column[0]] = mul_rn(silu(x), y);
  } else {
    out_row[c.column[0]] = x;
    out_row[c.column[1]] = y;
  }
}

}  // namespace ecmfq
