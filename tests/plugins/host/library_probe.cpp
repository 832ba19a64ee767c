// What the host side of a compiled plugin library answers, as text: the same program for every platform, so that two libraries can be
// compared line by line. Needs no GPU. Built and run by tests/plugins/test_aarch64.py.
//
//   library_probe LIBRARY    C ABI, creators, fields, plugins made from good and wrong fields, shape checks
//   library_probe            the index math of layout.cuh, which needs no library
#include "../../../plugins/capi/ecmfq.h"
#include "../../../plugins/trt/trt_abi.h"
#include "../../kernels/emulation/layout_probe.cpp"

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

using namespace ecmfq::trt;

namespace {

void* g_library = nullptr;

template <class F>
F* symbol(const char* name) {
    void* found = dlsym(g_library, name);
    if (found == nullptr) {
        std::printf("no symbol %s\n", name);
        std::exit(1);
    }
    return reinterpret_cast<F*>(found);
}

void probe_layout() {
    for (int gate_up = 0; gate_up < 2; ++gate_up) {
        for (const auto& size : {std::pair{32, 32}, std::pair{96, 64}, std::pair{64, 160}}) {
            std::vector<int64_t> canonical(static_cast<size_t>(size.first) * size.second / 2);
            probe_canonical_bytes(gate_up, size.first, size.second, canonical.data());
            std::printf("canonical %d %d %d:", gate_up, size.first, size.second);
            for (int64_t at : canonical) std::printf(" %" PRId64, at);
            std::printf("\n");
        }
    }
    int32_t position[32];
    probe_activation_positions(32, position);
    std::printf("positions:");
    for (int32_t at : position) std::printf(" %d", at);
    std::printf("\nwords:");
    uint32_t word = 12345;
    for (int i = 0; i < 64; ++i, word = word * 1664525u + 1013904223u) {
        std::printf(" %u/%u/%u", word, probe_even_columns(word), probe_odd_columns(word));
    }
    std::printf("\n");
}

EcmfqMoeParams params(int tokens, int experts, int top_k, int hidden, int inner, int group, int dtype, int layout, int device) {
    EcmfqMoeParams p{};
    p.abi_version = ECMFQ_ABI_VERSION;
    p.struct_size = sizeof p;
    p.num_tokens = tokens, p.num_experts = experts, p.top_k = top_k, p.hidden_size = hidden, p.intermediate_size = inner;
    p.group_size = group, p.dtype = dtype, p.weight_layout = layout;
    p.compute_capability = device, p.num_sms = 16, p.max_smem_per_block = 166912;
    return p;
}

void probe_c_abi() {
    std::printf("sizeof params %zu, ABI %u\n", sizeof(EcmfqMoeParams), symbol<decltype(ecmfq_abi_version)>("ecmfq_abi_version")());
    auto* text = symbol<decltype(ecmfq_status_string)>("ecmfq_status_string");
    for (int32_t status = -1; status < 13; ++status) std::printf("status %d: %s\n", status, text(status));
    auto* check = symbol<decltype(ecmfq_routed_moe_check)>("ecmfq_routed_moe_check");
    auto* size = symbol<decltype(ecmfq_routed_moe_workspace_size)>("ecmfq_routed_moe_workspace_size");
    auto* run = symbol<decltype(ecmfq_routed_moe)>("ecmfq_routed_moe");
    for (int tokens : {-1, 0, 1, 33, 4096}) {
        for (int experts : {0, 8, 128, 1025}) {
            for (int hidden : {32, 48, 2048, 65568}) {
                for (int group : {-1, 64, 128}) {
                    for (int device : {75, 87, 110}) {
                        const EcmfqMoeParams p = params(tokens, experts, 8, hidden, 768, group, 0, 1, device);
                        size_t bytes = 0;
                        const int32_t first = check(&p), second = size(&p, &bytes);
                        // Null tensors: refused after the sizes, before anything touches a device.
                        std::printf("check %d %d %d %d %d: %d %d %zu %d\n", tokens, experts, hidden, group, device, first, second, bytes,
                                    tokens == 0 ? 0 : run(&p, nullptr, 0, nullptr));
                    }
                }
            }
        }
    }
}

struct Fields {
    std::vector<PluginField> fields;
    std::vector<int32_t> values;
    PluginFieldCollection view{};

