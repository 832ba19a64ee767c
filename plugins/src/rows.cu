// rows.cu - launches of the row kernels: quantize and route, quantize the intermediate, sum over slots.
#include "ecmfq/launch.cuh"
#include "ecmfq/rows.cuh"

namespace ecmfq {
namespace {

constexpr size_t kRowSharedBytes = 32 * 4;

template <class T>
bool prepare(const MoeProblem& p, const MoeTensors& t, const MoeWorkspace& at, unsigned char* ws, Stream stream) {
  return launch(&prepare_kernel<T>, dim3(static_cast<unsigned>(p.num_tokens + p.num_experts)), dim3(kPrepareThreads), kRowSharedBytes,
                stream, static_cast<const T*>(t.hidden_states), t.topk_ids, p.num_tokens, p.hidden_size,
                static_cast<int>(p.num_pairs()), p.num_experts, reinterpret_cast<int8_t*>(ws + at.act_q),
                reinterpret_cast<float*>(ws + at.act_scale), reinterpret_cast<int32_t*>(ws + at.expert_offsets),
                reinterpret_cast<int32_t*>(ws + at.row_pair));
}

template <class T>
bool sum_slots(const MoeProblem& p, const MoeTensors& t, const MoeWorkspace& at, unsigned char* ws, int first_column, int columns,
               Stream stream) {
  constexpr int kBlockColumns = kSumThreads * kSumColumns;
  const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>((columns + kBlockColumns - 1) / kBlockColumns));
  return launch(&sum_slots_kernel<T>, grid, dim3(kSumThreads), 0, stream, reinterpret_cast<const float*>(ws + at.scratch), t.topk_ids,
                t.topk_weights, p.num_experts, p.top_k, p.hidden_size, first_column, columns, static_cast<T*>(t.output));
}

}  // namespace

bool launch_prepare(const MoeProblem& p, const MoeTensors& t, const MoeWorkspace& at, unsigned char* ws, Stream stream) {
  return p.dtype == Dtype::kFloat16 ? prepare<Float16>(p, t, at, ws, stream) : prepare<BFloat16>(p, t, at, ws, stream);
}

bool launch_quantize_intermediate(const MoeProblem& p, const MoeWorkspace& at, unsigned char* ws, Stream stream) {
  return launch(&quantize_intermediate_kernel<float>, dim3(static_cast<unsigned>(p.num_pairs())), dim3(kRowThreads), kRowSharedBytes,
                stream, reinterpret_cast<const float*>(ws + at.scratch), p.intermediate_size,
                reinterpret_cast<const int32_t*>(ws + at.expert_offsets) + p.num_experts,
                reinterpret_cast<int8_t*>(ws + at.inter_q), reinterpret_cast<float*>(ws + at.inter_scale));
}

bool launch_sum_slots(const MoeProblem& p, const MoeTensors& t, const MoeWorkspace& at, unsigned char* ws, int first_column, int columns,
                      Stream stream) {
  return p.dtype == Dtype::kFloat16 ? sum_slots<Float16>(p, t, at, ws, first_column, columns, stream)
                                    : sum_slots<BFloat16>(p, t, at, ws, first_column, columns, stream);
}

}  // namespace ecmfq
