// Attention over slots.

#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "storage.h"

namespace {

// Start to load `count` numbers.
template <class T>
inline void fetch(const T* at, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(at + i, 0, 3);
}

// What becomes of a product of query and key before the softmax.
struct Scoring {
  float scale;
  float softcap;  // 0: none.
};

// What few models ask for is kept out of line: inside, it would cost the others registers.
[[gnu::noinline]] void cap(float* scores, int64_t count, float softcap) {
  for (int64_t p = 0; p < count; p += kLanes)
    store(scores + p, tangent(load(scores + p) / softcap) * softcap);
}

[[gnu::noinline]] float weight_of_sink(float score) { return exponential(floats{} + score)[0]; }

// Vectors of a row of numbers that one loop takes at a time. In bfloat16 one load holds two: those at
// even places come first, then those at odd ones; see `in_order`.
template <class T>
constexpr int kTaken = sizeof(T) == sizeof(float) ? 16 / kLanes : 2;

template <int V>
inline void load_row(const float* at, floats (&row)[V]) {
  for (int v = 0; v < V; v++) row[v] = load(at + v * kLanes);
}

inline void load_row(const bfloat* at, floats (&row)[2]) { load_pairs(at, row[0], row[1]); }

// Put what was summed over such rows in the order of the numbers.
template <class T, int V>
inline void in_order(floats (&row)[V]) {
  if constexpr (sizeof(T) != sizeof(float)) {
    const floats even = row[0], odd = row[1];
    const auto merged = [&]<int... Lane>(int from, std::integer_sequence<int, Lane...>) {
      return __builtin_shuffle(even, odd, integers{from + Lane / 2 + Lane % 2 * kLanes...});
    };
    row[0] = merged(0, kEachLane);
    row[1] = merged(kLanes / 2, kEachLane);
  }
}

// One head of one token. The keys and values of a head are too short a run for the processor to
// foresee, so each loop fetches what the next one reads: `next`, the keys of the head after this.
// `sink`, where there is one, is a score whose value is 0.
template <class T>
void attend_one(const T* q, const T* keys, const T* values, const T* next, int64_t count,
                int64_t size, int64_t value_size, Scoring scoring, const float* sink,
                float* weights, float* query, T* out) {
  constexpr int V = kTaken<T>;
  constexpr int64_t kRow = V * kLanes;
  const float scale = scoring.scale;
  const int64_t whole = size / kRow * kRow, vectors = size / kLanes * kLanes;
  floats row[V];
  for (int64_t i = 0; i < whole; i += kRow) {
    load_row(q + i, row);
    for (int v = 0; v < V; v++) store(query + i + v * kLanes, row[v] * scale);
  }
  for (int64_t i = whole; i < vectors; i += kLanes) store(query + i, load(q + i) * scale);
  for (int64_t i = vectors; i < size; i++) query[i] = as_float(q[i]) * scale;
  for (int64_t p = 0; p < count; p++) {
    const T* key = keys + p * size;
    fetch(values + p * value_size, value_size);
    floats dots[V] = {};
    for (int64_t i = 0; i < whole; i += kRow) {
      load_row(key + i, row);
      for (int v = 0; v < V; v++) dots[v] += load(query + i + v * kLanes) * row[v];
    }
    for (int64_t i = whole; i < vectors; i += kLanes) dots[0] += load(query + i) * load(key + i);
    float dot = sum(dots[0] + (V == 2 ? dots[V - 1] : floats{}));
    for (int64_t i = vectors; i < size; i++) dot += query[i] * as_float(key[i]);
    weights[p] = dot;
  }
  floats peaks = floats{} - std::numeric_limits<float>::infinity();
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  if (scoring.softcap != 0.0f) cap(weights, padded, scoring.softcap);
  for (int64_t p = count; p < padded; p++) weights[p] = -std::numeric_limits<float>::infinity();
  for (int64_t p = 0; p < padded; p += kLanes) {
    const floats w = load(weights + p);
    peaks = w > peaks ? w : peaks;
  }
  float peak = largest(peaks);
  if (sink) peak = std::max(peak, *sink);
  floats sums{};
  for (int64_t p = 0; p < padded; p += kLanes) {
    const floats w = exponential(load(weights + p) - peak);
    store(weights + p, w);
    if (p + kLanes <= count) {
      sums += w;
    } else {
      for (int64_t lane = 0; lane < count - p; lane++) sums[lane] += w[lane];
    }
  }
  float total_weight = sum(sums);
  if (sink) total_weight += weight_of_sink(*sink - peak);
  const float share = 1.0f / total_weight;
  const int64_t whole_value = value_size / kRow * kRow;
  constexpr int kWide = 64 / kRow;  // Sums that stay in registers: 64 numbers, a usual head.
  int64_t i = 0;
  const auto add_up = [&]<int Rows>(std::integral_constant<int, Rows>) {
    floats total[Rows][V] = {};
    for (int64_t p = 0; p < count; p++) {
      fetch(next + p * size + i, Rows * kRow);
      for (int r = 0; r < Rows; r++) {
        load_row(values + p * value_size + i + r * kRow, row);
        for (int v = 0; v < V; v++) total[r][v] += weights[p] * row[v];
      }
    }
    for (int r = 0; r < Rows; r++, i += kRow) {
      in_order<T>(total[r]);
      for (int v = 0; v < V; v++) store(out + i + v * kLanes, total[r][v] * share);
    }
  };
  while (i + kWide * kRow <= value_size) add_up(std::integral_constant<int, kWide>{});
  while (i < whole_value) add_up(std::integral_constant<int, 1>{});
  for (; i + kLanes <= value_size; i += kLanes) {
    floats one{};
    for (int64_t p = 0; p < count; p++) one += weights[p] * load(values + p * value_size + i);
    store(out + i, one * share);
  }
  for (; i < value_size; i++) {
    floats one{};
    for (int64_t p = 0; p < count; p++) one[0] += weights[p] * as_float(values[p * value_size + i]);
    T last[kLanes];
    store(last, one * share);
    out[i] = last[0];
  }
}

// Causal attention of q (1, query heads, tokens, size): token t reads positions starts[t] to
// positions[t] of slots[t], at most the last `window` of them, in keys (slots, heads, length, size)
// and values (slots, heads, length, value size). Returns (1, tokens, query heads, value size).
//
// A score s becomes softcap * tanh(s / softcap); `sinks`, one a query head, are scores whose values
// are 0.
Tensor attend(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& slots,
              const Tensor& starts, const Tensor& positions, double scale,
              std::optional<int64_t> window, std::optional<double> softcap,
              const std::optional<Tensor>& sinks) {
  TORCH_CHECK(q.dim() == 4 && keys.dim() == 4 && values.dim() == 4,
              "attend: four dimensions expected");
  const int64_t query_heads = q.size(1), tokens = q.size(2), size = q.size(3);
  const int64_t heads = keys.size(1), length = keys.size(2), value_size = values.size(3);
  TORCH_CHECK(q.size(0) == 1 && (q.stride(3) == 1 || size == 1) && keys.is_contiguous() &&
                  values.is_contiguous() && keys.size(3) == size && heads > 0 &&
                  query_heads % heads == 0 && values.size(0) == keys.size(0) &&
                  values.size(1) == heads && values.size(2) == length &&
                  q.scalar_type() == keys.scalar_type() &&
                  q.scalar_type() == values.scalar_type(),
              "attend: shapes do not fit");
  for (const Tensor* table : {&slots, &starts, &positions})
    TORCH_CHECK(table->scalar_type() == at::kLong && table->is_contiguous() &&
                    table->numel() == tokens,
                "attend: slots, starts and positions are int64, one a token");
  TORCH_CHECK(!window || *window >= 1, "attend: a window of ", *window, " positions");
  const Scoring scoring = {static_cast<float>(scale),
                           softcap ? static_cast<float>(*softcap) : 0.0f};
  TORCH_CHECK(!softcap || (scoring.softcap > 0.0f && std::isfinite(scoring.softcap)),
              "attend: a softcap of ", *softcap);
  TORCH_CHECK(!sinks || (sinks->numel() == query_heads &&
                         (sinks->scalar_type() == at::kFloat ||
                          sinks->scalar_type() == q.scalar_type())),
              "attend: sinks are float32 or as the query, one a query head");
  const int64_t* slot = data<int64_t>(slots);
  const int64_t* start = data<int64_t>(starts);
  const int64_t* position = data<int64_t>(positions);
  for (int64_t t = 0; t < tokens; t++)
    TORCH_CHECK(0 <= slot[t] && slot[t] < keys.size(0) && 0 <= start[t] &&
                    start[t] <= position[t] && position[t] < length,
                "attend: positions ", start[t], " to ", position[t], " of slot ", slot[t],
                " are not all in ", keys.size(0), " slots of ", length);
  Tensor result = at::empty({1, tokens, query_heads, value_size}, q.options());
  const Tensor wide = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  const float* sink = sinks ? data<float>(wide) : nullptr;
  // A window that no position is beyond stands for none.
  const int64_t most = window.value_or(std::numeric_limits<int64_t>::max());
  const int64_t group = query_heads / heads;
  with_storage(q, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = data<T>(q);
    const T* key = data<T>(keys);
    const T* value = data<T>(values);
    T* to = data<T>(result);
    at::parallel_for(0, tokens * query_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> room(length + kLanes + size);
      float* weights = room.data();
      float* query = weights + length + kLanes;
      const auto first_of = [&](int64_t t) { return std::max(start[t], position[t] - most + 1); };
      // Where in the slots the first position of a head of a token is, counted in positions.
      const auto place = [&](int64_t i) {
        const int64_t t = i / query_heads, h = i % query_heads;
        return (slot[t] * heads + h / group) * length + first_of(t);
      };
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = i / query_heads, h = i % query_heads, at = place(i);
        attend_one(from + h * q.stride(1) + t * q.stride(2), key + at * size,
                   value + at * value_size, key + place(std::min(i + 1, end - 1)) * size,
                   position[t] + 1 - first_of(t), size, value_size, scoring,
                   sink ? sink + h : nullptr, weights, query, to + i * value_size);
      }
    });
  });
  return result;
}

}  // namespace
