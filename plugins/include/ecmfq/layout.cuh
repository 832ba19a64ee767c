// layout.cuh - where each weight and activation byte lives. Pure index math, host and device, tested on the CPU against
// ecmfq_export/quant/kernel_layout.py, which is the definition of the prepacked layout.
#pragma once

#include "ecmfq/device.cuh"

namespace ecmfq {

// A weight tile is 32 rows x 32 columns of int4: 512 bytes, 16 for each lane of a warp. It feeds two m16n8k32 instructions whose 16-row
// operands are rows 0..15 and rows 16..31.
constexpr int kTileRows = 32;
constexpr int kTileCols = 32;
constexpr int kTileBytes = kTileRows * kTileCols / 2;
constexpr int kLaneBytes = 16;
constexpr int kGroupSize = 128;

enum class WeightLayout : int32_t { kRowMajor = 0, kMmaS8 = 1 };
// Which of the two matrices: gate_up [E, 2I, H] or down [E, H, I].
enum class Gemm : int32_t { kGateUp = 0, kDown = 1 };

// The tile's row -> the canonical matrix's row. A gate_up tile holds 16 gate rows and the 16 matching up rows, so one lane
// ends with gate and up of the same channel in its accumulators and SiLU(gate) * up needs no exchange.
// `intermediate`: I, used for gate_up alone.
template <Gemm kGemm>
ECMFQ_HOST_DEVICE int canonical_row(int row_tile, int row_in_tile, int intermediate) {
  if (kGemm == Gemm::kDown) return row_tile * kTileRows + row_in_tile;
  const int half = row_in_tile >> 4;
  return half * intermediate + row_tile * (kTileRows / 2) + (row_in_tile & 15);
}

// A lane's four 32-bit words of a tile: word w is row 8 * w + lane / 4, columns 8 * (lane % 4) .. + 7, as in the canonical layout
// (low nibble = even column). Prepacking therefore moves whole words and never touches a nibble.
ECMFQ_HOST_DEVICE int word_row(int lane, int word) { return 8 * word + (lane >> 2); }
ECMFQ_HOST_DEVICE int word_col(int lane) { return 8 * (lane & 3); }

// Byte offset within one expert of a tile in the prepacked layout [rows / 32][cols / 32][lane][word].
ECMFQ_HOST_DEVICE int64_t packed_tile_offset(int row_tile, int col_tile, int col_tiles) {
  return (static_cast<int64_t>(row_tile) * col_tiles + col_tile) * kTileBytes;
}
ECMFQ_HOST_DEVICE int64_t packed_word_offset(int row_tile, int col_tile, int col_tiles, int lane, int word) {
  return packed_tile_offset(row_tile, col_tile, col_tiles) + lane * kLaneBytes + word * 4;
}
// Byte offset within one expert of the same word in the canonical layout.
template <Gemm kGemm>
ECMFQ_HOST_DEVICE int64_t row_major_word_offset(int row_tile, int col_tile, int cols, int intermediate, int lane, int word) {
  const int row = canonical_row<kGemm>(row_tile, word_row(lane, word), intermediate);
  return static_cast<int64_t>(row) * (cols / 2) + (col_tile * kTileCols + word_col(lane)) / 2;
}

// int4 -> int8 in registers: the nibble stays in the high half of its byte, so the value is 16 * q. One shift and two ands make
// eight operands; the accumulator is 16 times too large, exactly, and is shifted back once.
constexpr int kNibbleShift = 4;
ECMFQ_HOST_DEVICE uint32_t even_columns(uint32_t word) { return (word << 4) & 0xf0f0f0f0u; }
ECMFQ_HOST_DEVICE uint32_t odd_columns(uint32_t word) { return word & 0xf0f0f0f0u; }

// Quantized activations: within each 8 columns the four even ones come first, then the four odd ones, to match the words
// above. A lane's B fragment is then 8 contiguous bytes: {b0, b1} = columns 8 * (lane % 4) .. + 7 of its token.
ECMFQ_HOST_DEVICE int activation_position(int col) { return (col & ~7) | ((col & 1) << 2) | ((col & 7) >> 1); }

// Shared-memory place of a token's 32-byte piece `k` (0 or 1) of a 64-byte row. Rows two apart swap their pieces: the four
// rows that a half-warp reads in one 8-byte access then fall on different banks.
ECMFQ_HOST_DEVICE int swizzled_piece(int row, int k) { return k ^ ((row >> 1) & 1); }

}  // namespace ecmfq
