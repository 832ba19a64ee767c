// gemm_decode.cuh - the tiling for few tokens an expert, where time is the weights' bytes.
//
// A block owns 32 weight rows (16 gate + 16 up channels, or 32 output channels) of one expert; its four warps split the columns and
// add their int32 sums through shared memory, which is exact, so the split does not show in the result. Weights go
// straight from global memory to registers: a warp reads each 512-byte tile with one 16-byte load a lane, once, and
// keeps four tiles in flight. Activations need no shared memory either: a B fragment is used by one warp only.
// An expert with more than 8 * kTokenTiles tokens makes its blocks walk the weights again.
#pragma once

#include "ecmfq/gemm.cuh"

namespace ecmfq {

constexpr int kDecodeWarps = 4;  // as many as a lane has accumulators in a half tile: warp q finishes accumulator q
constexpr int kDecodeThreads = kDecodeWarps * 32;

template <int kTokenTiles>
constexpr int decode_shared_bytes() {
  return kDecodeWarps * kTokenTiles * 8 * 32 * 4;
}

// The tiles that a warp has in flight.
template <int kTokenTiles>
struct DecodeBatch {
  static constexpr int kTiles = kTokenTiles == 1 ? 4 : 2;  // divides the four tiles of a group
  uint4 weights[kTiles];
  uint2 tokens[kTiles][kTokenTiles];
};

template <Gemm kGemm, WeightLayout kLayout>
ECMFQ_DEVICE uint4 load_weights(const GemmArguments& a, const int8_t* of_expert, int row_tile, int col_tile, int lane) {
  if (kLayout == WeightLayout::kMmaS8)
    return load_stream_16(of_expert + packed_tile_offset(row_tile, col_tile, a.cols / kTileCols) + lane * kLaneBytes);
  uint32_t word[4];
#pragma unroll
  for (int w = 0; w < 4; ++w)
    word[w] = load_4(of_expert + row_major_word_offset<kGemm>(row_tile, col_tile, a.cols, a.intermediate_size, lane, w));
  return uint4{word[0], word[1], word[2], word[3]};
}

// Tiles at or past `end` load as zeros, as do tokens past the expert's last.
template <Gemm kGemm, WeightLayout kLayout, int kTokenTiles>
ECMFQ_DEVICE void load_batch(DecodeBatch<kTokenTiles>& batch, const GemmArguments& a, const int8_t* of_expert, int row_tile, int col_tile,
                             int end, const int8_t* const (&token)[kTokenTiles], int lane) {
#pragma unroll
  for (int j = 0; j < DecodeBatch<kTokenTiles>::kTiles; ++j) {
    const int tile = col_tile + j;
    const bool inside = tile < end;
    batch.weights[j] = uint4{0, 0, 0, 0};
    if (inside) batch.weights[j] = load_weights<kGemm, kLayout>(a, of_expert, row_tile, tile, lane);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      batch.tokens[j][t] = uint2{0, 0};
      if (inside && token[t] != nullptr) batch.tokens[j][t] = load_8(token[t] + tile * kTileCols);
    }
  }
}

// Grid: (row tiles, sorted_slots). With fewer pairs than experts y is a row, and the first row of each expert works for
// all of that expert's; otherwise y is an expert. So few idle blocks start, and no list of the experts in use is needed.
template <Gemm kGemm, bool kGrouped, WeightLayout kLayout, int kTokenTiles>
__global__ void __launch_bounds__(kDecodeThreads, kTokenTiles == 1 ? 3 : 2) gemm_decode_kernel(const GemmArguments a) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const int lane_row = lane >> 2, quad = lane & 3;
  const int row_tile = a.first_row_tile + static_cast<int>(blockIdx.x);
  int expert = static_cast<int>(blockIdx.y);
  if (a.sorted_slots != a.num_experts) {
    const int row = expert;
    if (row >= a.expert_offsets[a.num_experts]) return;
    expert = a.topk_ids[a.row_pair[row]];
    if (row != a.expert_offsets[expert]) return;
  }
  const int rows_begin = a.expert_offsets[expert], rows_end = a.expert_offsets[expert + 1];
  if (rows_begin == rows_end) return;

  const int8_t* of_expert = a.qweight + static_cast<int64_t>(expert) * a.weight_rows * (a.cols / 2);
  constexpr int kUnit = kGrouped ? kGroupSize / kTileCols : 1;  // a group is never split between warps
  const int units = a.cols / kTileCols / kUnit;
  const int begin = units * warp / kDecodeWarps * kUnit, end = units * (warp + 1) / kDecodeWarps * kUnit;
  int32_t* partial = reinterpret_cast<int32_t*>(shared_memory());  // [warp][token tile][half * 4 + q][lane]

  for (int row_0 = rows_begin; row_0 < rows_end; row_0 += 8 * kTokenTiles) {
    const int token_tiles = (rows_end - row_0 + 7) / 8;  // those at or past kTokenTiles belong to the next turn
    const int8_t* token[kTokenTiles];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int row = row_0 + t * 8 + lane_row;
      token[t] = row < rows_end ? a.act_q + static_cast<int64_t>(source_row<kGemm>(a, row)) * a.cols + word_col(lane) : nullptr;
    }
    int32_t acc[kTokenTiles][2][4] = {};
    int32_t total[kTokenTiles][2][4] = {};  // grouped only
    using Batch = DecodeBatch<kTokenTiles>;
    Batch next;
    load_batch<kGemm, kLayout>(next, a, of_expert, row_tile, begin, end, token, lane);
    for (int tile = begin; tile < end; tile += Batch::kTiles) {
      const Batch batch = next;
      load_batch<kGemm, kLayout>(next, a, of_expert, row_tile, tile + Batch::kTiles, end, token, lane);
#pragma unroll
      for (int j = 0; j < Batch::kTiles; ++j) {
        const WeightFragments w = unpack(batch.weights[j]);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          if (t < token_tiles) {  // the same in the whole block
            mma_m16n8k32_s8(acc[t][0], w.half[0], batch.tokens[j][t].x, batch.tokens[j][t].y);
            mma_m16n8k32_s8(acc[t][1], w.half[1], batch.tokens[j][t].x, batch.tokens[j][t].y);
          }
        }
      }
      if (kGrouped && (tile + Batch::kTiles) % kUnit == 0) {
        const GroupMultipliers m = load_multipliers<kGemm>(a, expert, row_tile, tile / kUnit, lane);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) fold_group(total[t], acc[t], m);
      }
    }

#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      if (t < token_tiles) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int32_t sum = kGrouped ? total[t][i >> 2][i & 3] : acc[t][i >> 2][i & 3] >> kNibbleShift;
          partial[((warp * kTokenTiles + t) * 8 + i) * 32 + lane] = sum;
        }
      }
    }
    block_barrier();
    const int q = warp;
    const ChannelPair channels = load_channels<kGemm>(a, expert, row_tile, lane_row + 8 * (q >> 1));
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int row = row_0 + t * 8 + 2 * quad + (q & 1);
      if (row < rows_end) {
        int32_t first = 0, second = 0;
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) {
          first += partial[((w * kTokenTiles + t) * 8 + q) * 32 + lane];
          second += partial[((w * kTokenTiles + t) * 8 + 4 + q) * 32 + lane];
        }
        const float act_scale = a.act_scale[source_row<kGemm>(a, row)];
        float* out_row = a.out + static_cast<int64_t>(target_row<kGemm>(a, row)) * a.out_stride;
        finish<kGemm>(channels, out_row, act_scale, first, second);
      }
    }
    block_barrier();
  }
}

}  // namespace ecmfq
