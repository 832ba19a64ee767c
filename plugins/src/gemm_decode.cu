// gemm_decode.cu - instances and launch of the decode tiling.
#include "ecmfq/gemm_decode.cuh"
#include "ecmfq/launch.cuh"

namespace ecmfq {
namespace {

template <Gemm kGemm, bool kGrouped, WeightLayout kLayout, int kTokenTiles>
bool run(const GemmArguments& a, Stream stream) {
  const dim3 grid(static_cast<unsigned>(a.row_tiles), static_cast<unsigned>(a.sorted_slots));
  return launch(&gemm_decode_kernel<kGemm, kGrouped, kLayout, kTokenTiles>, grid, dim3(kDecodeThreads),
                decode_shared_bytes<kTokenTiles>(), stream, a);
}

template <Gemm kGemm, bool kGrouped, WeightLayout kLayout>
bool run_tiling(const GemmArguments& a, Tiling tiling, Stream stream) {
  return tiling == Tiling::kDecode8 ? run<kGemm, kGrouped, kLayout, 1>(a, stream) : run<kGemm, kGrouped, kLayout, 4>(a, stream);
}

template <Gemm kGemm, bool kGrouped>
bool run_layout(const GemmArguments& a, WeightLayout layout, Tiling tiling, Stream stream) {
  return layout == WeightLayout::kMmaS8 ? run_tiling<kGemm, kGrouped, WeightLayout::kMmaS8>(a, tiling, stream)
                                        : run_tiling<kGemm, kGrouped, WeightLayout::kRowMajor>(a, tiling, stream);
}

template <Gemm kGemm>
bool run_grouping(const GemmArguments& a, const MoeProblem& p, Tiling tiling, Stream stream) {
  return p.grouped ? run_layout<kGemm, true>(a, p.weight_layout, tiling, stream)
                   : run_layout<kGemm, false>(a, p.weight_layout, tiling, stream);
}

}  // namespace

bool launch_gemm_decode(Gemm gemm, const MoeProblem& p, const GemmArguments& arguments, Tiling tiling, Stream stream) {
  GemmArguments a = arguments;
  a.sorted_slots = static_cast<int32_t>(p.num_pairs() < p.num_experts ? p.num_pairs() : p.num_experts);
  return gemm == Gemm::kGateUp ? run_grouping<Gemm::kGateUp>(a, p, tiling, stream) : run_grouping<Gemm::kDown>(a, p, tiling, stream);
}

}  // namespace ecmfq
