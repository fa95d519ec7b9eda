// The low-rank terms of rows whose mix is not the resident one, added to a product.

#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "panels.h"
#include "storage.h"

namespace {

// The low-rank term of one module for one batch, as `KernelCorrection` lays it out: addresses, since a
// compiled graph must take any number of adapters without being compiled anew.
struct Term {
  int64_t domains;         // 0: no correction, whatever the rest says.
  const int64_t* factors;  // (domains, 3): addresses of A (r, in) and of B in panels, and r.
  int64_t width;           // Bytes of a number there.
  int64_t in;
  int64_t out;
  const float* gates;   // (gate_rows, domains), scaling included.
  int64_t gate_rows;
  const int64_t* rows;  // (tokens,): row of each token in `gates`.
  int64_t tokens;
};

constexpr int64_t kTermFields = 9;

// Read a term for a product of x (tokens, in) to (tokens, out). An address does not tell how much
// lies there, so what does not fit is refused here: beyond the tables `correct` would read anything.
Term read_term(const Tensor& header, int64_t tokens, int64_t in, int64_t out, int64_t width) {
  TORCH_CHECK(header.scalar_type() == at::kLong && header.is_contiguous() &&
                  header.numel() == kTermFields,
              "linear: a term has ", kTermFields, " fields");
  const int64_t* field = data<int64_t>(header);
  const Term term = {field[0],
                     reinterpret_cast<const int64_t*>(field[1]),
                     field[2],
                     field[3],
                     field[4],
                     reinterpret_cast<const float*>(field[5]),
                     field[6],
                     reinterpret_cast<const int64_t*>(field[7]),
                     field[8]};
  if (!term.domains) return term;
  TORCH_CHECK(term.tokens == tokens, "linear: a correction of ", term.tokens, " tokens meets ",
              tokens);
  TORCH_CHECK(term.in == in && term.out == out, "linear: a correction of ", term.in,
              " features to ", term.out, " meets ", in, " to ", out);
  TORCH_CHECK(term.width == width, "linear: factors of ", term.width, " bytes a number meet ", width);
  for (int64_t d = 0; d < term.domains; d++)
    TORCH_CHECK(term.factors[3 * d + 2] * width % 4 == 0, "linear: ", term.factors[3 * d + 2],
                " ranks fill no panel");
  for (int64_t t = 0; t < tokens; t++)
    TORCH_CHECK(0 <= term.rows[t] && term.rows[t] < term.gate_rows, "linear: a correction of ",
                term.gate_rows, " rows meets row ", term.rows[t]);
  return term;
}

// One domain of one token: where its low-dimensional numbers begin in a list of all.
struct Share {
  int64_t domain;
  float gate;
  int64_t at;
};

// Which domains each token has a gate for, in their order, and which tokens each domain has.
struct Shares {
  std::vector<Share> of_tokens;          // token after token
  std::vector<int64_t> first;            // (tokens + 1,): where in `of_tokens` each token begins
  std::vector<int64_t> tokens;           // domain after domain, as places in `of_tokens`
  std::vector<int64_t> owner;            // the token of each place in `of_tokens`
  std::vector<int64_t> domain_first;     // (domains + 1,)
  std::vector<float> low;                // gate * (x A^T), all ranks of all shares
};

// Fill the lists; returns how many numbers `low` has.
int64_t find_shares(const Term& term, Shares& shares) {
  const auto rank = [&](int64_t d) { return term.factors[3 * d + 2]; };
  shares.of_tokens.clear();
  shares.owner.clear();
  shares.first.assign(1, 0);
  shares.domain_first.assign(term.domains + 1, 0);
  int64_t numbers = 0;
  for (int64_t t = 0; t < term.tokens; t++) {
    const float* gates = term.gates + term.rows[t] * term.domains;
    for (int64_t d = 0; d < term.domains; d++) {
      if (gates[d] == 0.0f) continue;
      shares.of_tokens.push_back({d, gates[d], numbers});
      shares.owner.push_back(t);
      shares.domain_first[d + 1]++;
      numbers += rank(d);
    }
    shares.first.push_back(static_cast<int64_t>(shares.of_tokens.size()));
  }
  for (int64_t d = 0; d < term.domains; d++) shares.domain_first[d + 1] += shares.domain_first[d];
  shares.tokens.resize(shares.of_tokens.size());
  std::vector<int64_t> filled(shares.domain_first.begin(), shares.domain_first.end() - 1);
  for (size_t i = 0; i < shares.of_tokens.size(); i++)
    shares.tokens[filled[shares.of_tokens[i].domain]++] = static_cast<int64_t>(i);
  shares.low.resize(std::max<size_t>(shares.low.size(), numbers));
  return numbers;
}

// Multiplications below which one thread does all: another takes longer to wake up.
constexpr int64_t kAlone = 1 << 16;
// Rows of A, and tokens, whose products are summed at once: as many as there are registers for.
constexpr int kRanks = 4, kTokens = kLanes == 16 ? 4 : 2;
// Vectors of a result that are summed at once, and the panels that they fill.
constexpr int kSums = 8, kPanels = kSums / kVectors;

// Products of `Ranks` rows of A with `Tokens` rows of x. Each is summed in one order, whatever is
// summed beside it.
template <int Ranks, int Tokens, class T>
void dots(const T* a, const T* const* x, int64_t in, float (&result)[kTokens][kRanks]) {
  floats total[Tokens][Ranks] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= in; k += 2 * kLanes) {
    floats rows[Ranks][2];
    for (int r = 0; r < Ranks; r++) load_two(a + r * in + k, rows[r]);
    for (int t = 0; t < Tokens; t++) {
      floats xt[2];
      load_two(x[t] + k, xt);
      for (int r = 0; r < Ranks; r++) total[t][r] += xt[0] * rows[r][0];
      for (int r = 0; r < Ranks; r++) total[t][r] += xt[1] * rows[r][1];
    }
  }
  for (int t = 0; t < Tokens; t++)
    for (int r = 0; r < Ranks; r++) {
      float one = sum(total[t][r]);
      for (int64_t rest = k; rest < in; rest++)
        one += as_float(x[t][rest]) * as_float(a[r * in + rest]);
      result[t][r] = one;
    }
}

