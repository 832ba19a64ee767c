// planner.cuh - chooses a tiling from what the host knows: sizes, not the experts' loads, which live on the device.
#pragma once

#include "ecmfq/problem.cuh"

namespace ecmfq {

enum class Tiling : int32_t {
  kDecode8 = 0,   // decode kernel, 8 tokens of an expert at once
  kDecode32 = 1,  // decode kernel, up to 32
  kPrefill = 2,
};

struct MoePlan {
  Tiling tiling;
  int32_t term_columns;       // columns of the down projection between two sums, a multiple of 32
  int32_t persistent_blocks;  // prefill's grid
};

// Up to this many pairs an expert on average, a tile of 64 tokens would be mostly empty. Not yet measured on a GPU.
constexpr int64_t kDecodePairsPerExpert = 16;
// With 8 tokens or fewer no expert has more than 8, unless a token names an expert twice (still correct, one more pass).
constexpr int32_t kDecode8Tokens = 8;

inline MoePlan make_plan(const MoeProblem& p) {
  MoePlan plan{};
  if (p.num_tokens <= kDecode8Tokens) {
    plan.tiling = Tiling::kDecode8;
  } else if (p.num_pairs() <= kDecodePairsPerExpert * p.num_experts) {
    plan.tiling = Tiling::kDecode32;
  } else {
    plan.tiling = Tiling::kPrefill;
  }
  plan.term_columns = term_columns(p);
  plan.persistent_blocks = p.num_sms * (p.grouped ? 1 : 2);
  return plan;
}

}  // namespace ecmfq
