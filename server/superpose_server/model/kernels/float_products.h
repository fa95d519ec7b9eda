// Products with packed parameters in float32 arithmetic, whatever the storage, on any processor.

#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "result.h"

namespace {

// Input features of one pass over a panel: 16 KiB of float32, half of a first-level cache.
constexpr int64_t kDepth = 256;
// Rows whose partial sums are kept at once.
constexpr int64_t kRows = 60;
// Accumulators of 6 rows x 16 features fill 12 of 16 vector registers.
constexpr int kBlockRows = 6;

// What a block reads ahead while it computes: its own stream, or a share of the next pass.
struct Ahead {
  const char* next;
  int64_t step;
};

// sums[m][j] += sum over `depth` of x[k][m] w[k][j], for M rows and `Panels` panels; depth is a
// multiple of kSide.
template <int M, int Panels, class T>
inline void block(const float* x, const T* w, int64_t panel_stride, int64_t depth, float* sums,
                  bool first, Ahead ahead) {
  constexpr int V = Panels * kVectors;
  floats total[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++)
      total[m][v] = first ? floats{} : load(sums + (m * V + v) * kLanes);
  constexpr int S = kSide<T>;
  for (int64_t k = 0; k < depth; k += S) {
    floats b[S][V];
    for (int p = 0; p < Panels; p++) {
      const T* at = w + p * panel_stride + k * kPanel;
      if (!ahead.next) __builtin_prefetch(at + 2048 / sizeof(T));
      floats features[S][kVectors];
      load_features(at, features);
      for (int s = 0; s < S; s++)
        for (int v = 0; v < kVectors; v++) b[s][p * kVectors + v] = features[s][v];
    }
    if (ahead.next) {
      __builtin_prefetch(ahead.next, 0, 3);
      ahead.next += ahead.step * S;
    }
    for (int s = 0; s < S; s++)
      for (int m = 0; m < M; m++) {
        const float scale = x[(k + s) * M + m];
        for (int v = 0; v < V; v++) total[m][v] += scale * b[s][v];
      }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(sums + (m * V + v) * kLanes, total[m][v]);
}

template <int Panels, class T>
inline void blocks(int64_t rows, const float* x, const T* w, int64_t panel_stride, int64_t depth,
                   float* sums, bool first, Ahead ahead) {
#define ROWS(M)                                                       \
  case M:                                                             \
    if constexpr (M * Panels <= kBlockRows)                           \
      block<M, Panels>(x, w, panel_stride, depth, sums, first, ahead); \
    break;
  switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
#undef ROWS
}

// How the rows of one product are cut up: chunks of at most kRows, each in parts of almost equal
// size that fill the registers.
inline int64_t parts_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Lay `Rows` rows of one pass out as blocks read them: out[k][m] = x[m][k], 0 beyond `have` of n.
template <int Rows, class T>
void arrange_part(const T* x, int64_t depth, int64_t have, int64_t n, float* out) {
  for (int64_t k = 0; k < have; k++)
    for (int m = 0; m < Rows; m++) out[k * Rows + m] = as_float(x[m * depth + k]);
  std::fill(out + have * Rows, out + n * Rows, 0.0f);
}

// Lay x (rows, depth) out in the order in which blocks read it: by chunk, pass, part, then (k, m).
template <class T>
void arrange(const T* x, int64_t rows, int64_t depth, float* out) {
  constexpr decltype(&arrange_part<1, T>) kArrange[] = {arrange_part<1, T>, arrange_part<2, T>,
                                                        arrange_part<3, T>, arrange_part<4, T>,
                                                        arrange_part<5, T>, arrange_part<6, T>};
  const int64_t width = padded<T>(depth);
  const int64_t passes = (width + kDepth - 1) / kDepth;
  const int64_t chunks = (rows + kRows - 1) / kRows;
  // Few rows are arranged faster than a second thread wakes up.
  const int64_t together = std::max<int64_t>(1, 16384 / (std::min(rows, kRows) * kDepth + 1));
  at::parallel_for(0, chunks * passes, together, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t row = task / passes * kRows, k = task % passes * kDepth;
      const int64_t count = std::min(kRows, rows - row), parts = parts_of(count);
      const int64_t n = std::min(width - k, kDepth), have = std::min(depth - k, n);
      for (int64_t i = 0, done = 0; i < parts; i++) {
        const int64_t some = (count - done + parts - i - 1) / (parts - i);
        kArrange[some - 1](x + (row + done) * depth + k, depth, have, n,
                           out + row * width + k * count + done * n);
        done += some;
      }
    }
  });
}

// y[m][j] = bias[j] + sum over k of x[m][k] w[k][j] for the features of one or two panels, x as
// `arrange` lays it out, depth as the panels have it.
template <int Panels, class T>
void product(const float* x, int64_t rows, int64_t depth, const T* w, T* y, int64_t y_stride,
             int64_t features, const T* bias) {
  alignas(64) float sums[kRows * kPanel];
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = std::min(kRows, rows - row);
    const int64_t parts = parts_of(count);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t n = std::min(depth - k, kDepth);
      const T* part = w + k * kPanel;
      if (parts == 1) {
        blocks<Panels>(count, x, part, depth * kPanel, n, sums, k == 0, {});
        x += n * count;
        continue;
      }
      // Several blocks read this pass, and share out the fetching of the next.
      const int64_t share = n * kPanel * static_cast<int64_t>(sizeof(T)) / parts;
      const char* next = reinterpret_cast<const char*>(part + n * kPanel);
      int64_t done = 0;
      for (int64_t i = 0; i < parts; i++) {
        const int64_t some = (count - done + parts - i - 1) / (parts - i);
        const Ahead ahead = {next + i * share, share / n};
        float* to = sums + done * kPanel;
        blocks<1>(some, x, part, 0, n, to, k == 0, ahead);
        x += n * some;
        done += some;
      }
    }
    for (int64_t m = 0; m < count; m++)
      finish_row(sums + m * Panels * kPanel, y + (row + m) * y_stride, features, bias);
  }
}

// x (rows, depth) times packed w, plus bias, to y (rows, out).
template <class T>
void float_products(const T* x, int64_t rows, int64_t depth, const T* w, T* y, int64_t out,
                    const T* bias) {
  const int64_t width = padded<T>(depth);
  // Kept for the next product: fresh pages would cost more than filling them.
  thread_local std::vector<float> arranged;
  arranged.resize(std::max<size_t>(arranged.size(), rows * width));
  float* from = arranged.data();
  arrange(x, rows, depth, from);
  // Few rows leave registers free for a second panel, whose sums do not wait for the first's.
  const int64_t together = rows * 2 <= kBlockRows ? 2 : 1;
  const int64_t panels = (out + kPanel - 1) / kPanel;
  at::parallel_for(0, (panels + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++) {
      const int64_t panel = group * together;
      const int64_t count = std::min(together, panels - panel);
      const int64_t first = panel * kPanel;
      const auto run = count == 2 ? product<2, T> : product<1, T>;
      run(from, rows, width, w + first * width, y + first, out,
          std::min(count * kPanel, out - first), bias ? bias + first : nullptr);
    }
  });
}

}  // namespace
