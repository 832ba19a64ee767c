// device.cuh - the only header with PTX and CUDA intrinsics: thin wrappers, one instruction each, no decisions.
//
// With ECMFQ_EMULATION defined, the same names come from tests/kernels/emulation/emulation.h and the kernels build as plain C++
// and run on the CPU. Keep it that way: anything that a host compiler cannot build belongs here, and nothing else does.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef ECMFQ_EMULATION
#include "emulation.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ECMFQ_DEVICE __device__ __forceinline__
#define ECMFQ_HOST_DEVICE __host__ __device__ __forceinline__

namespace ecmfq {

using Stream = cudaStream_t;

// D = A * B + D, A 16x32 row-major, B 32x8 column-major, both s8, D s32. PTX ISA, "Matrix fragments for mma.m16n8k32":
// with group = lane / 4 and quad = lane % 4, a[0], a[2] are row `group`, a[1], a[3] row `group + 8`; a[0], a[1], b0 hold
// k = 4*quad..4*quad+3 and a[2], a[3], b1 the same plus 16; d[0], d[1] are row `group`, columns 2*quad, 2*quad+1, d[2], d[3] row
// `group + 8`.
ECMFQ_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Asynchronous global-to-shared copies. `valid` false writes zeros and reads nothing; the source must still be a legal address.
ECMFQ_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
ECMFQ_DEVICE void cp_async_4(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
ECMFQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are unfinished.
template <int kPending>
ECMFQ_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Read-only loads. `stream` marks data that is used once: it must not push activations out of L1.
ECMFQ_DEVICE uint4 load_stream_16(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}
ECMFQ_DEVICE uint2 load_8(const void* global) { return __ldg(static_cast<const uint2*>(global)); }
ECMFQ_DEVICE uint32_t load_4(const void* global) { return __ldg(static_cast<const uint32_t*>(global)); }

ECMFQ_DEVICE uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
ECMFQ_DEVICE uint32_t warp_shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
ECMFQ_DEVICE int popcount(uint32_t bits) { return __popc(bits); }
ECMFQ_DEVICE void block_barrier() { __syncthreads(); }

// The block's dynamic shared memory: 16-byte aligned, uninitialised.
ECMFQ_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char ecmfq_shared[];
  return ecmfq_shared;
}

// fp32 operations that the compiler may neither fuse nor reorder: this is what makes results equal the NumPy reference bit for bit.
// (Do not build with --use_fast_math or -ftz=true.)
ECMFQ_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
ECMFQ_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
ECMFQ_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
ECMFQ_DEVICE float int_to_float(int32_t v) { return __int2float_rn(v); }
ECMFQ_DEVICE int32_t round_to_int(float v) { return __float2int_rn(v); }  // half to even
ECMFQ_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }
ECMFQ_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
ECMFQ_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
ECMFQ_DEVICE uint16_t float_to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }

// Launches and says whether CUDA took it. cudaLaunchKernel's own result is used, so another library's pending error is neither
// reported nor cleared.
template <class... Params, class... Args>
bool launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Args... args) {
  auto call = [&](Params... converted) {
    void* pointers[] = {static_cast<void*>(&converted)...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream);
  };
  return call(args...) == cudaSuccess;
}

}  // namespace ecmfq
#endif  // ECMFQ_EMULATION
