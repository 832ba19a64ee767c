/* ecmfq.h - the C ABI of the ECMFQ kernels.
 *
 * Used by the TensorRT plugin (plugins/trt), by ctypes tests and by benchmarks. It knows CUDA's runtime types only
 * through `void*` streams, so that a host without a CUDA toolkit can include it.
 *
 * Every function is re-entrant and returns a status; none prints, allocates, synchronizes or throws. All scratch memory is the
 * caller's workspace, so calls can be captured in a CUDA graph.
 */
#ifndef ECMFQ_H
#define ECMFQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define ECMFQ_API __attribute__((visibility("default")))
#else
#define ECMFQ_API
#endif

/* Raised whenever EcmfqMoeParams, a weight layout or the operator's meaning changes. */
#define ECMFQ_ABI_VERSION 1u

typedef enum EcmfqStatus {
    ECMFQ_OK = 0,
    ECMFQ_ERROR_ABI_VERSION = 1,     /* params.abi_version or params.struct_size is not this library's */
    ECMFQ_ERROR_NULL_POINTER = 2,    /* a required pointer is null */
    ECMFQ_ERROR_SHAPE = 3,           /* a size is out of range or is not a multiple that the kernels tile */
    ECMFQ_ERROR_DTYPE = 4,           /* unknown data type */
    ECMFQ_ERROR_ACTIVATION = 5,      /* unknown activation */
    ECMFQ_ERROR_GROUP_SIZE = 6,      /* group_size is neither -1 nor 128, or a multiplier is missing */
    ECMFQ_ERROR_WEIGHT_LAYOUT = 7,   /* unknown weight layout */
    ECMFQ_ERROR_WORKSPACE = 8,       /* workspace is null, misaligned or too small */
    ECMFQ_ERROR_DEVICE = 9,          /* no kernel for this compute capability, or too little shared memory */
    ECMFQ_ERROR_LAUNCH = 10,         /* CUDA refused a launch */
    ECMFQ_ERROR_ALIGNMENT = 11       /* a tensor is not aligned to 16 bytes */
} EcmfqStatus;

typedef enum EcmfqDtype { ECMFQ_FLOAT16 = 0, ECMFQ_BFLOAT16 = 1 } EcmfqDtype;

typedef enum EcmfqActivation { ECMFQ_SILU_GLU = 0 } EcmfqActivation; /* silu(gate) * up */

typedef enum EcmfqWeightLayout {
    ECMFQ_ROW_MAJOR = 0, /* canonical: [experts, rows, cols/2], low nibble = even column */
    ECMFQ_MMA_S8 = 1     /* prepacked for mma.sync.m16n8k32; ecmfq_export/quant/kernel_layout.py is its definition */
} EcmfqWeightLayout;

/* One routed MoE layer, y[t] = sum_j topk_weights[t,j] * FFN_{topk_ids[t,j]}(x[t]), int4 weights, int8 activations.
 *
 * All tensors are dense, row-major, 16-byte aligned device memory. T tokens, E experts, K = hidden_size, I = intermediate_size.
 * gate_up rows: 0..I-1 gate, I..2I-1 up (before prepacking). Signed nibbles in [-7, 7]; a nibble of -8 is accepted.
 * An id outside [0, E) contributes nothing (that is how a padded slot is written).
 *
 * Sizes: K and I multiples of 32 up to 65536, or with group_size 128 multiples of 128 up to 16384; E 1 to 1024; top_k 1 to 64;
 * num_tokens from 0 (no work), num_tokens * top_k up to 2^30. Both weight layouts have the same shapes.
 *
 * Activations are quantized per row with scale = max(absmax, 1e-30) / 127 and q = round_half_even(x / scale). A NaN or an infinity in a
 * token makes that token's output NaN (if any of its ids is valid) and changes no other token. Every result is a function of the inputs
 * alone: the same bits for both layouts, every num_tokens-dependent plan and every run.
 */
typedef struct EcmfqMoeParams {
    uint32_t abi_version; /* ECMFQ_ABI_VERSION */
    uint32_t struct_size; /* sizeof(EcmfqMoeParams) */
    int32_t num_tokens;
    int32_t num_experts;
    int32_t top_k;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t group_size;    /* -1: one scale per output channel; 128: plus int8 group multipliers in [1, 127] */
    int32_t activation;    /* EcmfqActivation */
    int32_t dtype;         /* EcmfqDtype of hidden_states and output */
    int32_t weight_layout; /* EcmfqWeightLayout */
    /* The device, filled by the caller so that planning needs no CUDA query. */
    int32_t compute_capability; /* 10 * major + minor, e.g. 87 */
    int32_t num_sms;
    int32_t max_smem_per_block; /* bytes, opt-in limit */
    const void* hidden_states;         /* [T, K] */
    const int32_t* topk_ids;           /* [T, top_k] */
    const float* topk_weights;         /* [T, top_k] */
    const int8_t* gate_up_qweight;     /* [E, 2I, K/2] */
    const float* gate_up_scale;        /* [E, 2I] */
    const int8_t* gate_up_multiplier;  /* [E, 2I, K/128], null when group_size is -1 */
    const int8_t* down_qweight;        /* [E, K, I/2] */
    const float* down_scale;           /* [E, K] */
    const int8_t* down_multiplier;     /* [E, K, I/128], null when group_size is -1 */
    void* output;                      /* [T, K] */
} EcmfqMoeParams;

ECMFQ_API uint32_t ecmfq_abi_version(void);

/* "ecmfq-build cuda=13000 ": what compiled the kernels (CUDART_VERSION), for readers of the file's bytes: a driver of an older major
 * version of CUDA loads none of them. */
ECMFQ_API extern const char ecmfq_build_info[];

ECMFQ_API const char* ecmfq_status_string(int32_t status);

/* Checks everything but the pointers. ECMFQ_OK, or the first error. */
ECMFQ_API int32_t ecmfq_routed_moe_check(const EcmfqMoeParams* params);

/* Bytes of workspace that ecmfq_routed_moe needs for these sizes (monotone in num_tokens); ECMFQ_OK or an error. */
ECMFQ_API int32_t ecmfq_routed_moe_workspace_size(const EcmfqMoeParams* params, size_t* bytes);

/* Launches on `stream` (a cudaStream_t). workspace: device memory, 256-byte aligned. */
ECMFQ_API int32_t ecmfq_routed_moe(const EcmfqMoeParams* params, void* workspace, size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* ECMFQ_H */
