// The kernels, compiled once for each instruction set (ECMFQ_HOST_ISA and the compiler's -m options). GCC's vector types carry the
// widest registers at hand; sums have one order, so a set gives the same bits whoever calls it and however work is shared out.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "host_kernels.h"

#ifndef ECMFQ_HOST_ISA
#error "compile with -DECMFQ_HOST_ISA=<name>"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kStrip = 4, kTile = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8, kStrip = 2, kTile = 4;
#else
constexpr int kLanes = 4, kStrip = 2, kTile = 4;
#endif
// A strip is so many vectors of rows, a tile so many columns: their sums fit the registers, a strip of 128 columns a core's first cache.
constexpr int kRows = kLanes * kStrip;  // rows of a strip
constexpr int kMaxWidth = 256;
constexpr int kTall = 256;  // rows of floats that a transposition moves at a time
constexpr int kSide = 64;  // rows that a transposition moves at a time; of bytes, columns as well

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

inline float sum_of(Vec value) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += value[i];
  return total;
}

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

#define ECMFQ_HOST_JOIN2(a, b) a##b
#define ECMFQ_HOST_JOIN(a, b) ECMFQ_HOST_JOIN2(a, b)
#define ECMFQ_HOST_TEXT2(a) #a
#define ECMFQ_HOST_TEXT(a) ECMFQ_HOST_TEXT2(a)

extern const EcmfqHostKernels ECMFQ_HOST_JOIN(ecmfq_host_, ECMFQ_HOST_ISA);
const EcmfqHostKernels ECMFQ_HOST_JOIN(ecmfq_host_, ECMFQ_HOST_ISA) = {
    ECMFQ_HOST_TEXT(ECMFQ_HOST_ISA), search_steps, to_columns, to_rows, blend_in_order, factor, missed_by_nearest, walk};
