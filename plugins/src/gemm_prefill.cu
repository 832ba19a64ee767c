// gemm_prefill.cu - instances and launch of the prefill tiling.
#include "ecmfq/gemm_prefill.cuh"
#include "ecmfq/launch.cuh"

namespace ecmfq {
namespace {

template <Gemm kGemm, bool kGrouped>
bool run(const GemmArguments& a, WeightLayout layout, int blocks, Stream stream) {
  return launch(&gemm_prefill_kernel<kGemm, kGrouped>, dim3(static_cast<unsigned>(blocks)), dim3(kPrefillThreads),
                static_cast<size_t>(prefill_shared_bytes(a.num_experts)), stream, a, layout);
}

}  // namespace

bool launch_gemm_prefill(Gemm gemm, const MoeProblem& p, const GemmArguments& a, int max_blocks, Stream stream) {
  // No more blocks than the largest possible number of tiles: one partly filled token block for each expert that can have one.
  const int64_t partial = p.num_pairs() < p.num_experts ? p.num_pairs() : p.num_experts;
  const int64_t channel_tiles = (a.row_tiles + kPrefillWarps - 1) / kPrefillWarps;
  const int64_t tiles = (p.num_pairs() / kPrefillTokens + partial) * channel_tiles;
  const int blocks = static_cast<int>(tiles < max_blocks ? tiles : max_blocks);
  if (gemm == Gemm::kGateUp) {
    return p.grouped ? run<Gemm::kGateUp, true>(a, p.weight_layout, blocks, stream)
                     : run<Gemm::kGateUp, false>(a, p.weight_layout, blocks, stream);
  }
  return p.grouped ? run<Gemm::kDown, true>(a, p.weight_layout, blocks, stream)
                   : run<Gemm::kDown, false>(a, p.weight_layout, blocks, stream);
}

}  // namespace ecmfq
