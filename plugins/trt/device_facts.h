// device_facts.h - what the kernels' planning needs to know of a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ecmfq::trt {

struct DeviceFacts {
    int32_t compute_capability; // 10 * major + minor; 0 where there is no device
    int32_t num_sms;
    int32_t max_smem_per_block; // bytes, opt-in
};

// The current device; compute_capability 0 where the driver or the device is missing. Not for enqueue: it asks the driver.
DeviceFacts query_current_device() noexcept;

// An engine is built where its GPU is not, so its workspace is sized for the largest part of every supported architecture.
const DeviceFacts* supported_devices(size_t& count) noexcept;

} // namespace ecmfq::trt
