// problem.cuh - one routed MoE layer as the kernels see it: sizes, pointers, and the workspace's parts. Host code, no CUDA call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ecmfq/layout.cuh"

namespace ecmfq {

enum class Dtype : int32_t { kFloat16 = 0, kBFloat16 = 1 };

struct MoeProblem {
  int32_t num_tokens;
  int32_t num_experts;
  int32_t top_k;
  int32_t hidden_size;
  int32_t intermediate_size;
  bool grouped;  // a multiplier for each 128 columns
  Dtype dtype;
  WeightLayout weight_layout;
  int32_t num_sms;

  int64_t num_pairs() const { return static_cast<int64_t>(num_tokens) * top_k; }
};

// Device pointers; shapes in capi/ecmfq.h.
struct MoeTensors {
  const void* hidden_states;
  const int32_t* topk_ids;
  const float* topk_weights;
  const int8_t* gate_up_qweight;
  const float* gate_up_scale;
  const int8_t* gate_up_multiplier;
  const int8_t* down_qweight;
  const float* down_scale;
  const int8_t* down_multiplier;
  void* output;
};

// fp32 terms of the down projection wait here for the ordered sum. A few columns at a time keep them within this many bytes
// (in L2 on the larger GPUs), instead of num_pairs * hidden_size * 4: 268 MB for 4096 tokens of Qwen3-VL-30B-A3B.
constexpr int64_t kTermBudget = int64_t{32} << 20;
constexpr int32_t kMinTermColumns = 128;
constexpr int64_t kWorkspaceAlignment = 256;
#ifdef ECMFQ_EMULATION
constexpr int64_t kWorkspaceGap = 256;  // between the parts; the emulator makes any access to it an error
#else
constexpr int64_t kWorkspaceGap = 0;
#endif

// Columns of the down projection that are computed and summed at once: a multiple of 32, or all of them.
inline int32_t term_columns(const MoeProblem& p) {
  if (p.num_pairs() * p.hidden_size * 4 <= kTermBudget) return p.hidden_size;
  const int64_t fitting = kTermBudget / (p.num_pairs() * 4) / kMinTermColumns * kMinTermColumns;
  const int64_t columns = fitting < kMinTermColumns ? kMinTermColumns : fitting;
  return static_cast<int32_t>(columns < p.hidden_size ? columns : p.hidden_size);
}

// Byte offsets. "Rows" are (token, slot) pairs sorted by expert; pairs with an id outside [0, E) have no row.
struct MoeWorkspace {
  int64_t act_q;           // int8 [num_tokens, hidden_size], columns in activation order
  int64_t act_scale;       // fp32 [num_tokens]
  int64_t expert_offsets;  // int32 [num_experts + 1]: expert e owns rows [offsets[e], offsets[e + 1])
  int64_t row_pair;        // int32 [num_pairs]: row -> token * top_k + slot, ascending within an expert
  int64_t inter_q;         // int8 [num_pairs, intermediate_size], columns in activation order
  int64_t inter_scale;     // fp32 [num_pairs]
  int64_t scratch;         // fp32: silu(gate) * up [num_pairs, intermediate_size], later terms [num_pairs, term_columns]
  int64_t bytes;
};

// Grows with num_tokens and does not depend on the tiling.
inline MoeWorkspace workspace_layout(const MoeProblem& p) {
  MoeWorkspace w{};
  int64_t at = 0;
  auto take = [&at](int64_t bytes) {
    const int64_t offset = at;
    at += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment + kWorkspaceGap;
    return offset;
  };
  const int64_t pairs = p.num_pairs();
  w.act_q = take(static_cast<int64_t>(p.num_tokens) * p.hidden_size);
  w.act_scale = take(static_cast<int64_t>(p.num_tokens) * 4);
  w.expert_offsets = take((static_cast<int64_t>(p.num_experts) + 1) * 4);
  w.row_pair = take(pairs * 4);
  w.inter_q = take(pairs * p.intermediate_size);
  w.inter_scale = take(pairs * 4);
  const int64_t inter = pairs * p.intermediate_size * 4;
  // Not num_pairs * term_columns, which falls where term_columns steps down: the size must never shrink when tokens are added.
  const int64_t all_terms = pairs * p.hidden_size * 4;
  const int64_t least_terms = pairs * (p.hidden_size < kMinTermColumns ? p.hidden_size : kMinTermColumns) * 4;
  const int64_t bound = least_terms > kTermBudget ? least_terms : kTermBudget;
  const int64_t terms = all_terms < bound ? all_terms : bound;
  w.scratch = take(inter > terms ? inter : terms);
  w.bytes = at;
  return w;
}

}  // namespace ecmfq
