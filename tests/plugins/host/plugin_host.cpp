// Drives the plugin as TensorRT would, from the library's two exported functions on: no TensorRT, no CUDA. Built with the
// address and undefined-behaviour sanitizers by tests/plugins/test_host.py.
//
//   plugin_host roundtrip           a plugin of each kind: serialize, create again, compare
//   plugin_host run                 shapes, types, workspace and enqueue through all three interfaces
//   plugin_host fuzz SEED COUNT     COUNT damaged sets of fields in both phases, and random shapes and types
#include "../../../plugins/trt/trt_abi.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace ecmfq::trt;
extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);           \
            std::exit(1);                                                                 \
        }                                                                                 \
    } while (0)

// Heap buffers of exactly the field's size, so that the address sanitizer sees every byte read too far.
struct Field {
    std::string name{};
    PluginFieldType type = PluginFieldType::kINT32;
    int32_t length = 1;
    std::vector<uint8_t> data{};
    bool null_name = false, null_data = false;
};

struct Collection {
    std::vector<std::unique_ptr<char[]>> names;
    std::vector<std::unique_ptr<uint8_t[]>> data;
    std::vector<PluginField> fields;
    PluginFieldCollection view{};

    explicit Collection(const std::vector<Field>& from) {
        for (const Field& f : from) {
            names.emplace_back(new char[f.name.size() + 1]);
            std::memcpy(names.back().get(), f.name.c_str(), f.name.size() + 1);
            data.emplace_back(new uint8_t[f.data.size()]);
            if (!f.data.empty()) std::memcpy(data.back().get(), f.data.data(), f.data.size());
            fields.push_back({f.null_name ? nullptr : names.back().get(), f.null_data ? nullptr : data.back().get(), f.type, f.length});
        }
        view = {static_cast<int32_t>(fields.size()), fields.data()};
    }
};

Field int_field(const char* name, int32_t value) {
    Field f{name};
    f.data.resize(4);
    std::memcpy(f.data.data(), &value, 4);
    return f;
}

Field text_field(const char* name, const char* value, bool with_nul) {
    Field f{name, PluginFieldType::kCHAR};
    f.data.assign(value, value + std::strlen(value) + (with_nul ? 1 : 0));
    f.length = static_cast<int32_t>(f.data.size());
    return f;
}

std::vector<Field> onnx_fields(int32_t experts, int32_t hidden, int32_t inner, int32_t group, const char* layout) {
    return {int_field("num_experts", experts), int_field("top_k", 2), int_field("hidden_size", hidden),
            int_field("intermediate_size", inner), text_field("activation", "silu_glu", group > 0), int_field("group_size", group),
            text_field("weight_layout", layout, group < 0), int_field("abi_version", 1)};
}

IPluginCreatorV3One& creator() {
    int32_t count = 0;
    IPluginCreatorInterface* const* all = getCreators(count);
    CHECK(count == 1);
    return *static_cast<IPluginCreatorV3One*>(all[0]);
}

using Plugin = std::unique_ptr<IPluginV3>;

template <typename T>
T& capability(IPluginV3& plugin, PluginCapabilityType type) {
    IPluginCapability* found = plugin.getCapabilityInterface(type);
    CHECK(found != nullptr);
    return *static_cast<T*>(found);
}

std::vector<Field> copy(const PluginFieldCollection& from) {
    std::vector<Field> out;
    for (int32_t i = 0; i < from.nbFields; ++i) {
        const PluginField& f = from.fields[i];
        CHECK(f.type == PluginFieldType::kINT32 && f.length == 1);
        Field field{f.name, f.type, f.length};
        field.data.resize(4);
        std::memcpy(field.data.data(), f.data, 4);
        out.push_back(field);
    }
    return out;
}

bool same(const std::vector<Field>& a, const std::vector<Field>& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
        if (a[i].name != b[i].name || a[i].data != b[i].data) return false;
    }
    return true;
}

Plugin create(const std::vector<Field>& fields, TensorRTPhase phase) {
    Collection collection(fields);
    return Plugin(creator().createPlugin("host/moe", &collection.view, phase));
}

std::vector<Field> serialized(IPluginV3& plugin) {
    return copy(*capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME).getFieldsToSerialize());
}

Dims dims(std::initializer_list<int64_t> extents) {
    Dims d{};
    d.nbDims = static_cast<int32_t>(extents.size());
    int i = 0;
    for (int64_t e : extents) d.d[i++] = e;
    return d;
}

