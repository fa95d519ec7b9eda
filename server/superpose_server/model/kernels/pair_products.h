// Products in bfloat16 by vdpbf16ps, which adds the products of a pair of input features to a float32
// sum: for processors that have it and no tiles.

#pragma once

#include <ATen/Parallel.h>

#include "result.h"

#ifdef __AVX512F__
#pragma GCC push_options
#pragma GCC target("avx512bf16")

namespace {

// Rows whose sums stay in registers.
constexpr int64_t kPairRows = 12;

// sums[m][j] = sum over k of x[m][k] w[k][j] for the features of one panel.
template <int M>
void pair_sums(const bfloat* x, int64_t stride, int64_t depth, const bfloat* w, float* sums) {
  __m512 total[M];
  for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    const auto pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + k * kPanel));
    __builtin_prefetch(w + k * kPanel + 2048);
    for (int m = 0; m < M; m++) {
      int32_t pair;
      __builtin_memcpy(&pair, x + m * stride + k, sizeof pair);
      const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      total[m] = _mm512_dpbf16_ps(total[m], both, pairs);
    }
  }
  for (int m = 0; m < M; m++) _mm512_storeu_ps(sums + m * kPanel, total[m]);
}

// x (rows, depth), depth as the panels have it, times packed w, plus bias, to y (rows, out).
void pair_products(const bfloat* x, int64_t rows, int64_t depth, const bfloat* w, bfloat* y,
                   int64_t out, const bfloat* bias) {
  constexpr decltype(&pair_sums<1>) kSums[] = {
      pair_sums<1>, pair_sums<2>, pair_sums<3>, pair_sums<4>,  pair_sums<5>,  pair_sums<6>,
      pair_sums<7>, pair_sums<8>, pair_sums<9>, pair_sums<10>, pair_sums<11>, pair_sums<12>};
  const int64_t parts = (rows + kPairRows - 1) / kPairRows;
  at::parallel_for(0, (out + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kPairRows * kPanel];
    for (int64_t panel = begin; panel < end; panel++) {
      const int64_t first = panel * kPanel, features = std::min(kPanel, out - first);
      for (int64_t i = 0, done = 0; i < parts; i++) {
        const int64_t some = (rows - done + parts - i - 1) / (parts - i);
        kSums[some - 1](x + done * depth, depth, depth, w + first * depth, sums);
        for (int64_t m = 0; m < some; m++)
          finish_row(sums + m * kPanel, y + (done + m) * out + first, features,
                     bias ? bias + first : nullptr);
        done += some;
      }
    }
  });
}

}  // namespace

#pragma GCC pop_options
#endif
