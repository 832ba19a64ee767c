// Kernels of the host's CPU for rounding weights: what PyTorch's operators would do in many passes over memory, in one.
//
// Every function works on one matrix in one thread and allocates nothing; callers share matrices out among threads. Matrices are
// row-major and dense. Names: a weight has N rows (output channels) and K columns (input channels); in the walk's layout it is
// [K, N], so that a column of the weight is contiguous.
#pragma once

#include <cstdint>

#define ECMFQ_HOST_ABI_VERSION 1

#if defined(_WIN32)
#define ECMFQ_HOST_API extern "C"
#else
#define ECMFQ_HOST_API extern "C" __attribute__((visibility("default")))
#endif

// One set of kernels, compiled for one instruction set.
struct EcmfqHostKernels {
  const char* isa;

  // The step of least weighted squared error of each row and group, [N, G]: of `ratios` [num_ratios] times the largest magnitude
  // over `limit`, every third is tried and then the neighbours of the best; the first of equal ones (ratios fall) is kept. 0 for a
  // group of zeros, infinity or NaN for one that holds such a value. `cost` [K] weighs columns; null weighs them alike.
  void (*search_steps)(const float* weight, int64_t rows, int64_t columns, int64_t groups, const float* cost, const float* ratios,
                       int64_t num_ratios, float limit, float* steps);

  // `weight` [N, K] as [K, N], column k in row position[k], divided by `scale` [N] where that is not null.
  void (*to_columns)(const float* weight, int64_t rows, int64_t columns, const int64_t* position, const float* scale, float* out);

  // The inverse for grid points: `values` int8 [K, N] as [N, K], row position[k] in column k.
  void (*to_rows)(const int8_t* values, int64_t rows, int64_t columns, const int64_t* position, int8_t* out);

  // out[i, j] = keep own[order[i], order[j]] + factor shared[order[i], order[j]] for all i and all j >= i / block * block; the
  // rest of `out` is not written. `shared` may be null. All [K, K].
  void (*blend_in_order)(const float* own, const float* shared, float keep, float factor, const int64_t* order, int64_t columns,
                         int64_t block, float* out);

  // Rows of a Cholesky factor in place: `panel` [B, M], rows `stride` apart, B <= 256, starts with its diagonal block (upper triangle
  // read) and becomes the rows of U with U^T U = panel there; zeros below the diagonal. Returns 0, or 1 where a pivot is not positive
  // (NaN included) and `panel` is meaningless.
  int (*factor)(float* panel, int64_t stride, int64_t width, int64_t columns);

  // What rounding B columns [B, N] to nearest leaves out; `steps` and `group` as in the walk.
  void (*missed_by_nearest)(const float* target, const float* steps, const int64_t* group, int64_t width, int64_t rows, float limit,
                            float* out);

  // The walk over B <= 256 columns, the last one first. For column k
  //     v = target[k] + (product[k] + sum_{j > k} missing[j] upper[k, j]) / upper[k, k]
  // is rounded to the grid point q, and missing[k] = target[k] - q replaces target[k].
  //   upper: [B, B] with rows `upper_stride` apart. product, target: [B, N]; product may be null (zero).
  //   steps: [G, N] and group int64 [B], the grid of each column; null where values are in units of it (G = 1).
  //   grid: int8 [B, N], written. error: [N], grows by upper[k, k]^2 (v - q)^2.
  void (*walk)(const float* upper, int64_t upper_stride, const float* product, float* target, const float* steps, const int64_t* group,
               int64_t width, int64_t rows, float limit, int8_t* grid, float* error);
};

// The kernels for this CPU; `isa` names an instruction set ("avx512", "avx2", "base") or is null for the best one. Null where this
// library or this CPU has none of that name.
ECMFQ_HOST_API const EcmfqHostKernels* ecmfq_host_kernels(const char* isa);
ECMFQ_HOST_API int ecmfq_host_abi_version(void);
