// Vectors of float32 as wide as the processor's registers, and what is done with them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using bfloat = uint16_t;  // The upper half of a float's bits.

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float floats __attribute__((vector_size(kLanes * 4)));
typedef float floats_at __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef int32_t integers __attribute__((vector_size(kLanes * 4)));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t halves_at __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

constexpr std::make_integer_sequence<int, kLanes> kEachLane;

inline floats load(const float* at) { return *reinterpret_cast<const floats_at*>(at); }

// By intrinsics where there are any: of the generic form compilers make five instructions.
inline floats load(const bfloat* at) {
#if defined(__AVX512F__)
  const auto low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return reinterpret_cast<floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
#elif defined(__AVX2__)
  const auto low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return reinterpret_cast<floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16));
#else
  const halves low = *reinterpret_cast<const halves_at*>(at);
  return reinterpret_cast<floats>(__builtin_convertvector(low, words) << 16);
#endif
}

inline void store(float* at, floats value) { *reinterpret_cast<floats_at*>(at) = value; }

// 2 kLanes numbers that lie side by side: those at even places, and those at odd ones.
inline void load_pairs(const bfloat* at, floats& even, floats& odd) {
  const words pairs = reinterpret_cast<words>(load(reinterpret_cast<const float*>(at)));
  even = reinterpret_cast<floats>(pairs << 16);
  odd = reinterpret_cast<floats>(pairs & 0xFFFF0000u);
}

// 2 kLanes numbers that lie side by side, in an order that is the same for all of one type.
inline void load_two(const float* at, floats (&two)[2]) {
  two[0] = load(at);
  two[1] = load(at + kLanes);
}

inline void load_two(const bfloat* at, floats (&two)[2]) { load_pairs(at, two[0], two[1]); }

// Round to nearest, ties to even; the result is in the lower half of each word.
inline words upper_half(floats value) {
  const words bits = reinterpret_cast<words>(value);
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

inline halves rounded(floats value) {
  return __builtin_convertvector(upper_half(value), halves);
}

inline void store(bfloat* at, floats value) {
  *reinterpret_cast<halves_at*>(at) = rounded(value);
}

// The lanes in pairs: half the sum is in each half, then in each quarter, down to each lane.
template <int Width = kLanes / 2>
inline float sum(floats value) {
  if constexpr (Width == 0) {
    return value[0];
  } else {
    // The indices are constants of their own: from a loop they would be built anew at every call.
    return sum<Width / 2>(value + [&]<int... Lane>(std::integer_sequence<int, Lane...>) {
      return __builtin_shuffle(value, integers{(Lane ^ Width)...});
    }(kEachLane));
  }
}

inline float largest(floats value) {
  float found = value[0];
  for (int lane = 1; lane < kLanes; lane++) found = std::max(found, value[lane]);
  return found;
}

// exp of x <= 0 to about 2 units in the last place, NaN of NaN: 2^n times a polynomial on |r| <=
// ln(2)/2.
inline floats exponential(floats x) {
  const floats low = floats{} - 87.0f;
  x = x < low ? low : x;
  const floats magic = floats{} + 12582912.0f;  // 1.5 x 2^23: adding it rounds to an integer.
  const floats n = (x * 1.44269504f + magic) - magic;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floats p = floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const integers scale = (__builtin_convertvector(n, integers) + 127) << 23;
  return p * reinterpret_cast<floats>(scale);
}

// tanh to about 3 units in the last place, NaN of NaN. Near 0 a polynomial of its own (that of the
// Cephes library): there 1 - e^-2x would lose its digits.
inline floats tangent(floats x) {
  const words sign = reinterpret_cast<words>(x) & 0x80000000u;
  const floats size = reinterpret_cast<floats>(reinterpret_cast<words>(x) ^ sign);
  const floats e = exponential(size * -2.0f);
  const floats far = (1.0f - e) / (1.0f + e);
  const floats z = x * x;
  floats p = floats{} - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const floats near = p * z * x + x;
  return size < 0.625f ? near : reinterpret_cast<floats>(reinterpret_cast<words>(far) | sign);
}

inline float as_float(float value) { return value; }
inline float as_float(bfloat value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace
