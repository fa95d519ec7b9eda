// The end of every product: from float32 sums to a row of the result.

#pragma once

#include "panels.h"

namespace {

// y[j] = sums[j] + bias[j], rounded once; `sums` holds whole panels.
template <class T>
inline void finish_row(const float* sums, T* y, int64_t features, const T* bias) {
  for (int64_t j = 0; j < features; j += kLanes) {
    floats row = load(sums + j);
    if (j + kLanes <= features) {
      store(y + j, row + (bias ? load(bias + j) : floats{}));
      continue;
    }
    T last[kLanes];
    for (int lane = 0; lane < features - j; lane++)
      row[lane] += bias ? as_float(bias[j + lane]) : 0.0f;
    store(last, row);
    std::copy_n(last, features - j, y + j);
  }
}

}  // namespace