std::vector<DynamicPluginTensorDesc> tensors(int64_t experts, int64_t hidden, int64_t inner, bool grouped) {
    const std::pair<Dims, DataType> all[] = {
        {dims({-1, -1, hidden}), DataType::kHALF},           {dims({-1, -1, 2}), DataType::kINT32},
        {dims({-1, -1, 2}), DataType::kFLOAT},               {dims({experts, 2 * inner, hidden / 2}), DataType::kINT8},
        {dims({experts, 2 * inner}), DataType::kFLOAT},      {dims({experts, hidden, inner / 2}), DataType::kINT8},
        {dims({experts, hidden}), DataType::kFLOAT},         {dims({experts, 2 * inner, hidden / 128}), DataType::kINT8},
        {dims({experts, hidden, inner / 128}), DataType::kINT8}};
    std::vector<DynamicPluginTensorDesc> out;
    for (int i = 0; i < (grouped ? 9 : 7); ++i) {
        DynamicPluginTensorDesc d{};
        d.desc.dims = all[i].first;
        d.desc.type = all[i].second;
        d.max = all[i].first;
        if (i < 3) d.max.d[0] = 2, d.max.d[1] = 33;
        d.min = d.opt = d.max;
        out.push_back(d);
    }
    return out;
}

void roundtrip() {
    for (int32_t group : {-1, 128}) {
        for (const char* layout : {"row_major", "mma_s8"}) {
            Plugin first = create(onnx_fields(8, 256, 128, group, layout), TensorRTPhase::kBUILD);
            CHECK(first != nullptr);
            const std::vector<Field> fields = serialized(*first);
            Plugin second = create(fields, TensorRTPhase::kRUNTIME);
            CHECK(second != nullptr);
            CHECK(same(fields, serialized(*second)));
            Plugin third(second->clone());
            CHECK(third != nullptr && same(fields, serialized(*third)));
            std::vector<Field> other = fields;
            other[1].data[0] ^= 1; // another number of experts under the old checksum
            CHECK(create(other, TensorRTPhase::kRUNTIME) == nullptr);
        }
    }
    std::printf("round trip holds\n");
}

void run() {
    for (bool grouped : {false, true}) {
        Plugin plugin = create(onnx_fields(8, 256, 128, grouped ? 128 : -1, "row_major"), TensorRTPhase::kBUILD);
        auto& core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
        auto& build = capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
        CHECK(std::string(core.getPluginName()) == "EcmfqRoutedMoE" && std::string(core.getPluginNamespace()).empty());
        CHECK(std::string(core.getInterfaceInfo().kind) == "PLUGIN_V3ONE_CORE");
        CHECK(std::string(build.getInterfaceInfo().kind) == "PLUGIN_V3ONE_BUILD" && build.getNbOutputs() == 1);
        std::vector<DynamicPluginTensorDesc> in = tensors(8, 256, 128, grouped);
        const int32_t n = static_cast<int32_t>(in.size());
        DynamicPluginTensorDesc out = in[0];
        CHECK(build.configurePlugin(in.data(), n, &out, 1) == 0);
        CHECK(build.getWorkspaceSize(in.data(), n, &out, 1) > 0);
        std::vector<DynamicPluginTensorDesc> all = in;
        all.push_back(out);
        for (int32_t i = 0; i <= n; ++i) CHECK(build.supportsFormatCombination(i, all.data(), n, 1));
        all[0].desc.type = DataType::kFLOAT;
        CHECK(!build.supportsFormatCombination(0, all.data(), n, 1));

        auto& runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
        Plugin attached(runtime.attachToContext(nullptr));
        auto& context = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
        std::vector<PluginTensorDesc> fixed;
        std::vector<const void*> pointers;
        for (const auto& d : in) {
            fixed.push_back(d.desc);
            fixed.back().dims = d.max;
            pointers.push_back(&in);
        }
        void* outputs[] = {&out};
        CHECK(context.onShapeChange(fixed.data(), n, &fixed[0], 1) == 0);
        CHECK(context.enqueue(fixed.data(), &fixed[0], pointers.data(), outputs, &out, nullptr) == 0);
        CHECK(context.onShapeChange(fixed.data(), n - 1, &fixed[0], 1) != 0);
        for (auto& d : fixed) d.dims.d[1] = d.dims.d[1] == 33 ? 0 : d.dims.d[1];
        CHECK(context.enqueue(fixed.data(), &fixed[0], pointers.data(), outputs, &out, nullptr) == 0); // no tokens
    }
    std::printf("interfaces hold\n");
}

class Fuzzer {
public:
    explicit Fuzzer(uint32_t seed) : random_(seed) {}

    std::vector<Field> damage(std::vector<Field> fields) {
        for (uint32_t i = 0, n = 1 + pick(4); i < n && !fields.empty(); ++i) damage_one(fields);
        // TensorRT allocates what it hands over, so a buffer is never shorter than its string's length says.
        for (Field& f : fields) {
            const int32_t size = static_cast<int32_t>(f.data.size());
            if (f.type == PluginFieldType::kCHAR && f.length > size) f.length = size;
        }
        return fields;
    }

    void random_tensors(std::vector<DynamicPluginTensorDesc>& in) {
        for (uint32_t i = 0, n = 1 + pick(3); i < n; ++i) {
            DynamicPluginTensorDesc& d = in[pick(static_cast<uint32_t>(in.size()))];
            Dims& shape = pick(2) ? d.desc.dims : d.max;
            switch (pick(4)) {
            case 0: d.desc.type = static_cast<DataType>(interesting()); break;
            case 1: shape.nbDims = static_cast<int32_t>(pick(14)) - 3; break;
            case 2: shape.d[pick(8)] = interesting(); break;
            default: shape.d[pick(8)] = static_cast<int64_t>(random_()) << 31 | random_(); break;
            }
        }
    }

