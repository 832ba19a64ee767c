#include "moe_inputs.h"

#include "logging.h"

#include <cstdio>

namespace ecmfq::trt {
namespace {

struct InputRule {
    const char* name;
    const char* types;
    const char* shape;
};
constexpr InputRule kRules[kMaxInputs] = {
    {"hidden_states", "float16, bfloat16", "[..., hidden_size]"},
    {"topk_ids", "int32", "[..., top_k], leading extents as hidden_states"},
    {"topk_weights", "float32", "[..., top_k], leading extents as hidden_states"},
    {"gate_up_qweight", "int8", "[num_experts, 2 * intermediate_size, hidden_size / 2]"},
    {"gate_up_scale", "float32", "[num_experts, 2 * intermediate_size]"},
    {"down_qweight", "int8", "[num_experts, hidden_size, intermediate_size / 2]"},
    {"down_scale", "float32", "[num_experts, hidden_size]"},
    {"gate_up_multiplier", "int8", "[num_experts, 2 * intermediate_size, hidden_size / 128]"},
    {"down_multiplier", "int8", "[num_experts, hidden_size, intermediate_size / 128]"},
};

const char* type_name(DataType type) noexcept {
    static constexpr const char* kNames[] = {"float32", "float16", "int8",  "int32", "bool", "uint8",
                                             "float8",  "bfloat16", "int64", "int4",  "float4"};
    const auto index = static_cast<size_t>(type);
    return index < sizeof kNames / sizeof kNames[0] ? kNames[index] : "an unknown type";
}

void print_shape(const Dims& dims, char* text, size_t size) noexcept {
    size_t used = static_cast<size_t>(std::snprintf(text, size, "["));
    const int rank = dims.nbDims > Dims::kMaxDims ? Dims::kMaxDims : dims.nbDims;
    for (int i = 0; i < rank && used < size; ++i) {
        const int wrote = std::snprintf(text + used, size - used, i ? ", %lld" : "%lld", static_cast<long long>(dims.d[i]));
        if (wrote > 0) used += static_cast<size_t>(wrote);
    }
    if (used < size) std::snprintf(text + used, size - used, "]");
}

bool fits(int64_t seen, int64_t wanted) noexcept { return seen == wanted || seen == -1 || wanted == -1; }

bool same_leading(const Dims& hidden, const Dims& dims) noexcept {
    if (dims.nbDims != hidden.nbDims) return false;
    for (int i = 0; i + 1 < dims.nbDims; ++i) {
        if (!fits(dims.d[i], hidden.d[i])) return false;
    }
    return true;
}

bool has_shape(const Dims& dims, int rank, int64_t a, int64_t b, int64_t c) noexcept {
    return dims.nbDims == rank && fits(dims.d[0], a) && fits(dims.d[1], b) && (rank < 3 || fits(dims.d[2], c));
}

bool shape_is_allowed(const MoeConfig& c, int input, const Dims& dims, const Dims& hidden) noexcept {
    const int64_t experts = c.num_experts, width = c.hidden_size, inner = c.intermediate_size;
    switch (input) {
    case kHiddenStates: return dims.nbDims >= 1 && dims.nbDims <= Dims::kMaxDims && fits(dims.d[dims.nbDims - 1], width);
    case kTopkIds:
    case kTopkWeights: return same_leading(hidden, dims) && fits(dims.d[dims.nbDims - 1], c.top_k);
    case kGateUpQweight: return has_shape(dims, 3, experts, 2 * inner, width / 2);
    case kGateUpScale: return has_shape(dims, 2, experts, 2 * inner, 0);
    case kDownQweight: return has_shape(dims, 3, experts, width, inner / 2);
    case kDownScale: return has_shape(dims, 2, experts, width, 0);
    case kGateUpMultiplier: return has_shape(dims, 3, experts, 2 * inner, width / 128);
    case kDownMultiplier: return has_shape(dims, 3, experts, width, inner / 128);
    default: return false;
    }
}

} // namespace

const char* input_name(int input) noexcept { return input >= 0 && input < kMaxInputs ? kRules[input].name : "output"; }

int num_inputs(const MoeConfig& config) noexcept { return config.group_size > 0 ? kMaxInputs : kGateUpMultiplier; }

bool check_count(const char* node, const MoeConfig& config, int32_t num_in, int32_t num_out) noexcept {
    if (num_in == num_inputs(config) && num_out == 1) return true;
    log_message(Severity::kERROR, "%s node '%s': %d inputs and %d outputs; allowed: %d inputs with group_size %d, 1 output",
                kPluginName, node, num_in, num_out, num_inputs(config), config.group_size);
    return false;
}

bool type_is_allowed(int input, DataType type) noexcept {
    switch (input) {
    case kHiddenStates: return type == DataType::kHALF || type == DataType::kBF16;
    case kTopkIds: return type == DataType::kINT32;
    case kTopkWeights:
    case kGateUpScale:
    case kDownScale: return type == DataType::kFLOAT;
    default: return type == DataType::kINT8;
    }
}

bool check_types(const char* node, const MoeConfig& config, const DataType* types) noexcept {
    for (int i = 0; i < num_inputs(config); ++i) {
        if (type_is_allowed(i, types[i])) continue;
        log_message(Severity::kERROR, "%s node '%s': input %d '%s' has type %s; allowed: %s", kPluginName, node, i,
                    kRules[i].name, type_name(types[i]), kRules[i].types);
        return false;
    }
    return true;
}

bool check_shapes(const char* node, const MoeConfig& config, const Dims* const* dims) noexcept {
    for (int i = 0; i < num_inputs(config); ++i) {
        if (shape_is_allowed(config, i, *dims[i], *dims[kHiddenStates])) continue;
        char shape[192];
        print_shape(*dims[i], shape, sizeof shape);
        log_message(Severity::kERROR,
                    "%s node '%s': input %d '%s' has shape %s; allowed: %s with num_experts %d, top_k %d, hidden_size %d, "
                    "intermediate_size %d",
                    kPluginName, node, i, kRules[i].name, shape, kRules[i].shape, config.num_experts, config.top_k,
                    config.hidden_size, config.intermediate_size);
        return false;
    }
    return true;
}

int64_t num_tokens(const Dims& hidden_states) noexcept {
    int64_t tokens = 1;
    for (int i = 0; i + 1 < hidden_states.nbDims; ++i) {
        if (hidden_states.d[i] < 0 || hidden_states.d[i] > INT32_MAX) return -1;
        tokens *= hidden_states.d[i]; // at most 2^62 before the test below
        if (tokens > INT32_MAX) return -1;
    }
    return tokens;
}

} // namespace ecmfq::trt
