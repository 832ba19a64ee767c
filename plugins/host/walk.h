// The walk within a block of columns, and rows of a Cholesky factor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace {

// A strip is so many vectors of rows, a tile so many columns: their sums fit the registers, a strip of 128 columns a core's first cache.
constexpr int kRows = kLanes * kStrip;  // rows of a strip
constexpr int kMaxWidth = 256;

// A strip of rows in the walk: its columns [B][kRows], dense.
struct Strip {
  alignas(64) float missing[kMaxWidth][kRows];  // target, then what is missing
  alignas(64) float product[kMaxWidth][kRows];
};

// product[k] += sum_{j >= end} missing[j] upper[k, j] for the tile's columns k in [end - Count, end).
template <int Count>
inline void sum_tile(Strip& strip, const float* upper, int64_t stride, int64_t end, int64_t width) {
  Vec total[Count][kStrip];
  for (int c = 0; c < Count; ++c)
    for (int v = 0; v < kStrip; ++v) total[c][v] = load(&strip.product[end - Count + c][v * kLanes]);
  const float* row[Count];
  for (int c = 0; c < Count; ++c) row[c] = upper + (end - Count + c) * stride;
  for (int64_t j = end; j < width; ++j) {
    Vec missing[kStrip];
    for (int v = 0; v < kStrip; ++v) missing[v] = load(&strip.missing[j][v * kLanes]);
    for (int c = 0; c < Count; ++c) {
      const float factor = row[c][j];
      for (int v = 0; v < kStrip; ++v) total[c][v] += missing[v] * factor;
    }
  }
  for (int c = 0; c < Count; ++c)
    for (int v = 0; v < kStrip; ++v) store(&strip.product[end - Count + c][v * kLanes], total[c][v]);
}

// sum_tile for `count` <= Most columns.
template <int Most>
inline void sum_columns(Strip& strip, const float* upper, int64_t stride, int64_t end, int64_t width, int64_t count) {
  if constexpr (Most > 1) {
    if (count < Most) return sum_columns<Most - 1>(strip, upper, stride, end, width, count);
  }
  sum_tile<Most>(strip, upper, stride, end, width);
}

void walk(const float* upper, int64_t upper_stride, const float* product, float* target, const float* steps, const int64_t* group,
          int64_t width, int64_t rows, float limit, int8_t* grid, float* error) {
  Strip strip;
  alignas(64) float step[kRows], square[kRows];
  alignas(64) int8_t points[kRows];
  for (int64_t n = 0; n < rows; n += kRows) {
    const int64_t height = std::min<int64_t>(kRows, rows - n), bytes = height * static_cast<int64_t>(sizeof(float));
    if (height < kRows) std::memset(&strip, 0, sizeof strip);
    for (int64_t k = 0; k < width; ++k) {
      std::memcpy(strip.missing[k], target + k * rows + n, bytes);
      if (product) std::memcpy(strip.product[k], product + k * rows + n, bytes);
      else std::memset(strip.product[k], 0, sizeof strip.product[k]);
    }
    for (int r = 0; r < kRows; ++r) step[r] = 1.0f, square[r] = r < height ? error[n + r] : 0.0f;
    int64_t end = width;
    while (end > 0) {
      const int64_t low = (end - 1) / kTile * kTile;
      sum_columns<kTile>(strip, upper, upper_stride, end, width, end - low);
      for (int64_t k = end - 1; k >= low; --k) {
        const float* row = upper + k * upper_stride;
        const float diagonal = row[k], inverse = 1.0f / diagonal, weight = diagonal * diagonal;
        if (steps) std::memcpy(step, steps + group[k] * rows + n, bytes);
        for (int v = 0; v < kStrip; ++v) {
          Vec sum = load(&strip.product[k][v * kLanes]);
          for (int64_t j = k + 1; j < end; ++j) sum += load(&strip.missing[j][v * kLanes]) * row[j];
          const Vec wanted = load(&strip.missing[k][v * kLanes]), value = wanted + sum * inverse;
          Vec whole, point;
          if (steps) {
            const Vec unit = load(step + v * kLanes);
            whole = round_even(clamp(value / unit, limit));
            point = whole * unit;
          } else {
            whole = point = round_even(clamp(value, limit));
          }
          store(&strip.missing[k][v * kLanes], wanted - point);
          const Vec miss = value - point;
          store(square + v * kLanes, load(square + v * kLanes) + miss * miss * weight);
          const ByteVec small = __builtin_convertvector(__builtin_convertvector(whole, IntVec), ByteVec);
          std::memcpy(points + v * kLanes, &small, sizeof small);
        }
        std::memcpy(grid + k * rows + n, points, height);
      }
      end = low;
    }
    for (int64_t k = 0; k < width; ++k) std::memcpy(target + k * rows + n, strip.missing[k], bytes);
    for (int64_t r = 0; r < height; ++r) error[n + r] = square[r];
  }
}

