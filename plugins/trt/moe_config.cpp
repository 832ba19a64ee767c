#include "moe_config.h"

#include "../capi/ecmfq.h"
#include "logging.h"

#include <cstring>

namespace ecmfq::trt {
namespace {

// The order of the int32 values in an engine.
enum Index { kAbi, kExperts, kTopK, kHidden, kIntermediate, kGroup, kActivation, kLayout, kChecksum };
constexpr const char* kNames[SerializedFields::kCount] = {"abi_version", "num_experts", "top_k", "hidden_size",
                                                          "intermediate_size", "group_size", "activation",
                                                          "weight_layout", "checksum"};
constexpr const char* kActivations[] = {"silu_glu"};
constexpr const char* kLayouts[] = {"row_major", "mma_s8"};
constexpr int kMaxString = 32; // longer than every allowed string

// FNV-1a over the values: an engine whose fields were damaged is refused, not run with other sizes.
int32_t checksum(const int32_t* values) noexcept {
    uint32_t hash = 2166136261u;
    for (int i = 0; i < kChecksum; ++i) {
        for (int byte = 0; byte < 4; ++byte) {
            hash ^= (static_cast<uint32_t>(values[i]) >> (8 * byte)) & 0xffu;
            hash *= 16777619u;
        }
    }
    return static_cast<int32_t>(hash);
}

void refuse(const char* node, const char* field, const char* seen, const char* allowed) noexcept {
    log_message(Severity::kERROR, "%s node '%s': attribute '%s' is %s; allowed: %s", kPluginName, node, field, seen,
                allowed);
}

bool in_range(const char* node, const char* field, int32_t value, int32_t low, int32_t high) noexcept {
    if (value >= low && value <= high) return true;
    log_message(Severity::kERROR, "%s node '%s': attribute '%s' is %d; allowed: %d to %d", kPluginName, node, field, value,
                low, high);
    return false;
}

bool is_even(const char* node, const char* field, int32_t value, int32_t multiple) noexcept {
    if (value % multiple == 0) return true;
    log_message(Severity::kERROR, "%s node '%s': attribute '%s' is %d; allowed: multiples of %d", kPluginName, node, field,
                value, multiple);
    return false;
}

bool check_values(const char* node, const int32_t* v) noexcept {
    if (static_cast<uint32_t>(v[kAbi]) != ECMFQ_ABI_VERSION) {
        log_message(Severity::kERROR,
                    "%s node '%s': attribute 'abi_version' is %d; allowed: %u (export the model and build the plugin "
                    "library with the same version of ecmfq-export)",
                    kPluginName, node, v[kAbi], ECMFQ_ABI_VERSION);
        return false;
    }
    if (v[kGroup] != -1 && v[kGroup] != 128) {
        log_message(Severity::kERROR, "%s node '%s': attribute 'group_size' is %d; allowed: -1, 128", kPluginName, node,
                    v[kGroup]);
        return false;
    }
    const int32_t multiple = v[kGroup] == 128 ? 128 : 2; // two int4 values share a byte
    return in_range(node, "num_experts", v[kExperts], 1, kMaxExperts) &&
           in_range(node, "top_k", v[kTopK], 1, v[kExperts] < kMaxTopK ? v[kExperts] : kMaxTopK) &&
           in_range(node, "hidden_size", v[kHidden], 2, kMaxWidth) &&
           in_range(node, "intermediate_size", v[kIntermediate], 2, kMaxWidth) &&
           is_even(node, "hidden_size", v[kHidden], multiple) &&
           is_even(node, "intermediate_size", v[kIntermediate], multiple) &&
           in_range(node, "activation", v[kActivation], 0, 0) && in_range(node, "weight_layout", v[kLayout], 0, 1);
}

MoeConfig to_config(const int32_t* v) noexcept {
    return {v[kExperts], v[kTopK], v[kHidden], v[kIntermediate], v[kGroup], v[kActivation], v[kLayout]};
}

int index_of(const char* name) noexcept {
    for (int i = 0; i < SerializedFields::kCount; ++i) {
        if (std::strcmp(name, kNames[i]) == 0) return i;
    }
    return -1;
}

// `length` is not read: the ONNX parser leaves it at 0 or 1 for scalars. An engine holds int32 alone, as it was written.
bool read_int(const PluginField& field, bool from_engine, int32_t& value) noexcept {
    if (field.data == nullptr) return false;
    if (field.type == PluginFieldType::kINT32) {
        std::memcpy(&value, field.data, sizeof value);
        return true;
    }
    if (field.type == PluginFieldType::kINT64 && !from_engine) {
        int64_t wide = 0;
        std::memcpy(&wide, field.data, sizeof wide);
        value = static_cast<int32_t>(wide);
        return value == wide;
    }
    return false;
}

template <size_t N>
bool read_enum(const char* node, const PluginField& field, const char* const (&allowed)[N], const char* allowed_text,
               int32_t& value) noexcept {
    if (field.data == nullptr || field.type != PluginFieldType::kCHAR || field.length < 0) {
        refuse(node, field.name, "not a string", allowed_text);
        return false;
    }
    // The parser's strings come with or without their NUL.
    char text[kMaxString + 1] = {};
    const size_t limit = field.length < kMaxString ? static_cast<size_t>(field.length) : kMaxString;
    std::memcpy(text, field.data, strnlen(static_cast<const char*>(field.data), limit));
    for (size_t i = 0; i < N; ++i) {
        if (std::strcmp(text, allowed[i]) == 0) {
            value = static_cast<int32_t>(i);
            return true;
        }
    }
    char quoted[kMaxString + 3];
    quoted[0] = '\'';
    const size_t size = std::strlen(text);
    std::memcpy(quoted + 1, text, size);
    quoted[size + 1] = '\'';
    quoted[size + 2] = '\0';
    refuse(node, field.name, quoted, allowed_text);
    return false;
}

// Fills `values` and checks that each of the first `wanted` names occurs exactly once.
bool read_fields(const char* node, const PluginFieldCollection* fields, bool from_engine, int wanted,
                 int32_t* values) noexcept {
    if (fields == nullptr || fields->nbFields < 0 || fields->nbFields > 64 ||
        (fields->nbFields > 0 && fields->fields == nullptr)) {
        log_message(Severity::kERROR, "%s node '%s': no valid collection of attributes", kPluginName, node);
        return false;
    }
    bool seen[SerializedFields::kCount] = {};
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        const int index = field.name == nullptr ? -1 : index_of(field.name);
        if (index < 0 || index >= wanted || seen[index]) {
            log_message(Severity::kERROR, "%s node '%s': %s attribute '%.64s'", kPluginName, node,
                        index < 0 || index >= wanted ? "unknown" : "repeated", field.name ? field.name : "(null)");
            return false;
        }
        seen[index] = true;
        if (!from_engine && index == kActivation) {
            if (!read_enum(node, field, kActivations, "'silu_glu'", values[index])) return false;
        } else if (!from_engine && index == kLayout) {
            if (!read_enum(node, field, kLayouts, "'row_major', 'mma_s8'", values[index])) return false;
        } else if (!read_int(field, from_engine, values[index])) {
            refuse(node, kNames[index], "not a 32-bit integer", "one integer");
            return false;
        }
    }
    for (int i = 0; i < wanted; ++i) {
        if (!seen[i]) {
            log_message(Severity::kERROR, "%s node '%s': attribute '%s' is missing", kPluginName, node, kNames[i]);
            return false;
        }
    }
    return true;
}

} // namespace