    Fields(int32_t experts, int32_t top_k, int32_t hidden, int32_t inner, int32_t group, const char* activation, const char* layout) {
        values = {experts, top_k, hidden, inner, group, 1};
        const char* names[] = {"num_experts", "top_k", "hidden_size", "intermediate_size", "group_size", "abi_version"};
        for (size_t i = 0; i < values.size(); ++i) fields.push_back({names[i], &values[i], PluginFieldType::kINT32, 1});
        fields.push_back({"activation", activation, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(activation)) + 1});
        fields.push_back({"weight_layout", layout, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(layout)) + 1});
        view = {static_cast<int32_t>(fields.size()), fields.data()};
    }
    Fields(const Fields&) = delete;
};

Dims dims(std::initializer_list<int64_t> extents) {
    Dims d{};
    d.nbDims = static_cast<int32_t>(extents.size());
    int i = 0;
    for (int64_t e : extents) d.d[i++] = e;
    return d;
}

void probe_plugin(IPluginV3& plugin) {
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto* build = static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
    const PluginFieldCollection* kept = runtime->getFieldsToSerialize();
    for (int32_t i = 0; i < kept->nbFields; ++i) {
        int32_t value = 0;
        std::memcpy(&value, kept->fields[i].data, 4);
        std::printf("  kept %s = %d\n", kept->fields[i].name, value);
    }
    const std::pair<Dims, DataType> inputs[] = {
        {dims({2, 33, 256}), DataType::kHALF},   {dims({2, 33, 2}), DataType::kINT32}, {dims({2, 33, 2}), DataType::kFLOAT},
        {dims({8, 256, 128}), DataType::kINT8},  {dims({8, 256}), DataType::kFLOAT},   {dims({8, 256, 64}), DataType::kINT8},
        {dims({8, 256}), DataType::kFLOAT}};
    for (int spoiled = -1; spoiled < 7; ++spoiled) {
        std::vector<DynamicPluginTensorDesc> in;
        for (int i = 0; i < 7; ++i) {
            DynamicPluginTensorDesc d{};
            d.desc.dims = inputs[i].first;
            d.desc.type = inputs[i].second;
            if (i == spoiled) d.desc.dims.d[d.desc.dims.nbDims - 1] += 2;
            d.min = d.opt = d.max = d.desc.dims;
            in.push_back(d);
        }
        DynamicPluginTensorDesc out = in[0];
        const int32_t configured = build->configurePlugin(in.data(), 7, &out, 1);
        std::printf("  input %d spoiled: configure %d, workspace %zu\n", spoiled, configured,
                    configured == 0 ? build->getWorkspaceSize(in.data(), 7, &out, 1) : size_t{0});
    }
}

void probe_creators() {
    int32_t count = 0;
    auto* const* creators = symbol<IPluginCreatorInterface* const*(int32_t&)>("getCreators")(count);
    std::printf("%d creators\n", count);
    auto& creator = *static_cast<IPluginCreatorV3One*>(creators[0]);
    std::printf("%s version %s namespace '%s'\n", creator.getPluginName(), creator.getPluginVersion(), creator.getPluginNamespace());
    const PluginFieldCollection* names = creator.getFieldNames();
    for (int32_t i = 0; i < names->nbFields; ++i) {
        std::printf("field %s type %d\n", names->fields[i].name, static_cast<int>(names->fields[i].type));
    }
    struct Case {
        int32_t experts, top_k, hidden, inner, group;
        const char *activation, *layout;
    };
    for (const Case& c : {Case{8, 2, 256, 128, -1, "silu_glu", "mma_s8"}, Case{8, 9, 256, 128, -1, "silu_glu", "mma_s8"},
                          Case{0, 2, 256, 128, -1, "silu_glu", "mma_s8"}, Case{8, 2, 257, 128, -1, "silu_glu", "mma_s8"},
                          Case{8, 2, 256, -4, -1, "silu_glu", "mma_s8"}, Case{8, 2, 256, 128, 64, "silu_glu", "mma_s8"},
                          Case{8, 2, 256, 128, -1, "relu", "mma_s8"}, Case{8, 2, 256, 128, -1, "silu_glu", "column_major"}}) {
        const Fields fields(c.experts, c.top_k, c.hidden, c.inner, c.group, c.activation, c.layout);
        IPluginV3* plugin = creator.createPlugin("probe/moe", &fields.view, TensorRTPhase::kBUILD);
        std::printf("create %d %d %d %d %d %s %s: %s\n", c.experts, c.top_k, c.hidden, c.inner, c.group, c.activation, c.layout,
                    plugin == nullptr ? "refused" : "made");
        if (plugin != nullptr) probe_plugin(*plugin);
        delete plugin;
    }
}

} // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        probe_layout();
        return 0;
    }
    g_library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (g_library == nullptr) {
        std::printf("%s\n", dlerror());
        return 1;
    }
    probe_c_abi();
    probe_creators();
    return 0;
}
