// routed_moe_plugin.h - EcmfqRoutedMoE as a TensorRT V3 plugin, and its creator.
//
// The operator itself (inputs, attributes, meaning) is defined in ecmfq_export/graph/ops.py; the kernels are behind
// plugins/capi/ecmfq.h. This class holds sizes only: every tensor, weights included, is an input of the node.
#pragma once

#include "device_facts.h"
#include "moe_inputs.h"

#include "../capi/ecmfq.h"

namespace ecmfq::trt {

class RoutedMoePlugin final : public IPluginV3,
                              public IPluginV3OneCore,
                              public IPluginV3OneBuild,
                              public IPluginV3OneRuntime {
public:
    RoutedMoePlugin(const char* node, const MoeConfig& config) noexcept;

    const MoeConfig& config() const noexcept { return config_; }

    // IPluginV3. getInterfaceInfo must stay as each base has it: one override here would answer for all four, and
    // TensorRT refuses a core interface that calls itself "PLUGIN".
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override;
    IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // IPluginV3OneBuild
    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs, const DynamicPluginTensorDesc* out,
                            int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                               int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs* shapeInputs,
                            int32_t nbShapeInputs, DimsExprs* outputs, int32_t nbOutputs,
                            IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override { return 1; }
    size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t nbInputs, const DynamicPluginTensorDesc* out,
                            int32_t nbOutputs) const noexcept override;
    const char* getTimingCacheID() noexcept override { return nullptr; } // no tactics to time
    const char* getMetadataString() noexcept override { return metadata_; }

    // IPluginV3OneRuntime
    int32_t onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept override;
    int32_t enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc, const void* const* inputs,
                    void* const* outputs, void* workspace, void* stream) noexcept override;
    IPluginV3* attachToContext(IPluginResourceContext* context) noexcept override;
    const PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    RoutedMoePlugin(const RoutedMoePlugin& other) noexcept;

    EcmfqMoeParams params_for(const DeviceFacts& device, DataType type, int64_t tokens) const noexcept;
    // The most workspace that any supported device needs for `tokens` rows; -1 after a logged error.
    int64_t reserved_workspace(DataType type, int64_t tokens) const noexcept;

    MoeConfig config_;
    DeviceFacts device_ = {0, 0, 0}; // of the attached context
    char node_[192];
    char metadata_[512];
    SerializedFields serialized_;
};

class RoutedMoeCreator final : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fc, TensorRTPhase phase) noexcept override;
    const PluginFieldCollection* getFieldNames() noexcept override { return onnx_field_names(); }
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

} // namespace ecmfq::trt
