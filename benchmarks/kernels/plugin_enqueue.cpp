// plugin_enqueue.cpp - drives the plugin's enqueue as TensorRT would: load the library, ask for its creators, create the plugin from
// fields, clone it, attach it to a context, announce shapes, enqueue. Used by gpu_check.py, alone and under compute-sanitizer.
//
//   plugin_enqueue LIBRARY CASES OUTPUTS
// CASES: any number of requests as tests/kernels/emulation/server.cpp reads them; OUTPUTS: the outputs, one after the other.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../plugins/trt/trt_abi.h"

using namespace ecmfq::trt;

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "plugin_enqueue: %s\n", what.c_str());
  std::exit(1);
}
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Request {
  int32_t num_tokens, num_experts, top_k, hidden_size, intermediate_size, group_size, dtype, weight_layout;
  int32_t unused[8];
};

PluginTensorDesc describe(DataType type, std::vector<int64_t> dims) {
  PluginTensorDesc d{};
  d.dims.nbDims = static_cast<int32_t>(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) d.dims.d[i] = dims[i];
  d.type = type;
  d.format = TensorFormat::kLINEAR;
  return d;
}

int64_t bytes_of(const PluginTensorDesc& d) {
  int64_t n = d.type == DataType::kINT8 ? 1 : (d.type == DataType::kHALF || d.type == DataType::kBF16) ? 2 : 4;
  for (int i = 0; i < d.dims.nbDims; ++i) n *= d.dims.d[i];
  return n;
}

