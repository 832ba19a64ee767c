// launch.cuh - the host functions of plugins/src: each puts its kernels on a stream and says whether CUDA took them. They neither
// allocate nor synchronize. Arguments are taken as checked (capi/ecmfq.cu).
#pragma once

#include "ecmfq/gemm.cuh"
#include "ecmfq/planner.cuh"

namespace ecmfq {

// src/rows.cu
bool launch_prepare(const MoeProblem& problem, const MoeTensors& tensors, const MoeWorkspace& at, unsigned char* workspace, Stream stream);
bool launch_quantize_intermediate(const MoeProblem& problem, const MoeWorkspace& at, unsigned char* workspace, Stream stream);
bool launch_sum_slots(const MoeProblem& problem, const MoeTensors& tensors, const MoeWorkspace& at, unsigned char* workspace,
                      int first_column, int columns, Stream stream);

// src/gemm_decode.cu, src/gemm_prefill.cu
bool launch_gemm_decode(Gemm gemm, const MoeProblem& problem, const GemmArguments& arguments, Tiling tiling, Stream stream);
bool launch_gemm_prefill(Gemm gemm, const MoeProblem& problem, const GemmArguments& arguments, int blocks, Stream stream);

// src/routed_moe.cu: the whole layer. workspace: workspace_layout(problem).bytes, aligned to kWorkspaceAlignment.
bool launch_routed_moe(const MoeProblem& problem, const MoeTensors& tensors, const MoePlan& plan, void* workspace, Stream stream);

}  // namespace ecmfq
