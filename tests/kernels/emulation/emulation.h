// emulation.h - stands in for CUDA so that the kernels in plugins/ build as plain C++ and run on the CPU. A test tool.
//
// Every thread of a block is a fiber; blocks run one after the other. A fiber runs until it meets a barrier or a warp collective
// (mma, shuffle, ballot); the scheduler then picks another in an order shuffled by a seed, so that code which relies on a lucky
// order between barriers fails. Shared memory is a heap block of exactly the launched size, filled with garbage before each block,
// and copies by cp.async land as late as the instruction allows: at the wait that demands them. Integer results are exact.
//
// What it does NOT model: time; blocks running at the same time (no kernel here communicates between blocks); races inside one
// barrier interval beyond what reordering of whole intervals shows; weak memory ordering; bank conflicts; caches; registers;
// alignment that only PTX demands (shared addresses of cp.async are checked); launch limits other than those checked in launch().
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __launch_bounds__(...)
#define ECMFQ_DEVICE inline
#define ECMFQ_HOST_DEVICE inline

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  constexpr explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarp = 32;

// One warp's meeting place: each lane brings up to eleven words and takes up to four.
struct Exchange {
  uint32_t in[kWarp][11];
  uint32_t out[kWarp][4];
};
using Combine = void (*)(Exchange&);

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* shared();
void barrier();
// The calling lane's slot; fill in[lane], then meet(): the last lane of the warp runs `combine`, and all go on.
Exchange& exchange();
void meet(Combine combine);
void copy_later(void* shared_to, const void* global_from, int bytes, bool valid);
void copy_commit();
void copy_wait(int pending);
// Runs a grid; false when the launch itself would be refused. Programming errors abort with a message.
bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
void set_seed(uint64_t seed);
// Bytes that went through load_stream_16 since the last call with `reset`.
int64_t streamed_bytes(int64_t add, bool reset = false);

inline int lane() { return static_cast<int>(thread_index().x) & (kWarp - 1); }

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())

namespace ecmfq {

using Stream = void*;

void emulate_mma(emulation::Exchange& e);
void emulate_ballot(emulation::Exchange& e);
void emulate_shuffle_xor(emulation::Exchange& e);

inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Exchange& e = emulation::exchange();
  uint32_t* in = e.in[emulation::lane()];
  for (int i = 0; i < 4; ++i) in[i] = a[i];
  in[4] = b0;
  in[5] = b1;
  for (int i = 0; i < 4; ++i) in[6 + i] = static_cast<uint32_t>(d[i]);
  emulation::meet(&emulate_mma);
  for (int i = 0; i < 4; ++i) d[i] = static_cast<int32_t>(e.out[emulation::lane()][i]);
}

inline void cp_async_16(void* shared, const void* global, bool valid) { emulation::copy_later(shared, global, 16, valid); }
inline void cp_async_4(void* shared, const void* global, bool valid) { emulation::copy_later(shared, global, 4, valid); }
inline void cp_async_commit() { emulation::copy_commit(); }
template <int kPending>
inline void cp_async_wait() {
  emulation::copy_wait(kPending);
}

inline uint4 load_stream_16(const void* global) {
  emulation::streamed_bytes(16);
  return *static_cast<const uint4*>(global);
}
inline uint2 load_8(const void* global) { return *static_cast<const uint2*>(global); }
inline uint32_t load_4(const void* global) { return *static_cast<const uint32_t*>(global); }

inline uint32_t warp_ballot(bool predicate) {
  emulation::Exchange& e = emulation::exchange();
  e.in[emulation::lane()][0] = predicate;
  emulation::meet(&emulate_ballot);
  return e.out[emulation::lane()][0];
}
inline uint32_t warp_shuffle_xor(uint32_t value, int mask) {
  emulation::Exchange& e = emulation::exchange();
  e.in[emulation::lane()][0] = value;
  e.in[emulation::lane()][1] = static_cast<uint32_t>(mask);
  emulation::meet(&emulate_shuffle_xor);
  return e.out[emulation::lane()][0];
}
inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }
inline void block_barrier() { emulation::barrier(); }
inline unsigned char* shared_memory() { return emulation::shared(); }

// Plain operators: the file is compiled with -ffp-contract=off, so nothing is fused.
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float div_rn(float a, float b) { return a / b; }
inline float int_to_float(int32_t v) { return static_cast<float>(v); }
inline int32_t round_to_int(float v) { return static_cast<int32_t>(std::nearbyintf(v)); }
inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float bits_to_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
float half_to_float(uint16_t bits);
uint16_t float_to_half(float v);

template <class... Params, class... Args>
bool launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream, Args... args) {
  return emulation::run(grid, block, shared_bytes, [=] { kernel(args...); });
}

}  // namespace ecmfq