    uint32_t pick(uint32_t below) { return static_cast<uint32_t>(random_() % below); }

private:
    int32_t interesting() {
        static constexpr int32_t kValues[] = {0, 1, -1, 2, 3, 7, 64, 127, 128, 129, 255, 4096, 65536, 65537, INT32_MAX, INT32_MIN, -128};
        return kValues[pick(sizeof kValues / sizeof kValues[0])];
    }

    void damage_one(std::vector<Field>& fields) {
        Field& f = fields[pick(static_cast<uint32_t>(fields.size()))];
        switch (pick(11)) {
        case 0: if (!f.data.empty()) f.data[pick(static_cast<uint32_t>(f.data.size()))] ^= static_cast<uint8_t>(1u << pick(8)); break;
        case 1: for (uint8_t& byte : f.data) byte = static_cast<uint8_t>(random_()); break;
        case 2: { // another value, with the buffer that its type promises
            const int32_t value = interesting();
            f.data.assign(8, 0);
            std::memcpy(f.data.data(), &value, 4);
            break;
        }
        case 3: // another type
            f.type = static_cast<PluginFieldType>(interesting());
            f.data.resize(f.data.size() < 8 ? 8 : f.data.size());
            if (f.type == PluginFieldType::kCHAR) f.length = static_cast<int32_t>(f.data.size());
            break;
        case 4: f.length = f.type == PluginFieldType::kCHAR ? static_cast<int32_t>(pick(static_cast<uint32_t>(f.data.size()) + 1)) - 1 : interesting(); break;
        case 5: f.null_data = true; break;
        case 6: f.null_name = true; break;
        case 7: f.name = pick(2) ? std::string(pick(300), static_cast<char>(1 + pick(255))) : fields[0].name; break;
        case 8: if (!f.name.empty()) f.name[pick(static_cast<uint32_t>(f.name.size()))] ^= static_cast<char>(1 + pick(255)); break;
        case 9: fields.erase(fields.begin() + pick(static_cast<uint32_t>(fields.size()))); break;
        default: fields.push_back(fields[pick(static_cast<uint32_t>(fields.size()))]); break;
        }
    }

    std::mt19937 random_;
};

void fuzz(uint32_t seed, int count) {
    Fuzzer fuzzer(seed);
    const std::vector<Field> onnx = onnx_fields(8, 256, 128, 128, "row_major");
    Plugin good = create(onnx, TensorRTPhase::kBUILD);
    const std::vector<Field> engine = serialized(*good);
    auto& build = capability<IPluginV3OneBuild>(*good, PluginCapabilityType::kBUILD);
    auto& runtime = capability<IPluginV3OneRuntime>(*good, PluginCapabilityType::kRUNTIME);
    int accepted = 0, configured = 0;
    for (int i = 0; i < count; ++i) {
        const bool from_engine = i % 2 == 0;
        const std::vector<Field> damaged = fuzzer.damage(from_engine ? engine : onnx);
        Collection collection(damaged);
        if (fuzzer.pick(50) == 0) collection.view.nbFields = fuzzer.pick(2) ? -1 : INT32_MAX;
        if (fuzzer.pick(100) == 0) collection.view.fields = nullptr;
        Plugin plugin(creator().createPlugin(fuzzer.pick(10) ? "n" : nullptr, fuzzer.pick(100) ? &collection.view : nullptr,
                                             from_engine ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD));
        if (plugin != nullptr) {
            ++accepted;
            const std::vector<Field> back = serialized(*plugin);
            CHECK(create(back, TensorRTPhase::kRUNTIME) != nullptr); // whatever is accepted is whole
            if (from_engine) CHECK(same(back, engine));              // no damaged engine runs with other sizes
        }
        std::vector<DynamicPluginTensorDesc> in = tensors(8, 256, 128, true);
        fuzzer.random_tensors(in);
        DynamicPluginTensorDesc out = in[0];
        if (build.configurePlugin(in.data(), 9, &out, 1) == 0) ++configured;
        build.getWorkspaceSize(in.data(), 9, &out, 1);
        std::vector<PluginTensorDesc> fixed;
        for (const auto& d : in) fixed.push_back(d.desc);
        runtime.onShapeChange(fixed.data(), 9, &fixed[0], 1);
    }
    std::printf("%d mutations, %d accepted, %d shapes accepted\n", count, accepted, configured);
}

} // namespace

int main(int argc, char** argv) {
    const std::string command = argc > 1 ? argv[1] : "";
    if (command == "roundtrip") roundtrip();
    else if (command == "run") run();
    else if (command == "fuzz" && argc == 4) fuzz(static_cast<uint32_t>(std::atoi(argv[2])), std::atoi(argv[3]));
    else return 2;
    return 0;
}
