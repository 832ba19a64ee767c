// ecmfq.cu - the C ABI: checks everything that can be checked without touching device memory, then launches.
#include "ecmfq.h"

#include "ecmfq/gemm_prefill.cuh"
#include "ecmfq/launch.cuh"

namespace {

using ecmfq::MoeProblem;

constexpr int32_t kSizeMultiple = ecmfq::kTileCols;
constexpr int32_t kMaxTopK = 64;
constexpr int64_t kMaxPairs = int64_t{1} << 30;
// Largest sizes whose int32 sums cannot overflow: 16 * 8 * 127 a column per channel, 8 * 127 * 127 a column in groups.
constexpr int32_t kMaxSizePerChannel = 65536;
constexpr int32_t kMaxSizeGrouped = 16384;
constexpr int32_t kOldestDevice = 80;  // mma.m16n8k32 for s8, cp.async
constexpr uintptr_t kTensorAlignment = 16;

bool is_size(int32_t value, int32_t multiple, int32_t largest) { return value > 0 && value <= largest && value % multiple == 0; }

int32_t check_sizes(const EcmfqMoeParams& p) {
  if (p.num_tokens < 0 || p.num_experts < 1 || p.num_experts > ecmfq::kMaxExperts) return ECMFQ_ERROR_SHAPE;
  if (p.top_k < 1 || p.top_k > kMaxTopK) return ECMFQ_ERROR_SHAPE;
  if (static_cast<int64_t>(p.num_tokens) * p.top_k > kMaxPairs) return ECMFQ_ERROR_SHAPE;
  const bool grouped = p.group_size == ecmfq::kGroupSize;
  const int32_t multiple = grouped ? ecmfq::kGroupSize : kSizeMultiple;
  const int32_t largest = grouped ? kMaxSizeGrouped : kMaxSizePerChannel;
  if (!is_size(p.hidden_size, multiple, largest) || !is_size(p.intermediate_size, multiple, largest)) return ECMFQ_ERROR_SHAPE;
  return ECMFQ_OK;
}

MoeProblem problem_of(const EcmfqMoeParams& p) {
  MoeProblem problem{};
  problem.num_tokens = p.num_tokens;
  problem.num_experts = p.num_experts;
  problem.top_k = p.top_k;
  problem.hidden_size = p.hidden_size;
  problem.intermediate_size = p.intermediate_size;
  problem.grouped = p.group_size == ecmfq::kGroupSize;
  problem.dtype = static_cast<ecmfq::Dtype>(p.dtype);
  problem.weight_layout = static_cast<ecmfq::WeightLayout>(p.weight_layout);
  problem.num_sms = p.num_sms;
  return problem;
}

int32_t check_pointers(const EcmfqMoeParams& p) {
  const bool grouped = p.group_size == ecmfq::kGroupSize;
  const void* required[] = {p.hidden_states, p.topk_ids,     p.topk_weights, p.gate_up_qweight,
                            p.gate_up_scale, p.down_qweight, p.down_scale,   p.output};
  for (const void* pointer : required)
    if (pointer == nullptr) return ECMFQ_ERROR_NULL_POINTER;
  if (grouped && (p.gate_up_multiplier == nullptr || p.down_multiplier == nullptr)) return ECMFQ_ERROR_GROUP_SIZE;
  for (const void* pointer : required)
    if (reinterpret_cast<uintptr_t>(pointer) % kTensorAlignment != 0) return ECMFQ_ERROR_ALIGNMENT;
  return ECMFQ_OK;
}

}  // namespace

#define ECMFQ_TEXT(x) #x
#define ECMFQ_TEXT_OF(x) ECMFQ_TEXT(x)
#ifndef CUDART_VERSION  // under the emulator
#define CUDART_VERSION 0
#endif

