#include "routed_moe_plugin.h"

#include "logging.h"

#include <cstdio>
#include <cstring>
#include <new>

namespace ecmfq::trt {
namespace {

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = -1; // TensorRT reads any non-zero status as failure

EcmfqDtype to_ecmfq(DataType type) noexcept { return type == DataType::kBF16 ? ECMFQ_BFLOAT16 : ECMFQ_FLOAT16; }

} // namespace

RoutedMoePlugin::RoutedMoePlugin(const char* node, const MoeConfig& config) noexcept : config_(config) {
    std::snprintf(node_, sizeof node_, "%s", node == nullptr ? "" : node);
    std::snprintf(metadata_, sizeof metadata_,
                  "EcmfqRoutedMoE: num_experts %d, top_k %d, hidden_size %d, intermediate_size %d, group_size %d, %s, %s",
                  config.num_experts, config.top_k, config.hidden_size, config.intermediate_size, config.group_size,
                  activation_name(config.activation), weight_layout_name(config.weight_layout));
}

RoutedMoePlugin::RoutedMoePlugin(const RoutedMoePlugin& other) noexcept
    : IPluginV3(), IPluginV3OneCore(), IPluginV3OneBuild(), IPluginV3OneRuntime(), config_(other.config_),
      device_(other.device_) {
    std::memcpy(node_, other.node_, sizeof node_);
    std::memcpy(metadata_, other.metadata_, sizeof metadata_);
}

IPluginCapability* RoutedMoePlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* RoutedMoePlugin::clone() noexcept { return new (std::nothrow) RoutedMoePlugin(*this); }

EcmfqMoeParams RoutedMoePlugin::params_for(const DeviceFacts& device, DataType type, int64_t tokens) const noexcept {
    EcmfqMoeParams params{};
    params.abi_version = ECMFQ_ABI_VERSION;
    params.struct_size = sizeof params;
    params.num_tokens = static_cast<int32_t>(tokens);
    params.num_experts = config_.num_experts;
    params.top_k = config_.top_k;
    params.hidden_size = config_.hidden_size;
    params.intermediate_size = config_.intermediate_size;
    params.group_size = config_.group_size;
    params.activation = config_.activation;
    params.dtype = to_ecmfq(type);
    params.weight_layout = config_.weight_layout;
    params.compute_capability = device.compute_capability;
    params.num_sms = device.num_sms;
    params.max_smem_per_block = device.max_smem_per_block;
    return params;
}

int64_t RoutedMoePlugin::reserved_workspace(DataType type, int64_t tokens) const noexcept {
    size_t count = 0, most = 0;
    const DeviceFacts* devices = supported_devices(count);
    int32_t refusal = ECMFQ_OK;
    bool any = false;
    for (size_t i = 0; i < count; ++i) {
        const EcmfqMoeParams params = params_for(devices[i], type, tokens);
        size_t bytes = 0;
        int32_t status = ecmfq_routed_moe_check(&params);
        if (status == ECMFQ_OK) status = ecmfq_routed_moe_workspace_size(&params, &bytes);
        if (status == ECMFQ_OK) {
            any = true;
            most = bytes > most ? bytes : most;
        } else if (refusal == ECMFQ_OK) {
            refusal = status;
        }
    }
    if (any) return static_cast<int64_t>(most);
    log_message(Severity::kERROR,
                "%s node '%s': the kernels refuse num_tokens %lld, num_experts %d, top_k %d, hidden_size %d, "
                "intermediate_size %d, group_size %d, weight_layout '%s': %s",
                kPluginName, node_, static_cast<long long>(tokens), config_.num_experts, config_.top_k,
                config_.hidden_size, config_.intermediate_size, config_.group_size,
                weight_layout_name(config_.weight_layout), ecmfq_status_string(refusal));
    return -1;
}

int32_t RoutedMoePlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                         const DynamicPluginTensorDesc*, int32_t nbOutputs) noexcept {
    if (!check_count(node_, config_, nbInputs, nbOutputs)) return kFailed;
    DataType types[kMaxInputs];
    const Dims* general[kMaxInputs];
    const Dims* largest[kMaxInputs];
    for (int i = 0; i < nbInputs; ++i) {
        types[i] = in[i].desc.type;
        general[i] = &in[i].desc.dims;
        largest[i] = &in[i].max;
    }
    if (!check_types(node_, config_, types) || !check_shapes(node_, config_, general) ||
        !check_shapes(node_, config_, largest)) {
        return kFailed;
    }
    const int64_t tokens = num_tokens(in[kHiddenStates].max);
    if (tokens < 0) {
        log_message(Severity::kERROR, "%s node '%s': the profile's largest hidden_states has no finite number of tokens; "
                    "allowed: 0 to 2147483647", kPluginName, node_);
        return kFailed;
    }
    return reserved_workspace(types[kHiddenStates], tokens) < 0 ? kFailed : kOk;
}

int32_t RoutedMoePlugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                                            int32_t nbInputs) const noexcept {
    if (!check_count(node_, config_, nbInputs, nbOutputs) || !check_types(node_, config_, inputTypes)) return kFailed;
    outputTypes[0] = inputTypes[kHiddenStates];
    return kOk;
}