const char* activation_name(int32_t activation) noexcept {
    return activation == ECMFQ_SILU_GLU ? kActivations[0] : "unknown";
}

const char* weight_layout_name(int32_t weight_layout) noexcept {
    return weight_layout == ECMFQ_ROW_MAJOR || weight_layout == ECMFQ_MMA_S8 ? kLayouts[weight_layout] : "unknown";
}

const PluginFieldCollection* onnx_field_names() noexcept {
    static const PluginField fields[kChecksum] = {
        {kNames[kAbi], nullptr, PluginFieldType::kINT32, 1},
        {kNames[kExperts], nullptr, PluginFieldType::kINT32, 1},
        {kNames[kTopK], nullptr, PluginFieldType::kINT32, 1},
        {kNames[kHidden], nullptr, PluginFieldType::kINT32, 1},
        {kNames[kIntermediate], nullptr, PluginFieldType::kINT32, 1},
        {kNames[kGroup], nullptr, PluginFieldType::kINT32, 1},
        {kNames[kActivation], nullptr, PluginFieldType::kCHAR, 1},
        {kNames[kLayout], nullptr, PluginFieldType::kCHAR, 1},
    };
    static const PluginFieldCollection collection = {kChecksum, fields};
    return &collection;
}

bool read_onnx_fields(const char* node, const PluginFieldCollection* fields, MoeConfig& config) noexcept {
    int32_t values[SerializedFields::kCount] = {};
    if (!read_fields(node, fields, false, kChecksum, values) || !check_values(node, values)) return false;
    config = to_config(values);
    return true;
}

bool read_serialized_fields(const char* node, const PluginFieldCollection* fields, MoeConfig& config) noexcept {
    int32_t values[SerializedFields::kCount] = {};
    if (!read_fields(node, fields, true, SerializedFields::kCount, values)) return false;
    if (values[kChecksum] != checksum(values)) {
        log_message(Severity::kERROR, "%s node '%s': the engine's fields are damaged (checksum %08x, expected %08x); build "
                    "the engine again", kPluginName, node, static_cast<unsigned>(values[kChecksum]),
                    static_cast<unsigned>(checksum(values)));
        return false;
    }
    if (!check_values(node, values)) return false;
    config = to_config(values);
    return true;
}

const PluginFieldCollection* SerializedFields::write(const MoeConfig& config) noexcept {
    values_[kAbi] = static_cast<int32_t>(ECMFQ_ABI_VERSION);
    values_[kExperts] = config.num_experts;
    values_[kTopK] = config.top_k;
    values_[kHidden] = config.hidden_size;
    values_[kIntermediate] = config.intermediate_size;
    values_[kGroup] = config.group_size;
    values_[kActivation] = config.activation;
    values_[kLayout] = config.weight_layout;
    values_[kChecksum] = checksum(values_);
    for (int i = 0; i < kCount; ++i) fields_[i] = {kNames[i], &values_[i], PluginFieldType::kINT32, 1};
    collection_ = {kCount, fields_};
    return &collection_;
}

} // namespace ecmfq::trt