extern "C" {

const char ecmfq_build_info[] = "ecmfq-build cuda=" ECMFQ_TEXT_OF(CUDART_VERSION) " ";

uint32_t ecmfq_abi_version(void) { return ECMFQ_ABI_VERSION; }

const char* ecmfq_status_string(int32_t status) {
  switch (status) {
    case ECMFQ_OK: return "ok";
    case ECMFQ_ERROR_ABI_VERSION: return "abi_version or struct_size is not this library's";
    case ECMFQ_ERROR_NULL_POINTER: return "a required pointer is null";
    case ECMFQ_ERROR_SHAPE:
      return "a size is out of range: hidden_size and intermediate_size must be multiples of 32 up to 65536 (of 128 up to 16384 when "
             "group_size is 128), num_experts 1 to 1024, top_k 1 to 64";
    case ECMFQ_ERROR_DTYPE: return "dtype is neither float16 nor bfloat16";
    case ECMFQ_ERROR_ACTIVATION: return "unknown activation: only silu_glu is implemented";
    case ECMFQ_ERROR_GROUP_SIZE: return "group_size is neither -1 nor 128, or a group multiplier tensor is missing";
    case ECMFQ_ERROR_WEIGHT_LAYOUT: return "unknown weight layout: neither row_major nor mma_s8";
    case ECMFQ_ERROR_WORKSPACE: return "workspace is null, not aligned to 256 bytes, or too small";
    case ECMFQ_ERROR_DEVICE:
      return "no kernel for this device: compute capability 8.0 or later, at least one multiprocessor and 48 KB of shared memory a "
             "block are needed";
    case ECMFQ_ERROR_LAUNCH: return "CUDA refused a kernel launch";
    case ECMFQ_ERROR_ALIGNMENT: return "a tensor is not aligned to 16 bytes";
    default: return "unknown status";
  }
}

int32_t ecmfq_routed_moe_check(const EcmfqMoeParams* params) {
  if (params == nullptr) return ECMFQ_ERROR_NULL_POINTER;
  const EcmfqMoeParams& p = *params;
  if (p.abi_version != ECMFQ_ABI_VERSION || p.struct_size != sizeof(EcmfqMoeParams)) return ECMFQ_ERROR_ABI_VERSION;
  if (p.group_size != -1 && p.group_size != ecmfq::kGroupSize) return ECMFQ_ERROR_GROUP_SIZE;
  const int32_t sizes = check_sizes(p);
  if (sizes != ECMFQ_OK) return sizes;
  if (p.activation != ECMFQ_SILU_GLU) return ECMFQ_ERROR_ACTIVATION;
  if (p.dtype != ECMFQ_FLOAT16 && p.dtype != ECMFQ_BFLOAT16) return ECMFQ_ERROR_DTYPE;
  if (p.weight_layout != ECMFQ_ROW_MAJOR && p.weight_layout != ECMFQ_MMA_S8) return ECMFQ_ERROR_WEIGHT_LAYOUT;
  if (p.compute_capability < kOldestDevice || p.num_sms < 1) return ECMFQ_ERROR_DEVICE;
  if (p.max_smem_per_block < ecmfq::prefill_shared_bytes(p.num_experts)) return ECMFQ_ERROR_DEVICE;
  return ECMFQ_OK;
}

int32_t ecmfq_routed_moe_workspace_size(const EcmfqMoeParams* params, size_t* bytes) {
  const int32_t status = ecmfq_routed_moe_check(params);
  if (status != ECMFQ_OK) return status;
  if (bytes == nullptr) return ECMFQ_ERROR_NULL_POINTER;
  *bytes = static_cast<size_t>(ecmfq::workspace_layout(problem_of(*params)).bytes);
  return ECMFQ_OK;
}

int32_t ecmfq_routed_moe(const EcmfqMoeParams* params, void* workspace, size_t workspace_bytes, void* stream) {
  int32_t status = ecmfq_routed_moe_check(params);
  if (status != ECMFQ_OK) return status;
  if (params->num_tokens == 0) return ECMFQ_OK;
  status = check_pointers(*params);
  if (status != ECMFQ_OK) return status;
  const MoeProblem problem = problem_of(*params);
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % ecmfq::kWorkspaceAlignment != 0) return ECMFQ_ERROR_WORKSPACE;
  if (workspace_bytes < static_cast<size_t>(ecmfq::workspace_layout(problem).bytes)) return ECMFQ_ERROR_WORKSPACE;
  const ecmfq::MoeTensors tensors{params->hidden_states,  params->topk_ids,      params->topk_weights,       params->gate_up_qweight,
                                  params->gate_up_scale,  params->gate_up_multiplier, params->down_qweight, params->down_scale,
                                  params->down_multiplier, params->output};
  return ecmfq::launch_routed_moe(problem, tensors, ecmfq::make_plan(problem), workspace, static_cast<ecmfq::Stream>(stream))
             ? ECMFQ_OK
             : ECMFQ_ERROR_LAUNCH;
}

}  // extern "C"
