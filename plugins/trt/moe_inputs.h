// moe_inputs.h - the tensors of an EcmfqRoutedMoE node: which there are, and what type and shape each must have.
#pragma once

#include "moe_config.h"

namespace ecmfq::trt {

enum MoeInput {
    kHiddenStates,
    kTopkIds,
    kTopkWeights,
    kGateUpQweight,
    kGateUpScale,
    kDownQweight,
    kDownScale,
    kGateUpMultiplier, // group_size 128 only
    kDownMultiplier,   // group_size 128 only
    kMaxInputs
};

const char* input_name(int input) noexcept;
int num_inputs(const MoeConfig& config) noexcept; // 7, or 9 with group multipliers

// Each returns false after one logged error that names node, input, value and allowed values.
bool check_count(const char* node, const MoeConfig& config, int32_t num_in, int32_t num_out) noexcept;
bool check_types(const char* node, const MoeConfig& config, const DataType* types) noexcept;
bool type_is_allowed(int input, DataType type) noexcept;
// dims[i] are the shapes of input i; an extent of -1 is unknown yet and fits.
bool check_shapes(const char* node, const MoeConfig& config, const Dims* const* dims) noexcept;

// Product of all extents but the last; -1 where one is unknown or the product does not fit an int32.
int64_t num_tokens(const Dims& hidden_states) noexcept;

} // namespace ecmfq::trt
