// rows.cuh - everything that is not a GEMM: quantizing rows, sorting (token, slot) pairs by expert, and the ordered sum.
#pragma once

#include "ecmfq/numerics.cuh"
#include "ecmfq/problem.cuh"

namespace ecmfq {

constexpr int kPrepareThreads = 256;
constexpr int kRowThreads = 128;
constexpr int kSumThreads = 128;
constexpr int kSumColumns = 4;  // columns that a thread sums

// Eight consecutive values of a row as floats, in 16-byte loads.
ECMFQ_DEVICE void load_8_floats(const float* row, int col, float (&v)[8]) {
  const uint4* source = reinterpret_cast<const uint4*>(row + col);
  const uint4 a = source[0], b = source[1];
  const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = bits_to_float(words[i]);
}
template <class T>  // Float16 or BFloat16
ECMFQ_DEVICE void load_8_floats(const T* row, int col, float (&v)[8]) {
  const uint4 a = *reinterpret_cast<const uint4*>(row + col);
  const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = to_float(T{static_cast<uint16_t>(words[i] & 0xffffu)});
    v[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

// The block quantizes one row of `cols` (a multiple of 8) values; the integers go out in activation order. Shared memory: 32 words.
template <class T>
ECMFQ_DEVICE void quantize_row(const T* row, int cols, int8_t* q, float* scale_out, uint32_t* shared) {
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  uint32_t largest = 0;
  for (int col = tid * 8; col < cols; col += threads * 8) {
    float v[8];
    load_8_floats(row, col, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = magnitude_bits(v[i]);
      largest = bits > largest ? bits : largest;
    }
  }
  for (int mask = 16; mask > 0; mask >>= 1) {
    const uint32_t other = warp_shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  if ((tid & 31) == 0) shared[tid >> 5] = largest;
  block_barrier();
  for (int w = 0; w < threads >> 5; ++w) largest = shared[w] > largest ? shared[w] : largest;

  const float scale = row_scale(largest);
  const bool finite = largest < kInfinityBits;
  if (tid == 0) *scale_out = scale;
  for (int col = tid * 8; col < cols; col += threads * 8) {  // the second read comes from L1
    float v[8];
    load_8_floats(row, col, v);
    uint32_t half[2] = {0, 0};  // even columns, odd columns
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t byte = static_cast<uint32_t>(quantize_value(v[i], scale, finite)) & 0xffu;
      half[i & 1] |= byte << (8 * (i >> 1));
    }
    *reinterpret_cast<uint2*>(q + col) = uint2{half[0], half[1]};
  }
}

// Adds `value` over the warp.
ECMFQ_DEVICE int warp_sum(int value) {
  for (int mask = 16; mask > 0; mask >>= 1)
    value += static_cast<int>(warp_shuffle_xor(static_cast<uint32_t>(value), mask));
  return value;
}

// The block finds one expert's rows: a stable counting sort without a global pass. It counts the pairs of smaller experts (where
// its rows start) and its own, then writes its own in ascending pair order. Every block reads all ids, num_experts * num_pairs
// reads from L2 in all, and in return there is one launch, no atomic, and the order is a function of the input alone.
// Each warp takes a contiguous run of pairs. Shared memory: 2 words a warp.
ECMFQ_DEVICE void route_expert(const int32_t* ids, int pairs, int num_experts, int expert, int32_t* expert_offsets,
                               int32_t* row_pair, uint32_t* shared) {
  constexpr int kWarps = kPrepareThreads / 32;
  constexpr int kStep = 128;  // ids a warp takes at once: four loads in flight
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const int steps = (pairs + kStep - 1) / kStep;
  const int first = (steps * warp / kWarps) * kStep;
  const int last_unclipped = (steps * (warp + 1) / kWarps) * kStep;
  const int last = last_unclipped < pairs ? last_unclipped : pairs;

  int below = 0, mine = 0;
  for (int base = first; base < last; base += kStep) {
    int id[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int p = base + j * 32 + lane;
      id[j] = p < last ? ids[p] : -1;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      below += id[j] >= 0 && id[j] < expert;
      mine += id[j] == expert;
    }
  }
  below = warp_sum(below);
  mine = warp_sum(mine);
  if (lane == 0) {
    shared[warp] = static_cast<uint32_t>(below);
    shared[kWarps + warp] = static_cast<uint32_t>(mine);
  }
  block_barrier();
  int start = 0, total = 0, row = 0;
  for (int w = 0; w < kWarps; ++w) {
    start += static_cast<int>(shared[w]);
    if (w < warp) row += static_cast<int>(shared[kWarps + w]);
    total += static_cast<int>(shared[kWarps + w]);
  }
  row += start;
  if (threadIdx.x == 0) {
    expert_offsets[expert] = start;
    if (expert == num_experts - 1) expert_offsets[num_experts] = start + total;
  }
  if (total == 0) return;
  for (int base = first; base < last; base += kStep) {
    int id[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int p = base + j * 32 + lane;
      id[j] = p < last ? ids[p] : -1;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t votes = warp_ballot(id[j] == expert);
      if (id[j] == expert) row_pair[row + popcount(votes & ((1u << lane) - 1u))] = base + j * 32 + lane;
      row += popcount(votes);
    }
  }
}

// One launch for the work that depends on the inputs alone. Blocks 0..num_tokens-1 quantize a token each, the others route
// an expert each.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const T* hidden_states, const int32_t* topk_ids, int num_tokens, int hidden_size, int num_pairs, int num_experts,
                   int8_t* act_q, float* act_scale, int32_t* expert_offsets, int32_t* row_pair) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int block = static_cast<int>(blockIdx.x);
  if (block < num_tokens) {
    const int64_t at = static_cast<int64_t>(block) * hidden_size;
    quantize_row(hidden_states + at, hidden_size, act_q + at, act_scale + block, shared);
  } else {
    route_expert(topk_ids, num_pairs, num_experts, block - num_tokens, expert_offsets, row_pair, shared);
  }
}

// One block a row of silu(gate) * up. The grid covers every pair; rows past the last one that an expert owns are skipped.
template <class T>  // float; a template like its neighbours, so that the header may be included twice
__global__ void __launch_bounds__(kRowThreads)
    quantize_intermediate_kernel(const T* inter, int intermediate_size, const int32_t* num_rows, int8_t* inter_q,
                                 float* inter_scale) {
  const int row = static_cast<int>(blockIdx.x);
  if (row >= *num_rows) return;
  const int64_t at = static_cast<int64_t>(row) * intermediate_size;
  quantize_row(inter + at, intermediate_size, inter_q + at, inter_scale + row, reinterpret_cast<uint32_t*>(shared_memory()));
}

// output[t, first_column + c] = sum over slots, ascending, of topk_weights[t, slot] * terms[t * top_k + slot, c], in fp32.
// Grid: (tokens, ceil(columns / (kSumThreads * kSumColumns))).
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_slots_kernel(const float* terms, const int32_t* topk_ids, const float* topk_weights, int num_experts, int top_k, int hidden_size,
                     int first_column, int columns, T* output) {
  const int token = static_cast<int>(blockIdx.x);
  const int col = (static_cast<int>(blockIdx.y) * kSumThreads + static_cast<int>(threadIdx.x)) * kSumColumns;
  if (col >= columns) return;
  float sum[kSumColumns] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int slot = 0; slot < top_k; ++slot) {
    const int64_t pair = static_cast<int64_t>(token) * top_k + slot;
    const int id = topk_ids[pair];
    if (id < 0 || id >= num_experts) continue;  // a padded slot: nobody wrote its terms
    const float weight = topk_weights[pair];
    const uint4 v = *reinterpret_cast<const uint4*>(terms + pair * columns + col);
    sum[0] = add_rn(sum[0], mul_rn(bits_to_float(v.x), weight));
    sum[1] = add_rn(sum[1], mul_rn(bits_to_float(v.y), weight));
    sum[2] = add_rn(sum[2], mul_rn(bits_to_float(v.z), weight));
    sum[3] = add_rn(sum[3], mul_rn(bits_to_float(v.w), weight));
  }
  T result[kSumColumns];
#pragma unroll
  for (int i = 0; i < kSumColumns; ++i) from_float(sum[i], result[i]);
  uint2 packed;
  packed.x = static_cast<uint32_t>(result[0].bits) | static_cast<uint32_t>(result[1].bits) << 16;
  packed.y = static_cast<uint32_t>(result[2].bits) | static_cast<uint32_t>(result[3].bits) << 16;
  *reinterpret_cast<uint2*>(output + static_cast<int64_t>(token) * hidden_size + first_column + col) = packed;
}

}  // namespace ecmfq
