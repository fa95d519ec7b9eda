// The low-rank terms of rows whose mix is not the resident one, added to a product.

#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "storage.h"

namespace {

// The low-rank term of one module for one batch, as `KernelCorrection` lays it out: addresses, since a
// compiled graph must take any number of adapters without being compiled anew.
struct Term {
  int64_t domains;         // 0: no correction, whatever the rest says.
  const int64_t* factors;  // (domains, 3): address of A (r, in), of B (r, out), and r.
  int64_t in;
  int64_t out;
  const float* gates;   // (gate_rows, domains), scaling included.
  int64_t gate_rows;
  const int64_t* rows;  // (tokens,): row of each token in `gates`.
  int64_t tokens;
};

constexpr int64_t kTermFields = 8;

// Read a term for a product of x (tokens, in) to (tokens, out). An address does not tell how much
// lies there, so what does not fit is refused here: beyond the tables `correct` would read anything.
Term read_term(const Tensor& header, int64_t tokens, int64_t in, int64_t out) {
  TORCH_CHECK(header.scalar_type() == at::kLong && header.is_contiguous() &&
                  header.numel() == kTermFields,
              "linear: a term has ", kTermFields, " fields");
  const int64_t* field = data<int64_t>(header);
  const Term term = {field[0],
                     reinterpret_cast<const int64_t*>(field[1]),
                     field[2],
                     field[3],
                     reinterpret_cast<const float*>(field[4]),
                     field[5],
                     reinterpret_cast<const int64_t*>(field[6]),
                     field[7]};
  if (!term.domains) return term;
  TORCH_CHECK(term.tokens == tokens, "linear: a correction of ", term.tokens, " tokens meets ",
              tokens);
  TORCH_CHECK(term.in == in && term.out == out, "linear: a correction of ", term.in,
              " features to ", term.out, " meets ", in, " to ", out);
  for (int64_t t = 0; t < tokens; t++)
    TORCH_CHECK(0 <= term.rows[t] && term.rows[t] < term.gate_rows, "linear: a correction of ",
                term.gate_rows, " rows meets row ", term.rows[t]);
  return term;
}

// y[t] += sum over domains d of gates[row of t][d] (x[t] A_d^T) B_d^T, in place.
//
// A gate of 0 costs nothing and hides whatever its factors hold.
template <class T>
void correct(T* y, const float* x, int64_t tokens, int64_t in, int64_t out, const Term& term) {
  at::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scales;
    std::vector<const float*> terms;
    for (int64_t t = begin; t < end; t++) {
      const float* xt = x + t * in;
      scales.clear();
      terms.clear();
      for (int64_t d = 0; d < term.domains; d++) {
        const float gate = term.gates[term.rows[t] * term.domains + d];
        if (gate == 0.0f) continue;
        const float* a = reinterpret_cast<const float*>(term.factors[3 * d]);
        const float* b = reinterpret_cast<const float*>(term.factors[3 * d + 1]);
        for (int64_t r = 0; r < term.factors[3 * d + 2]; r++) {
          const float* row = a + r * in;
          floats total[4] = {};
          int64_t k = 0;
          for (; k + 4 * kLanes <= in; k += 4 * kLanes)
            for (int v = 0; v < 4; v++)
              total[v] += load(xt + k + v * kLanes) * load(row + k + v * kLanes);
          float low = sum((total[0] + total[1]) + (total[2] + total[3]));
          for (; k < in; k++) low += xt[k] * row[k];
          scales.push_back(low * gate);
          terms.push_back(b + r * out);
        }
      }
      if (terms.empty()) continue;
      T* yt = y + t * out;
      const size_t count = terms.size();
      int64_t j = 0;
      for (; j + 2 * kLanes <= out; j += 2 * kLanes) {
        floats first = load(yt + j), second = load(yt + j + kLanes);
        for (size_t i = 0; i < count; i++) {
          first += scales[i] * load(terms[i] + j);
          second += scales[i] * load(terms[i] + j + kLanes);
        }
        store(yt + j, first);
        store(yt + j + kLanes, second);
      }
      for (; j < out; j++) {
        floats rest{};
        rest[0] = as_float(yt[j]);
        for (size_t i = 0; i < count; i++) rest[0] += scales[i] * terms[i][j];
        T last[kLanes];
        store(last, rest);
        yt[j] = last[0];
      }
    }
  });
}

}  // namespace
