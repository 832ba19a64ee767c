// routed_moe.cu - the layer as a sequence of launches: prepare, gate_up, quantize, then down and the ordered sum, a few columns at a time.
#include "ecmfq/launch.cuh"

namespace ecmfq {
namespace {

bool launch_gemm(Gemm gemm, const MoeProblem& p, const MoePlan& plan, const GemmArguments& a, Stream stream) {
  return plan.tiling == Tiling::kPrefill ? launch_gemm_prefill(gemm, p, a, plan.persistent_blocks, stream)
                                         : launch_gemm_decode(gemm, p, a, plan.tiling, stream);
}

}  // namespace

bool launch_routed_moe(const MoeProblem& p, const MoeTensors& t, const MoePlan& plan, void* workspace, Stream stream) {
  if (p.num_tokens == 0) return true;
  const MoeWorkspace at = workspace_layout(p);
  unsigned char* ws = static_cast<unsigned char*>(workspace);

  GemmArguments shared{};
  shared.expert_offsets = reinterpret_cast<const int32_t*>(ws + at.expert_offsets);
  shared.row_pair = reinterpret_cast<const int32_t*>(ws + at.row_pair);
  shared.topk_ids = t.topk_ids;
  shared.out = reinterpret_cast<float*>(ws + at.scratch);
  shared.num_experts = p.num_experts;
  shared.top_k = p.top_k;
  shared.intermediate_size = p.intermediate_size;

  GemmArguments gate_up = shared;
  gate_up.qweight = t.gate_up_qweight;
  gate_up.channel_scale = t.gate_up_scale;
  gate_up.multiplier = t.gate_up_multiplier;
  gate_up.act_q = reinterpret_cast<const int8_t*>(ws + at.act_q);
  gate_up.act_scale = reinterpret_cast<const float*>(ws + at.act_scale);
  gate_up.cols = p.hidden_size;
  gate_up.weight_rows = 2 * p.intermediate_size;
  gate_up.row_tiles = gate_up.weight_rows / kTileRows;
  gate_up.out_stride = p.intermediate_size;

  GemmArguments down = shared;
  down.qweight = t.down_qweight;
  down.channel_scale = t.down_scale;
  down.multiplier = t.down_multiplier;
  down.act_q = reinterpret_cast<const int8_t*>(ws + at.inter_q);
  down.act_scale = reinterpret_cast<const float*>(ws + at.inter_scale);
  down.cols = p.intermediate_size;
  down.weight_rows = p.hidden_size;

  if (!launch_prepare(p, t, at, ws, stream)) return false;
  if (!launch_gemm(Gemm::kGateUp, p, plan, gate_up, stream)) return false;
  if (!launch_quantize_intermediate(p, at, ws, stream)) return false;
  for (int32_t first = 0; first < p.hidden_size; first += plan.term_columns) {
    const int32_t left = p.hidden_size - first;
    const int32_t columns = left < plan.term_columns ? left : plan.term_columns;
    down.first_row_tile = first / kTileRows;
    down.row_tiles = columns / kTileRows;
    down.out_stride = columns;
    if (!launch_gemm(Gemm::kDown, p, plan, down, stream)) return false;
    if (!launch_sum_slots(p, t, at, ws, first, columns, stream)) return false;
  }
  return true;
}

}  // namespace ecmfq
