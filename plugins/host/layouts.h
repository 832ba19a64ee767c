// Weights and Hessians into the walk's layout and order, and grid points back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int kTall = 256;  // rows of floats that a transposition moves at a time
constexpr int kSide = 64;  // rows that a transposition moves at a time; of bytes, columns as well

// Transposes kLanes vectors in registers: at each distance the off-diagonal blocks change places.
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int apart = 1; apart < kLanes; apart *= 2) {
    IntVec low = {}, high = {};
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & apart ? i - apart + kLanes : i;
      high[i] = i & apart ? i + kLanes : i + apart;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & apart) continue;
      const Vec first = rows[i], second = rows[i + apart];
      rows[i] = __builtin_shuffle(first, second, low);
      rows[i + apart] = __builtin_shuffle(first, second, high);
    }
  }
}

typedef int8_t Bytes __attribute__((vector_size(16)));

// Transposes 16 vectors of 16 bytes: interleaving the halves four times.
inline void transpose(Bytes (&rows)[16]) {
  constexpr Bytes kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Bytes kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int stage = 0; stage < 4; ++stage) {
    Bytes next[16];
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], kLow);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], kHigh);
    }
    std::memcpy(rows, next, sizeof next);
  }
}

void to_columns(const float* weight, int64_t rows, int64_t columns, const int64_t* position, const float* scale, float* out) {
  alignas(64) float strip[kLanes][kTall];
  for (int64_t n = 0; n < rows; n += kTall) {
    const int64_t height = std::min<int64_t>(kTall, rows - n);
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, columns - k);
      int64_t r = 0;
      for (; width == kLanes && r + kLanes <= height; r += kLanes) {
        Vec values[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const float* from = weight + (n + r + i) * columns + k;
          __builtin_prefetch(from + kLanes);
          values[i] = load(from);
          if (scale) values[i] /= scale[n + r + i];
        }
        transpose(values);
        for (int c = 0; c < kLanes; ++c) store(strip[c] + r, values[c]);
      }
      for (; r < height; ++r) {
        const float* from = weight + (n + r) * columns + k;
        for (int64_t c = 0; c < width; ++c) strip[c][r] = scale ? from[c] / scale[n + r] : from[c];
      }
      for (int64_t c = 0; c < width; ++c) std::memcpy(out + position[k + c] * rows + n, strip[c], height * sizeof(float));
    }
  }
}

void missed_by_nearest(const float* target, const float* steps, const int64_t* group, int64_t width, int64_t rows, float limit,
                       float* out) {
  for (int64_t k = 0; k < width; ++k) {
    const float* from = target + k * rows;
    const float* step = steps ? steps + group[k] * rows : nullptr;
    float* to = out + k * rows;
    int64_t r = 0;
    for (; r + kLanes <= rows; r += kLanes) {
      const Vec value = load(from + r), unit = step ? load(step + r) : splat(1.0f);
      store(to + r, value - round_even(clamp(value / unit, limit)) * unit);
    }
    for (; r < rows; ++r) {
      const float unit = step ? step[r] : 1.0f;
      to[r] = from[r] - std::nearbyint(std::min(std::max(from[r] / unit, -limit), limit)) * unit;
    }
  }
}

void to_rows(const int8_t* values, int64_t rows, int64_t columns, const int64_t* position, int8_t* out) {
  alignas(64) int8_t square[kSide][kSide];
  for (int64_t n = 0; n < rows; n += kSide) {
    const int64_t height = std::min<int64_t>(kSide, rows - n);
    for (int64_t k = 0; k < columns; k += kSide) {
      const int64_t width = std::min<int64_t>(kSide, columns - k);
      const int64_t ahead = std::min<int64_t>(k + kSide, columns), stop = std::min<int64_t>(ahead + kSide, columns);
      for (int64_t c = ahead; c < stop; ++c) __builtin_prefetch(values + position[c] * rows + n);
      int64_t c = 0;
      for (; c + 16 <= width; c += 16) {
        const int8_t* from[16];
        for (int i = 0; i < 16; ++i) from[i] = values + position[k + c + i] * rows + n;
        int64_t r = 0;
        for (; r + 16 <= height; r += 16) {
          Bytes block[16];
          for (int i = 0; i < 16; ++i) std::memcpy(&block[i], from[i] + r, 16);
          transpose(block);
          for (int i = 0; i < 16; ++i) std::memcpy(&square[r + i][c], &block[i], 16);
        }
        for (; r < height; ++r)
          for (int i = 0; i < 16; ++i) square[r][c + i] = from[i][r];
      }
      for (; c < width; ++c) {
        const int8_t* from = values + position[k + c] * rows + n;
        for (int64_t r = 0; r < height; ++r) square[r][c] = from[r];
      }
      for (int64_t r = 0; r < height; ++r) std::memcpy(out + (n + r) * columns + k, square[r], width);
    }
  }
}

void blend_in_order(const float* own, const float* shared, float keep, float factor, const int64_t* order, int64_t columns,
                    int64_t block, float* out) {
  for (int64_t i = 0; i < columns; ++i) {
    const float* from = own + order[i] * columns;
    float* to = out + i * columns;
    const int64_t start = i / block * block;
    // The next row, wherever it is.
    const int64_t next = order[std::min(i + 1, columns - 1)] * columns;
    for (int64_t j = 0; j < columns; j += 16) {
      __builtin_prefetch(own + next + j, 0, 2);
      if (shared) __builtin_prefetch(shared + next + j, 0, 2);
    }
    if (shared) {
      const float* other = shared + order[i] * columns;
      for (int64_t j = start; j < columns; ++j) to[j] = keep * from[order[j]] + factor * other[order[j]];
    } else {
      for (int64_t j = start; j < columns; ++j) to[j] = keep * from[order[j]];
    }
  }
}

}  // namespace
