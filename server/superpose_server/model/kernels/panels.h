// How a parameter lies in memory: (panels, in / kSide, 16, kSide), where panel p holds output features
// 16p..16p+15 of every input feature. kSide input features lie side by side, 4 bytes in all: one of
// float32, two of bfloat16, as instructions for bfloat16 want them. A product then reads memory once,
// in order, whatever the checkpoint's layout, and a fold writes it the same way.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t kPanel = 16;
// Vectors of float32 that hold one input feature of a panel.
constexpr int kVectors = kPanel / kLanes;

template <class T>
constexpr int kSide = 4 / sizeof(T);

// Input features of a panel, those added for the layout included: what is added is zero. Tiles take 32
// features of bfloat16 at a time.
template <class T>
constexpr int64_t padded(int64_t depth) {
  constexpr int64_t whole = sizeof(T) == 4 ? 1 : 32;
  return (depth + whole - 1) / whole * whole;
}

// The input features of a panel that lie side by side, from `at` on.
inline void load_features(const float* at, floats (&row)[1][kVectors]) {
  for (int v = 0; v < kVectors; v++) row[0][v] = load(at + v * kLanes);
}

inline void load_features(const bfloat* at, floats (&row)[2][kVectors]) {
  for (int v = 0; v < kVectors; v++) load_pairs(at + 2 * v * kLanes, row[0][v], row[1][v]);
}

// Store 4 kLanes bytes past the caches: a folded parameter is far larger than they are, and is read
// much later.
inline void stream(void* at, words value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(at), reinterpret_cast<__m512i>(value));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(at), reinterpret_cast<__m256i>(value));
#else
  store(static_cast<float*>(at), reinterpret_cast<floats>(value));
#endif
}

// The reverse of `load_features`, past the caches.
inline void stream_features(float* at, const floats (&row)[1][kVectors]) {
  for (int v = 0; v < kVectors; v++) stream(at + v * kLanes, reinterpret_cast<words>(row[0][v]));
}

inline void stream_features(bfloat* at, const floats (&row)[2][kVectors]) {
  for (int v = 0; v < kVectors; v++)
    stream(at + 2 * v * kLanes, upper_half(row[1][v]) << 16 | upper_half(row[0][v]));
}

inline void finish_streams() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace
