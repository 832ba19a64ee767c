// trt_abi.h - the part of TensorRT's binary interface that a V3 plugin touches, declared by us.
//
// No package registry carries the TensorRT C++ headers, and a user who runs `pip install .` has none. The interface of an
// IPluginV3 is small and has not moved from TensorRT 10.3 to 11.4, TensorRT-RTX 1.7 among them, so it is written down here from
// NVIDIA's API documentation. What matters is layout only: the order of virtual functions, of fields and of enumerators.
// static_asserts hold the sizes and offsets; where the SDK's NvInfer.h is found, CMake also builds and runs
// abi_conformance.cpp, which compares every size, offset, enumerator and virtual-table slot with the real thing.
//
// Compiled with -fno-rtti: the library's own type information is never looked at, and TensorRT's is not linked.
//
// Not identical across versions, and therefore kept out of the plugin: IPluginRegistry (slots moved: export getCreators, never
// register yourself), IDimensionExpr and IExprBuilder (opaque here: the output's shape is a copy of an input's), and
// ILogger/ILoggerFinder, which gained a versioned base class in 11.0 (see logging.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace ecmfq::trt {

enum class DataType : int32_t {
    kFLOAT = 0,
    kHALF = 1,
    kINT8 = 2,
    kINT32 = 3,
    kBOOL = 4,
    kUINT8 = 5,
    kFP8 = 6,
    kBF16 = 7,
    kINT64 = 8,
    kINT4 = 9,
    kFP4 = 10
};

enum class TensorFormat : int32_t { kLINEAR = 0 };  // the vectorized formats are never accepted

enum class PluginFieldType : int32_t {
    kFLOAT16 = 0,
    kFLOAT32 = 1,
    kFLOAT64 = 2,
    kINT8 = 3,
    kINT16 = 4,
    kINT32 = 5,
    kCHAR = 6,
    kDIMS = 7,
    kUNKNOWN = 8,
    kBF16 = 9,
    kINT64 = 10
};

enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class APILanguage : int32_t { kCPP = 0 };
enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };

struct Dims {
    static constexpr int32_t kMaxDims = 8;
    int32_t nbDims;      // -1 where the rank is unknown
    int64_t d[kMaxDims]; // -1 where the extent is dynamic
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min;
    Dims max;
    Dims opt;
};

struct PluginField {
    const char* name;
    const void* data;
    PluginFieldType type;
    int32_t length; // number of elements; not reliable for scalars that come from the ONNX parser
};

struct PluginFieldCollection {
    int32_t nbFields;
    const PluginField* fields;
};

struct InterfaceInfo {
    const char* kind;
    int32_t major;
    int32_t minor;
};

// Opaque: only pointers to them pass through the plugin.
class IDimensionExpr;
class IExprBuilder;
class IPluginResourceContext;

struct DimsExprs {
    int32_t nbDims;
    const IDimensionExpr* d[Dims::kMaxDims];
};

// Slots 0 getAPILanguage, 1 getInterfaceInfo, 2 and 3 the two destructors of the Itanium C++ ABI.
class IVersionedInterface {
public:
    virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

class IPluginCapability : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
    virtual const char* getPluginName() const noexcept = 0;
    virtual const char* getPluginVersion() const noexcept = 0;
    virtual const char* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
    virtual int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                    const DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept = 0;
    virtual int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, const DataType* inputTypes,
                                       int32_t nbInputs) const noexcept = 0;
    virtual int32_t getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs* shapeInputs,
                                    int32_t nbShapeInputs, DimsExprs* outputs, int32_t nbOutputs,
                                    IExprBuilder& exprBuilder) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                           int32_t nbOutputs) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                                    int32_t) const noexcept {
        return 0;
    }
    virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
    virtual int32_t getNbTactics() noexcept { return 0; }
    virtual const char* getTimingCacheID() noexcept { return nullptr; }
    virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
    virtual const char* getMetadataString() noexcept { return nullptr; }
    // Only read where the interface says version 2.0; present so that a reader of that version finds a function, not garbage.
    virtual int32_t getAliasedInput(int32_t) noexcept { return -1; }
};

class IPluginV3OneRuntime : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
    virtual int32_t setTactic(int32_t) noexcept { return 0; }
    virtual int32_t onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                                  int32_t nbOutputs) noexcept = 0;
    virtual int32_t enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                            const void* const* inputs, void* const* outputs, void* workspace,
                            void* stream /* cudaStream_t */) noexcept = 0;
    virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
    virtual const PluginFieldCollection* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fc, TensorRTPhase phase) noexcept = 0;
    virtual const PluginFieldCollection* getFieldNames() noexcept = 0;
    virtual const char* getPluginName() const noexcept = 0;
    virtual const char* getPluginVersion() const noexcept = 0;
    virtual const char* getPluginNamespace() const noexcept = 0;
};

// ILogger and ILoggerFinder exist in two layouts; the finder's and the logger's always agree.
// TensorRT 10: the class's own functions come first.
class LoggerV10 {
public:
    virtual void log(Severity severity, const char* msg) noexcept = 0;

protected:
    ~LoggerV10() = default;
};
class LoggerFinderV10 {
public:
    virtual LoggerV10* findLogger() = 0;

protected:
    ~LoggerFinderV10() = default;
};
// TensorRT 11: after the four slots of IVersionedInterface.
class LoggerV11 : public IVersionedInterface {
public:
    virtual void log(Severity severity, const char* msg) noexcept = 0;
};
class LoggerFinderV11 : public IVersionedInterface {
public:
    virtual LoggerV11* findLogger() = 0;
};

static_assert(sizeof(void*) == 8, "only 64-bit platforms");
static_assert(sizeof(Dims) == 72 && offsetof(Dims, d) == 8);
static_assert(sizeof(PluginTensorDesc) == 88 && offsetof(PluginTensorDesc, type) == 72 &&
              offsetof(PluginTensorDesc, format) == 76 && offsetof(PluginTensorDesc, scale) == 80);
static_assert(sizeof(DynamicPluginTensorDesc) == 304 && offsetof(DynamicPluginTensorDesc, min) == 88 &&
              offsetof(DynamicPluginTensorDesc, max) == 160 && offsetof(DynamicPluginTensorDesc, opt) == 232);
static_assert(sizeof(PluginField) == 24 && offsetof(PluginField, data) == 8 && offsetof(PluginField, type) == 16 &&
              offsetof(PluginField, length) == 20);
static_assert(sizeof(PluginFieldCollection) == 16 && offsetof(PluginFieldCollection, fields) == 8);
static_assert(sizeof(InterfaceInfo) == 16 && offsetof(InterfaceInfo, major) == 8);
static_assert(sizeof(DimsExprs) == 72 && offsetof(DimsExprs, d) == 8);
static_assert(sizeof(IPluginV3) == 8 && sizeof(IPluginV3OneCore) == 8 && sizeof(IPluginV3OneBuild) == 8 &&
              sizeof(IPluginV3OneRuntime) == 8 && sizeof(IPluginCreatorV3One) == 8, "a single virtual-table pointer");

} // namespace ecmfq::trt