// Exactly as many bytes as the tensor has, so that memcheck sees the first one too many.
void* upload(FILE* file, int64_t bytes) {
  std::vector<char> host(static_cast<size_t>(bytes));
  if (std::fread(host.data(), 1, host.size(), file) != host.size()) fail("the case file is too short");
  void* device = nullptr;
  check(cudaMalloc(&device, host.size() > 0 ? host.size() : 1), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

IPluginV3* create(IPluginCreatorV3One& creator, const Request& r) {
  const int32_t version = 1;
  const char activation[] = "silu_glu";
  const char* layout = r.weight_layout == 1 ? "mma_s8" : "row_major";
  const PluginField all[] = {
      {"abi_version", &version, PluginFieldType::kINT32, 1},
      {"num_experts", &r.num_experts, PluginFieldType::kINT32, 1},
      {"top_k", &r.top_k, PluginFieldType::kINT32, 1},
      {"hidden_size", &r.hidden_size, PluginFieldType::kINT32, 1},
      {"intermediate_size", &r.intermediate_size, PluginFieldType::kINT32, 1},
      {"group_size", &r.group_size, PluginFieldType::kINT32, 1},
      {"activation", activation, PluginFieldType::kCHAR, sizeof activation},
      {"weight_layout", layout, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(layout)) + 1},
  };
  // Only what the creator asks for, as the ONNX parser does.
  std::vector<PluginField> fields;
  const PluginFieldCollection* names = creator.getFieldNames();
  for (int i = 0; i < names->nbFields; ++i) {
    for (const PluginField& field : all)
      if (std::strcmp(field.name, names->fields[i].name) == 0) fields.push_back(field);
  }
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  IPluginV3* plugin = creator.createPlugin("gpu_check", &collection, TensorRTPhase::kBUILD);
  if (plugin == nullptr) fail("createPlugin returned null");
  return plugin;
}

void run(IPluginCreatorV3One& creator, const Request& r, FILE* cases, FILE* outputs) {
  const DataType type = r.dtype == 1 ? DataType::kBF16 : DataType::kHALF;
  const int64_t t = r.num_tokens, e = r.num_experts, k = r.top_k, h = r.hidden_size, i = r.intermediate_size;
  const bool grouped = r.group_size > 0;
  const PluginTensorDesc hidden = describe(type, {t, h});
  // The file's order keeps each multiplier beside its weights; the plugin has both at the end.
  std::vector<PluginTensorDesc> in = {hidden,
                                      describe(DataType::kINT32, {t, k}),
                                      describe(DataType::kFLOAT, {t, k}),
                                      describe(DataType::kINT8, {e, 2 * i, h / 2}),
                                      describe(DataType::kFLOAT, {e, 2 * i})};
  std::vector<const void*> inputs;
  for (const PluginTensorDesc& d : in) inputs.push_back(upload(cases, bytes_of(d)));
  const PluginTensorDesc gate_up_multiplier = describe(DataType::kINT8, {e, 2 * i, grouped ? h / 128 : 0});
  const PluginTensorDesc down_multiplier = describe(DataType::kINT8, {e, h, grouped ? i / 128 : 0});
  void* first_multiplier = grouped ? upload(cases, bytes_of(gate_up_multiplier)) : nullptr;
  for (const PluginTensorDesc& d : {describe(DataType::kINT8, {e, h, i / 2}), describe(DataType::kFLOAT, {e, h})}) {
    in.push_back(d);
    inputs.push_back(upload(cases, bytes_of(d)));
  }
  if (grouped) {
    in.push_back(gate_up_multiplier);
    inputs.push_back(first_multiplier);
    in.push_back(down_multiplier);
    inputs.push_back(upload(cases, bytes_of(down_multiplier)));
  }

  IPluginV3* built = create(creator, r);
  auto* build = static_cast<IPluginV3OneBuild*>(built->getCapabilityInterface(PluginCapabilityType::kBUILD));
  std::vector<DynamicPluginTensorDesc> dynamic;
  for (const PluginTensorDesc& d : in) dynamic.push_back({d, d.dims, d.dims, d.dims});
  const DynamicPluginTensorDesc out{hidden, hidden.dims, hidden.dims, hidden.dims};
  const int32_t count = static_cast<int32_t>(in.size());
  if (build->configurePlugin(dynamic.data(), count, &out, 1) != 0) fail("configurePlugin");
  const size_t workspace_bytes = build->getWorkspaceSize(dynamic.data(), count, &out, 1);

  auto* built_runtime = static_cast<IPluginV3OneRuntime*>(built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  IPluginV3* restored = creator.createPlugin("gpu_check", built_runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  if (restored == nullptr) fail("createPlugin from serialized fields returned null");
  auto* prototype = static_cast<IPluginV3OneRuntime*>(restored->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  IPluginV3* attached = prototype->attachToContext(nullptr);
  auto* runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  if (runtime->onShapeChange(in.data(), count, &hidden, 1) != 0) fail("onShapeChange");

  void *output = nullptr, *workspace = nullptr;
  cudaStream_t stream = nullptr;
  const size_t output_bytes = static_cast<size_t>(bytes_of(hidden));
  check(cudaMalloc(&output, output_bytes), "cudaMalloc");
  check(cudaMalloc(&workspace, workspace_bytes), "cudaMalloc");
  check(cudaMemset(workspace, 0xcd, workspace_bytes), "cudaMemset");
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  if (runtime->enqueue(in.data(), &hidden, inputs.data(), &output, workspace, stream) != 0) fail("enqueue");
  check(cudaStreamSynchronize(stream), "the kernels");
  std::vector<char> host(output_bytes);
  check(cudaMemcpy(host.data(), output, output_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  if (std::fwrite(host.data(), 1, output_bytes, outputs) != output_bytes) fail("cannot write the outputs");

  delete attached;
  delete restored;
  delete built;
  for (const void* p : inputs) cudaFree(const_cast<void*>(p));
  cudaFree(output);
  cudaFree(workspace);
  cudaStreamDestroy(stream);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: plugin_enqueue LIBRARY CASES OUTPUTS");
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  if (get_creators == nullptr) fail("the library exports no getCreators");
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = get_creators(count);
  IPluginCreatorV3One* creator = nullptr;
  for (int32_t i = 0; i < count; ++i) {
    auto* candidate = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (std::strcmp(candidate->getPluginName(), "EcmfqRoutedMoE") == 0) creator = candidate;
  }
  if (creator == nullptr) fail("no creator of EcmfqRoutedMoE");
  FILE* cases = std::fopen(argv[2], "rb");
  FILE* outputs = std::fopen(argv[3], "wb");
  if (cases == nullptr || outputs == nullptr) fail("cannot open the files");
  Request request;
  int done = 0;
  while (std::fread(&request, sizeof request, 1, cases) == 1) {
    run(*creator, request, cases, outputs);
    ++done;
  }
  std::fclose(cases);
  std::fclose(outputs);
  std::printf("%d cases\n", done);
  return 0;
}