int32_t RoutedMoePlugin::getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs*, int32_t,
                                         DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept {
    if (!check_count(node_, config_, nbInputs, nbOutputs)) return kFailed;
    const int32_t rank = inputs[kHiddenStates].nbDims;
    static constexpr int32_t kRanks[kMaxInputs] = {0, 0, 0, 3, 2, 3, 2, 3, 3}; // 0: as hidden_states
    for (int i = 0; i < nbInputs; ++i) {
        const int32_t wanted = kRanks[i] == 0 ? rank : kRanks[i];
        if (inputs[i].nbDims == wanted && wanted >= 1) continue;
        log_message(Severity::kERROR, "%s node '%s': input %d '%s' has rank %d; allowed: %d", kPluginName, node_, i,
                    input_name(i), inputs[i].nbDims, wanted);
        return kFailed;
    }
    outputs[0] = inputs[kHiddenStates];
    return kOk;
}

bool RoutedMoePlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                                int32_t nbOutputs) noexcept {
    if (nbInputs != num_inputs(config_) || nbOutputs != 1 || pos < 0 || pos > nbInputs) return false;
    const PluginTensorDesc& desc = inOut[pos].desc;
    if (desc.format != TensorFormat::kLINEAR) return false;
    if (pos == nbInputs) return desc.type == inOut[kHiddenStates].desc.type;
    return type_is_allowed(pos, desc.type);
}

size_t RoutedMoePlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                         const DynamicPluginTensorDesc*, int32_t) const noexcept {
    if (nbInputs <= kHiddenStates) return 0;
    const int64_t bytes = reserved_workspace(in[kHiddenStates].desc.type, num_tokens(in[kHiddenStates].max));
    return bytes < 0 ? 0 : static_cast<size_t>(bytes); // configurePlugin has already refused what is negative here
}

int32_t RoutedMoePlugin::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc*,
                                       int32_t nbOutputs) noexcept {
    if (!check_count(node_, config_, nbInputs, nbOutputs)) return kFailed;
    DataType types[kMaxInputs];
    const Dims* dims[kMaxInputs];
    for (int i = 0; i < nbInputs; ++i) {
        types[i] = in[i].type;
        dims[i] = &in[i].dims;
    }
    if (!check_types(node_, config_, types) || !check_shapes(node_, config_, dims)) return kFailed;
    // A builder without a GPU may call this too: the device is asked for here and missed only by enqueue.
    if (device_.compute_capability == 0) device_ = query_current_device();
    return kOk;
}

int32_t RoutedMoePlugin::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc*, const void* const* inputs,
                                 void* const* outputs, void* workspace, void* stream) noexcept {
    const DataType type = inputDesc[kHiddenStates].type;
    const int64_t tokens = num_tokens(inputDesc[kHiddenStates].dims);
    if (tokens == 0) return kOk; // nothing to write
    if (tokens < 0 || device_.compute_capability == 0) {
        log_message(Severity::kERROR, "%s node '%s': %s", kPluginName, node_,
                    tokens < 0 ? "the shape of hidden_states is not known" : "no CUDA device in this context");
        return kFailed;
    }
    const int64_t reserved = reserved_workspace(type, tokens);
    if (reserved < 0) return kFailed;

    EcmfqMoeParams params = params_for(device_, type, tokens);
    params.hidden_states = inputs[kHiddenStates];
    params.topk_ids = static_cast<const int32_t*>(inputs[kTopkIds]);
    params.topk_weights = static_cast<const float*>(inputs[kTopkWeights]);
    params.gate_up_qweight = static_cast<const int8_t*>(inputs[kGateUpQweight]);
    params.gate_up_scale = static_cast<const float*>(inputs[kGateUpScale]);
    params.down_qweight = static_cast<const int8_t*>(inputs[kDownQweight]);
    params.down_scale = static_cast<const float*>(inputs[kDownScale]);
    if (config_.group_size > 0) {
        params.gate_up_multiplier = static_cast<const int8_t*>(inputs[kGateUpMultiplier]);
        params.down_multiplier = static_cast<const int8_t*>(inputs[kDownMultiplier]);
    }
    params.output = outputs[0];
    // The builder reserved at least this much: the same figure for the profile's largest number of tokens.
    const int32_t status = ecmfq_routed_moe(&params, workspace, static_cast<size_t>(reserved), stream);
    if (status == ECMFQ_OK) return kOk;
    log_message(Severity::kERROR, "%s node '%s': %s (num_tokens %lld, compute capability %d, workspace %lld bytes)",
                kPluginName, node_, ecmfq_status_string(status), static_cast<long long>(tokens),
                device_.compute_capability, static_cast<long long>(reserved));
    return kFailed;
}

IPluginV3* RoutedMoePlugin::attachToContext(IPluginResourceContext*) noexcept {
    auto* attached = new (std::nothrow) RoutedMoePlugin(*this);
    if (attached != nullptr) attached->device_ = query_current_device();
    return attached;
}

const PluginFieldCollection* RoutedMoePlugin::getFieldsToSerialize() noexcept { return serialized_.write(config_); }

IPluginV3* RoutedMoeCreator::createPlugin(const char* name, const PluginFieldCollection* fc,
                                          TensorRTPhase phase) noexcept {
    const char* node = name == nullptr ? "" : name;
    MoeConfig config{};
    const bool read = phase == TensorRTPhase::kRUNTIME ? read_serialized_fields(node, fc, config)
                                                       : read_onnx_fields(node, fc, config);
    return read ? new (std::nothrow) RoutedMoePlugin(node, config) : nullptr;
}

} // namespace ecmfq::trt
