#include "device_facts.h"

#include <cuda_runtime_api.h>

namespace ecmfq::trt {

DeviceFacts query_current_device() noexcept {
    int device = 0, major = 0, minor = 0, sms = 0, smem = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        (void)cudaGetLastError(); // not to leave our question's error for the next caller
        return {0, 0, 0};
    }
    return {10 * major + minor, sms, smem};
}

} // namespace ecmfq::trt
