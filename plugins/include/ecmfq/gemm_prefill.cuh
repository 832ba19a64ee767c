// gemm_prefill.cuh - the tiling for many tokens an expert, where time is int8 multiply-adds and on-chip traffic.
//
// A persistent block walks (expert, tile) pairs. A tile is 256 weight rows x 64 tokens: with 4-bit weights that is 8 KB and 4 KB for
// 64 columns, the L2 traffic of a 128 x 128 tile, and 64 tokens waste less when a MoE spreads its tokens thin.
// Eight warps take 32 weight rows each and all 64 tokens: weights are unpacked once, no warp repeats another's. Three stages of
// cp.async stay below 48 KB of shared memory, so no opt-in is needed and two blocks fit on every GPU from SM80 on.
// Weights of both layouts are brought to the same place in shared memory; only the copy differs.
#pragma once

#include "ecmfq/gemm.cuh"

namespace ecmfq {

constexpr int kPrefillWarps = 8;
constexpr int kPrefillThreads = kPrefillWarps * 32;
constexpr int kPrefillTokens = 64;
constexpr int kPrefillTokenTiles = kPrefillTokens / 8;
constexpr int kPrefillStages = 3;
constexpr int kStageTiles = 2;  // column tiles: 64 columns
constexpr int kStageCols = kStageTiles * kTileCols;
constexpr int kStageWeightBytes = kPrefillWarps * kStageTiles * kTileBytes;
constexpr int kStageTokenBytes = kPrefillTokens * kStageCols;
constexpr int kStageBytes = kStageWeightBytes + kStageTokenBytes;
constexpr int kMaxExperts = 1024;

// Stages, then the tile's target rows and scales, then the first tile of each expert.
inline int prefill_shared_bytes(int num_experts) {
  return kPrefillStages * kStageBytes + kPrefillTokens * 8 + (num_experts + 1) * 4;
}

// first_tile[e] = tiles of all experts before e; the block fills it from the expert offsets (warp 0 alone; barrier by the caller).
ECMFQ_DEVICE void count_tiles(const GemmArguments& a, int channel_tiles, int32_t* first_tile) {
  if (threadIdx.x >= 32) return;
  const int lane = static_cast<int>(threadIdx.x);
  int before = 0;
  for (int base = 0; base < a.num_experts; base += 32) {
    const int e = base + lane;
    int tiles = 0;
    if (e < a.num_experts) {
      const int rows = a.expert_offsets[e + 1] - a.expert_offsets[e];
      tiles = (rows + kPrefillTokens - 1) / kPrefillTokens * channel_tiles;
    }
    // Inclusive scan by butterflies: at each step a lane in the upper half of a block adds the lower half's sum.
    int inclusive = tiles, block_sum = tiles;
    for (int mask = 1; mask < 32; mask <<= 1) {
      const int other = static_cast<int>(warp_shuffle_xor(static_cast<uint32_t>(block_sum), mask));
      if (lane & mask) inclusive += other;
      block_sum += other;
    }
    if (e < a.num_experts) first_tile[e + 1] = before + inclusive;
    before += block_sum;
  }
  if (lane == 0) first_tile[0] = 0;
}

template <Gemm kGemm>
ECMFQ_DEVICE void copy_weights(const GemmArguments& a, WeightLayout layout, const int8_t* of_expert, int row_tile, int stage_index,
                               unsigned char* shared, int lane) {
  const int col_tiles = a.cols / kTileCols;
#pragma unroll
  for (int j = 0; j < kStageTiles; ++j) {
    const int col_tile = stage_index * kStageTiles + j;
    const bool valid = col_tile < col_tiles;  // an odd number of column tiles: zeros in the last half stage
    unsigned char* to = shared + j * kTileBytes + lane * kLaneBytes;
    if (layout == WeightLayout::kMmaS8) {
      const int64_t from = packed_tile_offset(row_tile, valid ? col_tile : 0, col_tiles) + lane * kLaneBytes;
      cp_async_16(to, of_expert + from, valid);
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t from = row_major_word_offset<kGemm>(row_tile, valid ? col_tile : 0, a.cols, a.intermediate_size, lane, w);
        cp_async_4(to + 4 * w, of_expert + from, valid);
      }
    }
  }
}

// One stage for a warp: 32 weight rows x 8 * kTiles tokens x 64 columns.
template <int kTiles>
ECMFQ_DEVICE void multiply_stage(int32_t (&acc)[kPrefillTokenTiles][2][4], const unsigned char* weights, const unsigned char* tokens,
                                 int lane) {
  const int lane_row = lane >> 2, quad = lane & 3;
#pragma unroll
  for (int j = 0; j < kStageTiles; ++j) {
    const WeightFragments w = unpack(*reinterpret_cast<const uint4*>(weights + j * kTileBytes + lane * kLaneBytes));
    const unsigned char* piece = tokens + lane_row * kStageCols + swizzled_piece(lane_row, j) * kTileCols + quad * 8;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint2 b = *reinterpret_cast<const uint2*>(piece + t * 8 * kStageCols);
      mma_m16n8k32_s8(acc[t][0], w.half[0], b.x, b.y);
      mma_m16n8k32_s8(acc[t][1], w.half[1], b.x, b.y);
    }
  }
}

