// The widest registers of an instruction set, as GCC's vector types, and what every kernel does with them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kStrip = 4, kTile = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8, kStrip = 2, kTile = 4;
#else
constexpr int kLanes = 4, kStrip = 2, kTile = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec splat(float value) { return value - Vec{}; }

// Round half to even of values below 2^22 in magnitude: adding 1.5 * 2^23 leaves no bit for a fraction.
inline Vec round_even(Vec value) {
  constexpr float kMagic = 12582912.0f;
  Vec shifted = value + kMagic;
  return shifted - kMagic;
}

// In these forms, which compilers turn into one instruction each; NaN becomes `limit`.
inline Vec at_most(Vec value, Vec limit) { return value < limit ? value : limit; }
inline Vec at_least(Vec value, Vec limit) { return value > limit ? value : limit; }
inline Vec clamp(Vec value, float limit) { return at_least(at_most(value, splat(limit)), splat(-limit)); }

inline Vec magnitude(Vec value) {
  IntVec bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= 0x7fffffff;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

inline float sum_of(Vec value) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += value[i];
  return total;
}

}  // namespace
