// The kernels' C ABI and the device query, without CUDA: what plugins/trt calls, so that its host code can be built with
// sanitizers by any C++ compiler. The checks are the real ones' in kind, not in detail.
#include "../../../plugins/capi/ecmfq.h"
#include "../../../plugins/trt/device_facts.h"

extern "C" {

uint32_t ecmfq_abi_version(void) { return ECMFQ_ABI_VERSION; }

const char* ecmfq_status_string(int32_t status) { return status == ECMFQ_ERROR_SHAPE ? "shape refused by the stub" : "stub status"; }

int32_t ecmfq_routed_moe_check(const EcmfqMoeParams* p) {
    if (p->abi_version != ECMFQ_ABI_VERSION || p->struct_size != sizeof(EcmfqMoeParams)) return ECMFQ_ERROR_ABI_VERSION;
    if (p->num_tokens < 0 || p->num_experts < 1 || p->hidden_size % 32 != 0 || p->intermediate_size % 32 != 0) return ECMFQ_ERROR_SHAPE;
    return ECMFQ_OK;
}

int32_t ecmfq_routed_moe_workspace_size(const EcmfqMoeParams* p, size_t* bytes) {
    *bytes = static_cast<size_t>(p->num_tokens) * p->top_k * (p->hidden_size + 6u * p->intermediate_size) + p->num_sms;
    return ECMFQ_OK;
}

int32_t ecmfq_routed_moe(const EcmfqMoeParams* p, void*, size_t workspace_bytes, void*) {
    const int32_t status = ecmfq_routed_moe_check(p);
    if (status != ECMFQ_OK) return status;
    size_t needed = 0;
    ecmfq_routed_moe_workspace_size(p, &needed);
    if (needed > workspace_bytes) return ECMFQ_ERROR_WORKSPACE;
    return p->hidden_states && p->output && p->gate_up_qweight && (p->group_size < 0 || p->gate_up_multiplier)
               ? ECMFQ_OK
               : ECMFQ_ERROR_NULL_POINTER;
}

} // extern "C"

namespace ecmfq::trt {
DeviceFacts query_current_device() noexcept { return {86, 40, 101376}; }
} // namespace ecmfq::trt