template <Gemm kGemm, bool kGrouped>
__global__ void __launch_bounds__(kPrefillThreads, kGrouped ? 1 : 2)
    gemm_prefill_kernel(const GemmArguments a, const WeightLayout layout) {
  unsigned char* const stages = shared_memory();
  int32_t* const targets = reinterpret_cast<int32_t*>(stages + kPrefillStages * kStageBytes);
  float* const act_scales = reinterpret_cast<float*>(targets + kPrefillTokens);
  int32_t* const first_tile = reinterpret_cast<int32_t*>(act_scales + kPrefillTokens);

  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31, warp = tid >> 5, lane_row = lane >> 2, quad = lane & 3;
  const int channel_tiles = (a.row_tiles + kPrefillWarps - 1) / kPrefillWarps;
  const int stage_count = (a.cols + kStageCols - 1) / kStageCols;
  count_tiles(a, channel_tiles, first_tile);
  block_barrier();

  // A thread copies one 16-byte chunk of one token in every stage.
  const int copy_row = tid >> 2, copy_chunk = tid & 3;
  const int copy_to = copy_row * kStageCols + swizzled_piece(copy_row, copy_chunk >> 1) * kTileCols + (copy_chunk & 1) * 16;

  int expert = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < first_tile[a.num_experts]; tile += static_cast<int>(gridDim.x)) {
    while (tile >= first_tile[expert + 1]) ++expert;
    const int rows_end = a.expert_offsets[expert + 1], rows_begin = a.expert_offsets[expert];
    const int token_blocks = (rows_end - rows_begin + kPrefillTokens - 1) / kPrefillTokens;
    // Neighbouring blocks take the same weights for different tokens: weights leave L2 once.
    const int within = tile - first_tile[expert];
    const int row_0 = rows_begin + within % token_blocks * kPrefillTokens;
    const int rows = rows_end - row_0 < kPrefillTokens ? rows_end - row_0 : kPrefillTokens;
    const int tile_of_warp = within / token_blocks * kPrefillWarps + warp;
    const bool working = tile_of_warp < a.row_tiles;  // the same in the whole warp
    const int row_tile = a.first_row_tile + (working ? tile_of_warp : 0);
    const int8_t* of_expert = a.qweight + static_cast<int64_t>(expert) * a.weight_rows * (a.cols / 2);
    const bool copying = copy_row < rows;
    const int source = copying ? source_row<kGemm>(a, row_0 + copy_row) : 0;
    const int8_t* token = a.act_q + static_cast<int64_t>(source) * a.cols;

    if (tid < rows) {
      targets[tid] = target_row<kGemm>(a, row_0 + tid);
      act_scales[tid] = a.act_scale[source_row<kGemm>(a, row_0 + tid)];
    }
    auto copy_stage = [&](int index) {
      unsigned char* to = stages + index % kPrefillStages * kStageBytes;
      if (working)
        copy_weights<kGemm>(a, layout, of_expert, row_tile, index, to + warp * kStageTiles * kTileBytes, lane);
      const int col = index * kStageCols + copy_chunk * 16;
      const bool valid = copying && col < a.cols;
      cp_async_16(to + kStageWeightBytes + copy_to, token + (valid ? col : 0), valid);
    };
    for (int s = 0; s < kPrefillStages - 1; ++s) {
      if (s < stage_count) copy_stage(s);
      cp_async_commit();
    }
    int32_t acc[kPrefillTokenTiles][2][4] = {};
    int32_t total[kPrefillTokenTiles][2][4] = {};  // grouped only
    for (int s = 0; s < stage_count; ++s) {
      cp_async_wait<kPrefillStages - 2>();
      block_barrier();  // stage s has arrived for every thread, and nobody reads stage s - 1 any more
      if (s + kPrefillStages - 1 < stage_count) copy_stage(s + kPrefillStages - 1);
      cp_async_commit();
      if (working) {
        const unsigned char* from = stages + s % kPrefillStages * kStageBytes;
        const unsigned char* weights = from + warp * kStageTiles * kTileBytes;
        if (rows <= kPrefillTokens / 2) {
          multiply_stage<kPrefillTokenTiles / 2>(acc, weights, from + kStageWeightBytes, lane);
        } else {
          multiply_stage<kPrefillTokenTiles>(acc, weights, from + kStageWeightBytes, lane);
        }
        if (kGrouped && s % (kGroupSize / kStageCols) == kGroupSize / kStageCols - 1) {
          const GroupMultipliers m = load_multipliers<kGemm>(a, expert, row_tile, s / (kGroupSize / kStageCols), lane);
#pragma unroll
          for (int t = 0; t < kPrefillTokenTiles; ++t) fold_group(total[t], acc[t], m);
        }
      }
    }
    if (working) {
      const ChannelPair channels[2] = {load_channels<kGemm>(a, expert, row_tile, lane_row),
                                       load_channels<kGemm>(a, expert, row_tile, lane_row + 8)};
#pragma unroll
      for (int t = 0; t < kPrefillTokenTiles; ++t) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int row = t * 8 + 2 * quad + column;
          if (row < rows) {
            float* out_row = a.out + static_cast<int64_t>(targets[row]) * a.out_stride;
            const float act_scale = act_scales[row];
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
              const int q = 2 * upper + column;
              const int32_t first = kGrouped ? total[t][0][q] : acc[t][0][q] >> kNibbleShift;
              const int32_t second = kGrouped ? total[t][1][q] : acc[t][1][q] >> kNibbleShift;
              finish<kGemm>(channels[upper], out_row, act_scale, first, second);
            }
          }
        }
      }
    }
    cp_async_wait<0>();
    block_barrier();  // the next tile overwrites the stages, targets and scales
  }
}

}  // namespace ecmfq
