// Folds: base + the sum of weighted deltas, in panels, in one pass over memory.

#pragma once

#include <ATen/Parallel.h>

#include "panels.h"
#include "storage.h"

namespace {

// Accumulators of 6 rows x 16 features fill 12 of 16 vector registers.
constexpr int kFoldRows = 6;

// `Rows` input features, a multiple of kSide.
template <int Rows, int Rank, class T>
inline void fold_rows(T* out, const T* base, const float* a, const float* b, int64_t any_rank) {
  constexpr int S = kSide<T>;
  const int64_t rank = Rank ? Rank : any_rank;
  floats total[Rows / S][S][kVectors];
  for (int i = 0; i < Rows / S; i++) {
    __builtin_prefetch(base + i * S * kPanel + 4096 / sizeof(T));
    load_features(base + i * S * kPanel, total[i]);
  }
#pragma GCC unroll 2
  for (int64_t r = 0; r < rank; r += 4) {
#pragma GCC unroll 4
    for (int64_t s = r; s < r + 4; s++) {
      floats row[kVectors];
      for (int v = 0; v < kVectors; v++) row[v] = load(b + s * kPanel + v * kLanes);
      for (int i = 0; i < Rows; i++) {
        const float scale = a[i * rank + s];
        for (int v = 0; v < kVectors; v++) total[i / S][i % S][v] += scale * row[v];
      }
    }
  }
  for (int i = 0; i < Rows / S; i++) stream_features(out + i * S * kPanel, total[i]);
}

// One panel. The commonest ranks have loops of known length.
template <int Rank, class T>
void fold_panel(T* out, const T* base, const float* a, const float* b, int64_t depth,
                int64_t rank) {
  int64_t k = 0;
  for (; k + kFoldRows <= depth; k += kFoldRows)
    fold_rows<kFoldRows, Rank>(out + k * kPanel, base + k * kPanel, a + k * rank, b, rank);
  for (; k < depth; k += kSide<T>)
    fold_rows<kSide<T>, Rank>(out + k * kPanel, base + k * kPanel, a + k * rank, b, rank);
}

// out = base + a b in panels: a float32 (in as the panels have it, R), b float32 (panels, R, 16), R a
// multiple of 4.
void fold(Tensor out, const Tensor& base, const Tensor& a, const Tensor& b) {
  TORCH_CHECK(out.dim() == 4 && a.dim() == 2 && b.dim() == 3, "fold: shapes do not fit");
  const int64_t panels = out.size(0), depth = out.size(1) * out.size(3), rank = a.size(1);
  TORCH_CHECK(out.is_contiguous() && base.is_contiguous() && a.is_contiguous() &&
                  b.is_contiguous() && base.sizes() == out.sizes() && rank % 4 == 0 &&
                  base.scalar_type() == out.scalar_type() && a.size(0) == depth &&
                  b.size(0) == panels && b.size(1) == rank && b.size(2) == kPanel,
              "fold: shapes do not fit");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0, "fold: out is not aligned");
  with_storage(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    TORCH_CHECK(out.size(2) == kPanel && out.size(3) == kSide<T> && depth == padded<T>(depth),
                "fold: shapes do not fit");
    T* to = data<T>(out);
    const T* from = data<T>(base);
    const float* left = data<float>(a);
    const float* right = data<float>(b);
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t at = panel * depth * kPanel;
        const float* factors = right + panel * rank * kPanel;
        const auto run = rank == 4   ? fold_panel<4, T>
                         : rank == 8 ? fold_panel<8, T>
                                     : fold_panel<0, T>;
        run(to + at, from + at, left, factors, depth, rank);
      }
      finish_streams();
    });
  });
}

}  // namespace
