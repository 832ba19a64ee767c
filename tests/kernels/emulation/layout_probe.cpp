// layout_probe.cpp - the index math of layout.cuh for ctypes, so that Python can compare it with kernel_layout.py. Built into the
// emulated library alone.
#include "ecmfq/layout.cuh"
#include "ecmfq/planner.cuh"

#define PROBE extern "C" __attribute__((visibility("default")))

// For every byte of one expert's prepacked weights, the canonical byte that belongs there.
PROBE void probe_canonical_bytes(int32_t gate_up, int32_t rows, int32_t cols, int64_t* canonical) {
  const int32_t col_tiles = cols / ecmfq::kTileCols;
  for (int32_t row_tile = 0; row_tile < rows / ecmfq::kTileRows; ++row_tile) {
    for (int32_t col_tile = 0; col_tile < col_tiles; ++col_tile) {
      for (int32_t lane = 0; lane < 32; ++lane) {
        for (int32_t word = 0; word < 4; ++word) {
          const int64_t packed = ecmfq::packed_word_offset(row_tile, col_tile, col_tiles, lane, word);
          const int64_t from =
              gate_up ? ecmfq::row_major_word_offset<ecmfq::Gemm::kGateUp>(row_tile, col_tile, cols, rows / 2, lane, word)
                      : ecmfq::row_major_word_offset<ecmfq::Gemm::kDown>(row_tile, col_tile, cols, 0, lane, word);
          for (int byte = 0; byte < 4; ++byte) canonical[packed + byte] = from + byte;
        }
      }
    }
  }
}

PROBE void probe_activation_positions(int32_t cols, int32_t* position) {
  for (int32_t col = 0; col < cols; ++col) position[col] = ecmfq::activation_position(col);
}

PROBE uint32_t probe_even_columns(uint32_t word) { return ecmfq::even_columns(word); }
PROBE uint32_t probe_odd_columns(uint32_t word) { return ecmfq::odd_columns(word); }

// The planner's choice: tiling, columns between sums.
PROBE void probe_plan(int32_t tokens, int32_t experts, int32_t top_k, int32_t hidden, int32_t intermediate, int32_t* tiling,
                      int32_t* columns) {
  ecmfq::MoeProblem p{};
  p.num_tokens = tokens;
  p.num_experts = experts;
  p.top_k = top_k;
  p.hidden_size = hidden;
  p.intermediate_size = intermediate;
  p.num_sms = 16;
  const ecmfq::MoePlan plan = ecmfq::make_plan(p);
  *tiling = static_cast<int32_t>(plan.tiling);
  *columns = plan.term_columns;
}
