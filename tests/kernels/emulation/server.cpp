// server.cpp - runs the emulated layer on cases from stdin and writes results to stdout, so that the sanitizers live in a process of
// their own. Every tensor is a heap block of exactly its size: an access one byte outside is an AddressSanitizer error.
//
// Request: 16 int32 (Request below), then the tensors in the order of read_tensors(). Answer: int32 status, and when it is 0
// an int64 (bytes of weights streamed), the output, and the workspace's integer stages. See tests/kernels/emulator.py for the other end.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "ecmfq.h"
#include "ecmfq/launch.cuh"

namespace {

struct Request {
  int32_t num_tokens, num_experts, top_k, hidden_size, intermediate_size, group_size, dtype, weight_layout;
  int32_t tiling;             // -1: the planner's choice, through the C ABI
  int32_t term_columns;       // 0: the planner's
  int32_t persistent_blocks;  // 0: the planner's
  int32_t seed;
  int32_t unused[4];
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Block = std::unique_ptr<char, Free>;

bool read_exactly(void* to, size_t bytes) { return bytes == 0 || std::fread(to, 1, bytes, stdin) == bytes; }
void write_exactly(const void* from, size_t bytes) {
  if (bytes > 0 && std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(3);
}

Block allocate(int64_t bytes, size_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, alignment, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0) std::exit(4);
  for (int64_t i = 0; i < bytes; ++i) static_cast<char*>(p)[i] = static_cast<char>(0xcd + 7 * i);
  return Block(static_cast<char*>(p));
}

Block read_tensor(int64_t bytes) {
  Block b = allocate(bytes, 16);
  if (!read_exactly(b.get(), static_cast<size_t>(bytes))) std::exit(5);
  return b;
}

// Makes the gaps between the workspace's parts illegal, so that running over one part's end is an error as well.
void poison_gaps(const ecmfq::MoeProblem& p, const ecmfq::MoeWorkspace& at, char* workspace) {
  const int64_t pairs = p.num_pairs();
  const struct {
    int64_t offset, bytes;
  } parts[] = {{at.act_q, int64_t{p.num_tokens} * p.hidden_size},
               {at.act_scale, int64_t{p.num_tokens} * 4},
               {at.expert_offsets, (int64_t{p.num_experts} + 1) * 4},
               {at.row_pair, pairs * 4},
               {at.inter_q, pairs * p.intermediate_size},
               {at.inter_scale, pairs * 4}};
  ASAN_POISON_MEMORY_REGION(workspace, static_cast<size_t>(at.scratch));
  for (const auto& part : parts) ASAN_UNPOISON_MEMORY_REGION(workspace + part.offset, static_cast<size_t>(part.bytes));
}

void serve(const Request& r) {
  const int64_t t = r.num_tokens, e = r.num_experts, k = r.top_k, h = r.hidden_size, i = r.intermediate_size;
  const bool grouped = r.group_size > 0;
  const int64_t gate_up_groups = grouped ? h / r.group_size : 0, down_groups = grouped ? i / r.group_size : 0;
  const Block hidden = read_tensor(t * h * 2), ids = read_tensor(t * k * 4), weights = read_tensor(t * k * 4);
  const Block gate_up = read_tensor(e * i * h), gate_up_scale = read_tensor(e * 2 * i * 4);
  const Block gate_up_multiplier = read_tensor(e * 2 * i * gate_up_groups);
  const Block down = read_tensor(e * h * (i / 2)), down_scale = read_tensor(e * h * 4);
  const Block down_multiplier = read_tensor(e * h * down_groups);
  const Block output = allocate(t * h * 2, 16);

  EcmfqMoeParams p;
  std::memset(&p, 0, sizeof p);
  p.abi_version = ECMFQ_ABI_VERSION;
  p.struct_size = sizeof p;
  p.num_tokens = r.num_tokens;
  p.num_experts = r.num_experts;
  p.top_k = r.top_k;
  p.hidden_size = r.hidden_size;
  p.intermediate_size = r.intermediate_size;
  p.group_size = r.group_size;
  p.activation = ECMFQ_SILU_GLU;
  p.dtype = r.dtype;
  p.weight_layout = r.weight_layout;
  p.compute_capability = 87;
  p.num_sms = 3;
  p.max_smem_per_block = 49152;
  p.hidden_states = hidden.get();
  p.topk_ids = reinterpret_cast<const int32_t*>(ids.get());
  p.topk_weights = reinterpret_cast<const float*>(weights.get());
  p.gate_up_qweight = reinterpret_cast<const int8_t*>(gate_up.get());
  p.gate_up_scale = reinterpret_cast<const float*>(gate_up_scale.get());
  p.down_qweight = reinterpret_cast<const int8_t*>(down.get());
  p.down_scale = reinterpret_cast<const float*>(down_scale.get());
  if (grouped) {
    p.gate_up_multiplier = reinterpret_cast<const int8_t*>(gate_up_multiplier.get());
    p.down_multiplier = reinterpret_cast<const int8_t*>(down_multiplier.get());
  }
  p.output = output.get();

  size_t bytes = 0;
  int32_t status = ecmfq_routed_moe_workspace_size(&p, &bytes);
  const Block workspace = allocate(static_cast<int64_t>(bytes), 256);
  emulation::streamed_bytes(0, true);
  emulation::set_seed(static_cast<uint64_t>(r.seed));

  ecmfq::MoeProblem problem{};
  problem.num_tokens = p.num_tokens;
  problem.num_experts = p.num_experts;
  problem.top_k = p.top_k;
  problem.hidden_size = p.hidden_size;
  problem.intermediate_size = p.intermediate_size;
  problem.grouped = grouped;
  problem.dtype = static_cast<ecmfq::Dtype>(p.dtype);
  problem.weight_layout = static_cast<ecmfq::WeightLayout>(p.weight_layout);
  problem.num_sms = p.num_sms;
  const ecmfq::MoeWorkspace at = ecmfq::workspace_layout(problem);
  if (status == ECMFQ_OK) poison_gaps(problem, at, workspace.get());
  if (status == ECMFQ_OK && r.tiling < 0) {
    status = ecmfq_routed_moe(&p, workspace.get(), bytes, nullptr);
  } else if (status == ECMFQ_OK) {
    ecmfq::MoePlan plan = ecmfq::make_plan(problem);
    plan.tiling = static_cast<ecmfq::Tiling>(r.tiling);
    if (r.term_columns > 0) plan.term_columns = r.term_columns;
    if (r.persistent_blocks > 0) plan.persistent_blocks = r.persistent_blocks;
    const ecmfq::MoeTensors tensors{p.hidden_states, p.topk_ids,     p.topk_weights, p.gate_up_qweight, p.gate_up_scale,
                                    p.gate_up_multiplier, p.down_qweight, p.down_scale, p.down_multiplier, p.output};
    status = ecmfq::launch_routed_moe(problem, tensors, plan, workspace.get(), nullptr) ? ECMFQ_OK : ECMFQ_ERROR_LAUNCH;
  }

  write_exactly(&status, 4);
  if (status == ECMFQ_OK) {
    const char* ws = workspace.get();
    const int64_t streamed = emulation::streamed_bytes(0);
    write_exactly(&streamed, 8);
    write_exactly(output.get(), static_cast<size_t>(t * h * 2));
    write_exactly(ws + at.act_q, static_cast<size_t>(t * h));
    write_exactly(ws + at.act_scale, static_cast<size_t>(t * 4));
    write_exactly(ws + at.expert_offsets, static_cast<size_t>((e + 1) * 4));
    write_exactly(ws + at.row_pair, static_cast<size_t>(t * k * 4));
    write_exactly(ws + at.inter_q, static_cast<size_t>(t * k * i));
    write_exactly(ws + at.inter_scale, static_cast<size_t>(t * k * 4));
  }
  std::fflush(stdout);
  ASAN_UNPOISON_MEMORY_REGION(workspace.get(), bytes);
}

}  // namespace

int main() {
  Request request;
  while (read_exactly(&request, sizeof request)) serve(request);
  return 0;
}