// total[k] -= sum_{j < low} result[j] lower[k, j] for the tile's rows k in [low, low + Count).
template <int Count>
inline void subtract_tile(Strip& strip, const float (*lower)[kMaxWidth], int64_t low) {
  Vec total[Count][kStrip];
  for (int c = 0; c < Count; ++c)
    for (int v = 0; v < kStrip; ++v) total[c][v] = load(&strip.product[low + c][v * kLanes]);
  for (int64_t j = 0; j < low; ++j) {
    Vec result[kStrip];
    for (int v = 0; v < kStrip; ++v) result[v] = load(&strip.missing[j][v * kLanes]);
    for (int c = 0; c < Count; ++c) {
      const float factor = lower[low + c][j];
      for (int v = 0; v < kStrip; ++v) total[c][v] -= result[v] * factor;
    }
  }
  for (int c = 0; c < Count; ++c)
    for (int v = 0; v < kStrip; ++v) store(&strip.product[low + c][v * kLanes], total[c][v]);
}

// subtract_tile for `count` <= Most rows.
template <int Most>
inline void subtract_rows(Strip& strip, const float (*lower)[kMaxWidth], int64_t low, int64_t count) {
  if constexpr (Most > 1) {
    if (count < Most) return subtract_rows<Most - 1>(strip, lower, low, count);
  }
  subtract_tile<Most>(strip, lower, low);
}

int factor(float* panel, int64_t stride, int64_t width, int64_t columns) {
  static thread_local float lower[kMaxWidth][kMaxWidth];  // of the diagonal block, [k][j] = U[j, k]
  static thread_local Strip strip;
  float inverse[kMaxWidth];
  for (int64_t n = 0; n < columns; n += kRows) {
    const int64_t height = std::min<int64_t>(kRows, columns - n), bytes = height * static_cast<int64_t>(sizeof(float));
    const int64_t deepest = std::min(width, n + height);  // rows behind it are below the diagonal
    for (int64_t k = 0; k < deepest; ++k) {
      if (height < kRows) std::memset(strip.product[k], 0, sizeof strip.product[k]);
      std::memcpy(strip.product[k], panel + k * stride + n, bytes);
    }
    for (int64_t low = 0; low < deepest; low += kTile) {
      const int64_t high = std::min<int64_t>(low + kTile, deepest);
      subtract_rows<kTile>(strip, lower, low, high - low);
      for (int64_t k = low; k < high; ++k) {
        for (int64_t j = low; j < k; ++j)
          for (int v = 0; v < kStrip; ++v)
            store(&strip.product[k][v * kLanes],
                  load(&strip.product[k][v * kLanes]) - load(&strip.missing[j][v * kLanes]) * lower[k][j]);
        if (k >= n) {
          const float pivot = strip.product[k][k - n];
          if (!(pivot > 0.0f && pivot <= std::numeric_limits<float>::max())) return 1;
          inverse[k] = 1.0f / std::sqrt(pivot);
        }
        for (int v = 0; v < kStrip; ++v)
          store(&strip.missing[k][v * kLanes], load(&strip.product[k][v * kLanes]) * inverse[k]);
        for (int64_t c = std::max<int64_t>(k - n, 0); c < height && n + c < width; ++c) lower[n + c][k] = strip.missing[k][c];
        if (k >= n) std::memset(strip.missing[k], 0, (k - n) * sizeof(float));
      }
    }
    for (int64_t k = 0; k < deepest; ++k) std::memcpy(panel + k * stride + n, strip.missing[k], bytes);
    for (int64_t k = deepest; k < width; ++k) std::memset(panel + k * stride + n, 0, bytes);
  }
  return 0;
}

}  // namespace
