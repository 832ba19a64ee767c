#include "device_facts.h"

namespace ecmfq::trt {

// Multiprocessors of the largest product of each architecture; opt-in shared memory from CUDA's table of technical
// specifications. plugins/CMakeLists.txt compiles kernels for the same list.
const DeviceFacts* supported_devices(size_t& count) noexcept {
    static constexpr DeviceFacts kDevices[] = {
        {80, 108, 166912}, // A100
        {86, 84, 101376},  // A40, RTX 3090 Ti
        {87, 16, 166912},  // Jetson AGX Orin
        {89, 142, 101376}, // L40, RTX 6000 Ada
        {90, 132, 232448}, // H100, H200
        {100, 148, 232448}, // B200
        {110, 20, 232448}, // Jetson Thor
        {120, 188, 101376}, // RTX PRO 6000 Blackwell
        {121, 48, 101376}, // DGX Spark
    };
    count = sizeof kDevices / sizeof kDevices[0];
    return kDevices;
}

} // namespace ecmfq::trt
