// The search for the step of each row and group.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace {

// Weighted squared errors of Count steps on `size` values, in units of each step squared, times the step squared.
template <int Count>
void errors(const float* values, const float* cost, int64_t size, const float* steps, float limit, float* out) {
  Vec total[Count] = {}, inverse[Count];
  for (int c = 0; c < Count; ++c) inverse[c] = splat(1.0f / steps[c]);
  const auto add = [&](Vec value, Vec weight) __attribute__((always_inline)) {
    value = magnitude(value);
    for (int c = 0; c < Count; ++c) {
      const Vec scaled = value * inverse[c];
      const Vec miss = round_even(at_most(scaled, splat(limit))) - scaled;
      total[c] += miss * miss * weight;
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) add(load(values + i), cost ? load(cost + i) : splat(1.0f));
  if (i < size) {
    float last[kLanes] = {}, weights[kLanes] = {};  // zeros are on every grid
    for (int64_t k = 0; i + k < size; ++k) last[k] = values[i + k], weights[k] = cost ? cost[i + k] : 1.0f;
    add(load(last), load(weights));
  }
  for (int c = 0; c < Count; ++c) out[c] = sum_of(total[c]) * (steps[c] * steps[c]);
}

// The largest magnitude, NaN where there is one.
float largest(const float* values, int64_t size) {
  Vec most = {};
  IntVec strange = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec value = magnitude(load(values + i));
    strange |= value != value;
    most = at_least(value, most);
  }
  float found = 0.0f;
  bool number = true;
  for (int c = 0; c < kLanes; ++c) number &= strange[c] == 0, found = std::max(found, most[c]);
  for (; i < size; ++i) number &= values[i] == values[i], found = std::max(found, std::fabs(values[i]));
  return number ? found : std::numeric_limits<float>::quiet_NaN();
}

// The nearest float16 value that is not zero, as weights' scales are stored; above float16's range, the value itself.
float half_value(float value) {
  constexpr float kSmallest = 1.0f / (1 << 24), kNormal = 1.0f / (1 << 14);
  value = std::max(value, kSmallest);
  if (value < kNormal) return std::nearbyint(value / kSmallest) * kSmallest;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0xfff + (bits >> 13 & 1)) & ~uint32_t{0x1fff};  // 10 bits of the fraction, half to even
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void search_steps(const float* weight, int64_t rows, int64_t columns, int64_t groups, const float* cost, const float* ratios,
                  int64_t num_ratios, float limit, float* steps) {
  constexpr int kCoarse = 6, kApart = 3, kMostRatios = kCoarse * kApart;
  const int64_t size = columns / groups, count = std::max<int64_t>(1, std::min<int64_t>(num_ratios, kMostRatios));
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* values = weight + n * columns + g * size;
      const float* weights = cost ? cost + g * size : nullptr;
      float& found = steps[n * groups + g];
      const float most = largest(values, size);
      if (!(most > 0.0f && most <= std::numeric_limits<float>::max())) {
        found = most;
        continue;
      }
      float tried[kMostRatios], error[kCoarse];
      for (int64_t i = 0; i < kMostRatios; ++i) tried[i] = half_value(most * (ratios[std::min(i, count - 1)] / limit));
      float coarse[kCoarse];
      for (int64_t i = 0; i < kCoarse; ++i) coarse[i] = tried[kApart * i];
      errors<kCoarse>(values, weights, size, coarse, limit, error);
      int best = 0;
      for (int i = 1; i < kCoarse; ++i) best = error[i] < error[best] ? i : best;
      const int64_t middle = std::min<int64_t>(kApart * best, count - 1);
      const int64_t near[2] = {std::max<int64_t>(middle - 1, 0), std::min<int64_t>(middle + 1, count - 1)};
      const float beside[2] = {tried[near[0]], tried[near[1]]};
      float around[2];
      errors<2>(values, weights, size, beside, limit, around);
      float least = around[0];
      found = beside[0];
      if (error[best] < least) least = error[best], found = tried[middle];
      if (around[1] < least) found = beside[1];
    }
  }
}

}  // namespace