// The same for numbers of each that are known when it runs.
template <int Ranks = kRanks, int Tokens = kTokens, class T>
void dots_of(int ranks, int tokens, const T* a, const T* const* x, int64_t in,
             float (&result)[kTokens][kRanks]) {
  if constexpr (Ranks > 1)
    if (ranks < Ranks) return dots_of<Ranks - 1, Tokens>(ranks, tokens, a, x, in, result);
  if constexpr (Tokens > 1)
    if (tokens < Tokens) return dots_of<Ranks, Tokens - 1>(ranks, tokens, a, x, in, result);
  dots<Ranks, Tokens>(a, x, in, result);
}

// The low-dimensional numbers of one domain: its factor is read once for all of its tokens.
template <class T>
void project(const T* x, int64_t in, const Term& term, Shares& shares, int64_t domain) {
  const T* a = reinterpret_cast<const T*>(term.factors[3 * domain]);
  const int64_t rank = term.factors[3 * domain + 2];
  const int64_t end = shares.domain_first[domain + 1];
  for (int64_t r = 0; r < rank; r += kRanks)
    for (int64_t i = shares.domain_first[domain]; i < end; i += kTokens) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTokens, end - i));
      const int ranks = static_cast<int>(std::min<int64_t>(kRanks, rank - r));
      const T* rows[kTokens];
      for (int t = 0; t < tokens; t++) rows[t] = x + shares.owner[shares.tokens[i + t]] * in;
      float result[kTokens][kRanks];
      dots_of(ranks, tokens, a + r * in, rows, in, result);
      for (int t = 0; t < tokens; t++) {
        const Share& share = shares.of_tokens[shares.tokens[i + t]];
        for (int q = 0; q < ranks; q++) shares.low[share.at + r + q] = result[t][q] * share.gate;
      }
    }
}

// Add the terms of one token to `Panels` panels of its row of y, from panel p of B on.
template <int Panels, class T>
void add_panels(T* y, int64_t p, const Term& term, const Shares& shares, int64_t token) {
  floats total[Panels][kVectors];
  for (int q = 0; q < Panels; q++)
    for (int v = 0; v < kVectors; v++) total[q][v] = load(y + q * kPanel + v * kLanes);
  for (int64_t i = shares.first[token]; i < shares.first[token + 1]; i++) {
    const Share& share = shares.of_tokens[i];
    const int64_t rank = term.factors[3 * share.domain + 2];
    const T* b = reinterpret_cast<const T*>(term.factors[3 * share.domain + 1]) + p * rank * kPanel;
    const float* scale = shares.low.data() + share.at;
    for (int64_t r = 0; r < rank; r += kSide<T>)
      for (int q = 0; q < Panels; q++) {
        floats row[kSide<T>][kVectors];
        load_features(b + (q * rank + r) * kPanel, row);
        for (int side = 0; side < kSide<T>; side++)
          for (int v = 0; v < kVectors; v++) total[q][v] += scale[r + side] * row[side][v];
      }
  }
  for (int q = 0; q < Panels; q++)
    for (int v = 0; v < kVectors; v++) store(y + q * kPanel + v * kLanes, total[q][v]);
}

// Add the terms of all tokens to columns 16p.. of y, as many as `Panels` panels have.
template <int Panels, class T>
void add_columns(T* y, int64_t out, const Term& term, const Shares& shares, int64_t p) {
  const int64_t columns = std::min<int64_t>(Panels * kPanel, out - p * kPanel);
  for (int64_t t = 0; t < term.tokens; t++) {
    if (shares.first[t] == shares.first[t + 1]) continue;  // As resident: its bits stay.
    T* yt = y + t * out + p * kPanel;
    if (columns == Panels * kPanel) {
      add_panels<Panels>(yt, p, term, shares, t);
    } else {
      T filled[Panels * kPanel] = {};
      std::copy_n(yt, columns, filled);
      add_panels<Panels>(filled, p, term, shares, t);
      std::copy_n(filled, columns, yt);
    }
  }
}

// y[t] += sum over domains d of gates[row of t][d] (x[t] A_d^T) B_d^T, in place.
//
// A gate of 0 costs nothing and hides whatever its factors hold. Factors are read once for all tokens
// that have a gate for them.
template <class T>
void correct(T* y, const T* x, int64_t in, int64_t out, const Term& term) {
  thread_local Shares kept;  // Of the last module, so that its memory is used again.
  Shares& shares = kept;
  const int64_t numbers = find_shares(term, shares);
  if (!numbers) return;
  const bool alone = numbers * (in + out) < kAlone;
  at::parallel_for(0, term.domains, alone ? term.domains : 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; d++) project(x, in, term, shares, d);
  });
  const int64_t panels = (out + kPanel - 1) / kPanel, tiles = (panels + kPanels - 1) / kPanels;
  at::parallel_for(0, tiles, alone ? tiles : 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      int64_t p = tile * kPanels;
      if (p + kPanels <= panels) {
        add_columns<kPanels>(y, out, term, shares, p);
        continue;
      }
      for (; p < panels; p++) add_columns<1>(y, out, term, shares, p);
    }
  });
}

}  // namespace
