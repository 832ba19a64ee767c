// abi_conformance.cpp - trt_abi.h against the SDK's own headers: sizes, offsets and enumerators when it compiles, slots of the
// virtual tables when it runs. Built only where NvInferRuntime.h is found.

#include <NvInferRuntime.h>

#include "trt_abi.h"

#include <cstdio>
#include <cstring>

namespace ours = ecmfq::trt;
namespace theirs = nvinfer1;

#define SAME_SIZE(type) static_assert(sizeof(ours::type) == sizeof(theirs::type), #type)
#define SAME_FIELD(type, field) static_assert(offsetof(ours::type, field) == offsetof(theirs::type, field), #type "." #field)
#define SAME_VALUE(type, value) \
    static_assert(static_cast<int>(ours::type::value) == static_cast<int>(theirs::type::value), #type "::" #value)

SAME_SIZE(Dims);
SAME_FIELD(Dims, nbDims);
SAME_FIELD(Dims, d);
static_assert(ours::Dims::kMaxDims == theirs::Dims::MAX_DIMS);
SAME_SIZE(PluginTensorDesc);
SAME_FIELD(PluginTensorDesc, dims);
SAME_FIELD(PluginTensorDesc, type);
SAME_FIELD(PluginTensorDesc, format);
SAME_FIELD(PluginTensorDesc, scale);
SAME_SIZE(DynamicPluginTensorDesc);
SAME_FIELD(DynamicPluginTensorDesc, desc);
SAME_FIELD(DynamicPluginTensorDesc, min);
SAME_FIELD(DynamicPluginTensorDesc, max);
SAME_FIELD(DynamicPluginTensorDesc, opt);
SAME_SIZE(PluginField);
SAME_FIELD(PluginField, name);
SAME_FIELD(PluginField, data);
SAME_FIELD(PluginField, type);
SAME_FIELD(PluginField, length);
SAME_SIZE(PluginFieldCollection);
SAME_FIELD(PluginFieldCollection, nbFields);
SAME_FIELD(PluginFieldCollection, fields);
SAME_SIZE(InterfaceInfo);
SAME_FIELD(InterfaceInfo, kind);
SAME_FIELD(InterfaceInfo, major);
SAME_FIELD(InterfaceInfo, minor);
SAME_SIZE(DimsExprs);
SAME_FIELD(DimsExprs, nbDims);
SAME_FIELD(DimsExprs, d);

SAME_VALUE(DataType, kFLOAT);
SAME_VALUE(DataType, kHALF);
SAME_VALUE(DataType, kINT8);
SAME_VALUE(DataType, kINT32);
SAME_VALUE(DataType, kBOOL);
SAME_VALUE(DataType, kUINT8);
SAME_VALUE(DataType, kFP8);
SAME_VALUE(DataType, kBF16);
SAME_VALUE(DataType, kINT64);
SAME_VALUE(DataType, kINT4);
SAME_VALUE(TensorFormat, kLINEAR);
SAME_VALUE(PluginFieldType, kFLOAT32);
SAME_VALUE(PluginFieldType, kINT8);
SAME_VALUE(PluginFieldType, kINT32);
SAME_VALUE(PluginFieldType, kCHAR);
SAME_VALUE(PluginFieldType, kUNKNOWN);
SAME_VALUE(PluginFieldType, kINT64);
SAME_VALUE(TensorRTPhase, kBUILD);
SAME_VALUE(TensorRTPhase, kRUNTIME);
SAME_VALUE(PluginCapabilityType, kCORE);
SAME_VALUE(PluginCapabilityType, kBUILD);
SAME_VALUE(PluginCapabilityType, kRUNTIME);
SAME_VALUE(APILanguage, kCPP);

namespace {

int g_compared = 0;
int g_wrong = 0;

// In the Itanium C++ ABI a pointer to a virtual function is 1 + its byte offset in the virtual table, then an adjustment.
template <typename Function>
std::ptrdiff_t slot(Function function) {
    std::ptrdiff_t words[2];
    static_assert(sizeof function == sizeof words);
    std::memcpy(words, &function, sizeof words);
    return (words[0] - 1) / static_cast<std::ptrdiff_t>(sizeof(void*));
}

void compare(const char* what, std::ptrdiff_t our_slot, std::ptrdiff_t their_slot) {
    ++g_compared;
    if (our_slot == their_slot) return;
    ++g_wrong;
    std::fprintf(stderr, "%s: slot %td here, %td in NvInfer.h\n", what, our_slot, their_slot);
}

#define SAME_SLOT(type, function) compare(#type "::" #function, slot(&ours::type::function), slot(&theirs::type::function))

} // namespace

int main() {
    SAME_SLOT(IPluginV3, getAPILanguage);
    SAME_SLOT(IPluginV3, getInterfaceInfo);
    SAME_SLOT(IPluginV3, getCapabilityInterface);
    SAME_SLOT(IPluginV3, clone);
    SAME_SLOT(IPluginV3OneCore, getPluginName);
    SAME_SLOT(IPluginV3OneCore, getPluginVersion);
    SAME_SLOT(IPluginV3OneCore, getPluginNamespace);
    SAME_SLOT(IPluginV3OneBuild, configurePlugin);
    SAME_SLOT(IPluginV3OneBuild, getOutputDataTypes);
    SAME_SLOT(IPluginV3OneBuild, getOutputShapes);
    SAME_SLOT(IPluginV3OneBuild, supportsFormatCombination);
    SAME_SLOT(IPluginV3OneBuild, getNbOutputs);
    SAME_SLOT(IPluginV3OneBuild, getWorkspaceSize);
    SAME_SLOT(IPluginV3OneBuild, getValidTactics);
    SAME_SLOT(IPluginV3OneBuild, getNbTactics);
    SAME_SLOT(IPluginV3OneBuild, getTimingCacheID);
    SAME_SLOT(IPluginV3OneBuild, getFormatCombinationLimit);
    SAME_SLOT(IPluginV3OneBuild, getMetadataString);
    SAME_SLOT(IPluginV3OneRuntime, setTactic);
    SAME_SLOT(IPluginV3OneRuntime, onShapeChange);
    SAME_SLOT(IPluginV3OneRuntime, enqueue);
    SAME_SLOT(IPluginV3OneRuntime, attachToContext);
    SAME_SLOT(IPluginV3OneRuntime, getFieldsToSerialize);
    SAME_SLOT(IPluginCreatorV3One, createPlugin);
    SAME_SLOT(IPluginCreatorV3One, getFieldNames);
    SAME_SLOT(IPluginCreatorV3One, getPluginName);
    SAME_SLOT(IPluginCreatorV3One, getPluginVersion);
    SAME_SLOT(IPluginCreatorV3One, getPluginNamespace);
#if NV_TENSORRT_MAJOR >= 11
    compare("IPluginV3OneBuild::getAliasedInput", slot(&ours::IPluginV3OneBuild::getAliasedInput),
            slot(&theirs::v_2_0::IPluginV3OneBuild::getAliasedInput));
    compare("ILogger::log", slot(&ours::LoggerV11::log), slot(&theirs::ILogger::log));
    compare("ILoggerFinder::findLogger", slot(&ours::LoggerFinderV11::findLogger), slot(&theirs::ILoggerFinder::findLogger));
#else
    compare("ILogger::log", slot(&ours::LoggerV10::log), slot(&theirs::ILogger::log));
    compare("ILoggerFinder::findLogger", slot(&ours::LoggerFinderV10::findLogger), slot(&theirs::ILoggerFinder::findLogger));
#endif
    std::printf("%d virtual functions compared with TensorRT %d.%d, %d wrong\n", g_compared, NV_TENSORRT_MAJOR,
                NV_TENSORRT_MINOR, g_wrong);
    return g_wrong == 0 ? 0 : 1;
}
