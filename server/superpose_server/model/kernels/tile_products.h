// Products in bfloat16 on AMX tiles: registers of 16 rows of 64 bytes, and an instruction that adds the
// product of two of them to float32 sums in a third.
//
// 32 input features of a panel are one tile as they lie in memory, (16 pairs, 16 features, 2), and 32
// numbers of up to 16 rows of x are another. A tile of fewer rows computes them alone: each output is
// summed in the same order whatever the number of rows.

#pragma once

#include <ATen/Parallel.h>

#include "result.h"

#ifdef __AVX512F__
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;
// Rows and panels of one pass over the input features: 2 x 2 tiles of sums, and 2 + 2 that are read.
constexpr int64_t kTilesRows = 2 * kTileRows;
constexpr int64_t kTilesWidth = 2 * kPanel;
// Bytes of x that all panels are taken through before the next rows: they stay in a second-level cache.
constexpr int64_t kTilesBytes = 1 << 20;

// Ask the system for tiles, which it keeps for those who ask; returns whether there are any.
bool tiles_allowed() {
#ifdef SYS_arch_prctl
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Lay out the tiles for `rows` rows: 0 to 3 hold sums (rows half, panel), 4 and 5 x, 6 and 7 panels.
void set_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } layout;
  const auto set = [&](int tile, int64_t count) {
    layout.rows[tile] = static_cast<uint8_t>(count);
    layout.bytes[tile] = 64;
  };
  const int64_t upper = std::min(rows, kTileRows), lower = rows - upper;
  for (int tile : {0, 1, 4}) set(tile, upper);
  if (lower)
    for (int tile : {2, 3, 5}) set(tile, lower);
  for (int tile : {6, 7}) set(tile, kTileRows);
  _tile_loadconfig(&layout);
}

// sums[m][j] = sum over k of x[m][k] w[k][j] for the features of `Panels` panels and for rows beyond
// 16 if `Lower`; sums (32, 32).
template <int Panels, bool Lower>
void tile_sums(const bfloat* x, int64_t depth, const bfloat* w, float* sums) {
  const int64_t panel = depth * kPanel, x_bytes = depth * 2;
  const bfloat* below = x + kTileRows * depth;
  _tile_zero(0);
  if constexpr (Panels == 2) _tile_zero(1);
  if constexpr (Lower) _tile_zero(2);
  if constexpr (Lower && Panels == 2) _tile_zero(3);
  // Nothing is fetched ahead here: the processor foresees these loads, and prefetches take their place.
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const bfloat* at = w + k * kPanel;
    _tile_loadd(4, x + k, x_bytes);
    _tile_loadd(6, at, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Panels == 2) {
      _tile_loadd(7, at + panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Lower) {
      _tile_loadd(5, below + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Panels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t kStride = kTilesWidth * 4;
  float* lower = sums + kTileRows * kTilesWidth;
  _tile_stored(0, sums, kStride);
  if constexpr (Panels == 2) _tile_stored(1, sums + kPanel, kStride);
  if constexpr (Lower) _tile_stored(2, lower, kStride);
  if constexpr (Lower && Panels == 2) _tile_stored(3, lower + kPanel, kStride);
}

// What one thread does of `tile_products`: panels from `begin` to `end`, in pairs.
void tile_panels(const bfloat* x, int64_t rows, int64_t depth, const bfloat* w, bfloat* y,
                 int64_t out, const bfloat* bias, int64_t begin, int64_t end) {
  alignas(64) float sums[kTilesRows * kTilesWidth];
  const int64_t together =
      std::max(kTilesRows, kTilesBytes / (depth * 2) / kTilesRows * kTilesRows);
  int64_t laid_out = 0;
  for (int64_t from = 0; from < rows; from += together)
    for (int64_t first = begin * kTilesWidth; first < std::min(out, end * kTilesWidth);
         first += kTilesWidth)
      for (int64_t row = from; row < std::min(rows, from + together); row += kTilesRows) {
        const int64_t some = std::min({kTilesRows, rows - row, from + together - row});
        if (some != laid_out) set_tiles(laid_out = some);
        const bool lower = some > kTileRows;
        const auto run = out - first > kPanel
                             ? (lower ? tile_sums<2, true> : tile_sums<2, false>)
                             : (lower ? tile_sums<1, true> : tile_sums<1, false>);
        run(x + row * depth, depth, w + first * depth, sums);
        for (int64_t m = 0; m < some; m++)
          finish_row(sums + m * kTilesWidth, y + (row + m) * out + first,
                     std::min(kTilesWidth, out - first), bias ? bias + first : nullptr);
      }
  _tile_release();  // Else the system would keep their state for this thread.
}

// x (rows, depth), depth as the panels have it, times packed w, plus bias, to y (rows, out).
void tile_products(const bfloat* x, int64_t rows, int64_t depth, const bfloat* w, bfloat* y,
                   int64_t out, const bfloat* bias) {
  at::parallel_for(0, (out + kTilesWidth - 1) / kTilesWidth, 1, [&](int64_t begin, int64_t end) {
    tile_panels(x, rows, depth, w, y, out, bias, begin, end);
  });
}

}  // namespace

#pragma GCC pop_options
#endif
