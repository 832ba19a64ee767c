// moe_config.h - the attributes of an EcmfqRoutedMoE node: reading them from ONNX, writing them into an engine, reading them
// back from one.
//
// In an ONNX node the two enumerations are strings. In an engine everything is an int32, the enumerations as their C ABI
// numbers, plus a checksum: then no byte of an engine is ever read through a length that the engine itself claims.
#pragma once

#include "trt_abi.h"

namespace ecmfq::trt {

inline constexpr char kPluginName[] = "EcmfqRoutedMoE";
inline constexpr char kPluginVersion[] = "1";
inline constexpr char kPluginNamespace[] = "";

struct MoeConfig {
    int32_t num_experts;
    int32_t top_k;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t group_size;    // -1 or 128
    int32_t activation;    // EcmfqActivation
    int32_t weight_layout; // EcmfqWeightLayout
};

// The sizes that the attributes may take. Int32 products of them in the kernels stay below 2^31.
inline constexpr int32_t kMaxExperts = 4096;
inline constexpr int32_t kMaxTopK = 64;
inline constexpr int32_t kMaxWidth = 65536; // hidden_size and intermediate_size

const char* activation_name(int32_t activation) noexcept;
const char* weight_layout_name(int32_t weight_layout) noexcept;

// What the ONNX parser looks for in the node, and nothing else.
const PluginFieldCollection* onnx_field_names() noexcept;

// Both return false after one logged error that names node, field, value and allowed values. `config` is written only on
// success. A null collection, null names, null data and unknown fields are errors, never crashes.
bool read_onnx_fields(const char* node, const PluginFieldCollection* fields, MoeConfig& config) noexcept;
bool read_serialized_fields(const char* node, const PluginFieldCollection* fields, MoeConfig& config) noexcept;

// The fields of an engine, with their own storage. Not copyable: the fields point into it.
class SerializedFields {
public:
    SerializedFields() noexcept = default;
    SerializedFields(const SerializedFields&) = delete;
    SerializedFields& operator=(const SerializedFields&) = delete;
    const PluginFieldCollection* write(const MoeConfig& config) noexcept;
    static constexpr int kCount = 9;

private:
    int32_t values_[kCount] = {};
    PluginField fields_[kCount] = {};
    PluginFieldCollection collection_ = {};
};

} // namespace ecmfq::trt
