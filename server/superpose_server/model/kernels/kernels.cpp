// The engine's own CPU kernels: products with packed parameters, corrections, attention over slots,
// and the fold.
//
// A parameter is kept in panels: (panels, in, 16), where panel p holds output features 16p..16p+15
// of every input feature. A product then reads memory once, in order, whatever the checkpoint's
// layout, and a fold writes it the same way.
//
// Every sum here runs in one fixed order that depends neither on the batch nor on the number of
// threads: a row's bits do not depend on who shares its batch, nor a fold's bits on the machine's
// cores. Arithmetic is float32 whatever the storage; a result is rounded once, that of a corrected row
// once more, since its term is added to what the product has stored.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using bfloat = uint16_t;  // The upper half of a float's bits.

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int64_t kPanel = 16;
constexpr int kVectors = kPanel / kLanes;
// Input features of one pass over a panel: 16 KiB of float32, half of a first-level cache.
constexpr int64_t kDepth = 256;
// Rows whose partial sums are kept at once.
constexpr int64_t kRows = 60;
// Accumulators of 6 rows x 16 features fill 12 of 16 vector registers.
constexpr int kBlockRows = 6;

typedef float floats __attribute__((vector_size(kLanes * 4)));
typedef float floats_at __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef int32_t integers __attribute__((vector_size(kLanes * 4)));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t halves_at __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

constexpr std::make_integer_sequence<int, kLanes> kEachLane;

inline floats load(const float* at) { return *reinterpret_cast<const floats_at*>(at); }

inline floats load(const bfloat* at) {
  const halves low = *reinterpret_cast<const halves_at*>(at);
  return reinterpret_cast<floats>(__builtin_convertvector(low, words) << 16);
}

// One input feature of a panel, as products read it. In bfloat16 one load holds two vectors: with
// 8 lanes the even output features come first, then the odd ones; see `in_order`.
inline void load_row(const float* at, floats (&row)[kVectors]) {
  for (int v = 0; v < kVectors; v++) row[v] = load(at + v * kLanes);
}

inline void load_row(const bfloat* at, floats (&row)[kVectors]) {
  if constexpr (kVectors == 1) {
    row[0] = load(at);
  } else {
    const words pairs = reinterpret_cast<words>(load(reinterpret_cast<const float*>(at)));
    row[0] = reinterpret_cast<floats>(pairs << 16);
    row[kVectors - 1] = reinterpret_cast<floats>(pairs & 0xFFFF0000u);
  }
}

// Put what was summed over such rows in the order of the output features.
template <class T>
inline void in_order(floats (&row)[kVectors]) {
  if constexpr (sizeof(T) != sizeof(float) && kVectors == 2) {
    const floats even = row[0], odd = row[1];
    const auto merged = [&]<int... Lane>(int from, std::integer_sequence<int, Lane...>) {
      return __builtin_shuffle(even, odd, integers{from + Lane / 2 + Lane % 2 * kLanes...});
    };
    row[0] = merged(0, kEachLane);
    row[1] = merged(kLanes / 2, kEachLane);
  }
}

inline void store(float* at, floats value) { *reinterpret_cast<floats_at*>(at) = value; }

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

// Store one row of a panel past the caches: a folded parameter is far larger than they are, and is
// read much later.
inline void stream(float* at, const floats (&row)[kVectors]) {
  for (int v = 0; v < kVectors; v++) {
#if defined(__AVX512F__)
    _mm512_stream_ps(at + v * kLanes, reinterpret_cast<__m512>(row[v]));
#elif defined(__AVX2__)
    _mm256_stream_ps(at + v * kLanes, reinterpret_cast<__m256>(row[v]));
#else
    store(at + v * kLanes, row[v]);
#endif
  }
}

inline void stream(bfloat* at, const floats (&row)[kVectors]) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(at), reinterpret_cast<__m256i>(rounded(row[0])));
#elif defined(__AVX2__)
  // The pack works within halves of a register; the permutation puts its quarters in order.
  const auto low = reinterpret_cast<__m256i>(upper_half(row[0]));
  const auto high = reinterpret_cast<__m256i>(upper_half(row[1]));
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(at), both);
#else
  for (int v = 0; v < kVectors; v++) store(at + v * kLanes, row[v]);
#endif
}

inline void finish_streams() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
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

template <class T>
T* data(const Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

// Call f with a null pointer whose type tells how `tensor` is stored.
template <class F>
void with_storage(const Tensor& tensor, F&& f) {
  if (tensor.scalar_type() == at::kFloat) {
    f(static_cast<float*>(nullptr));
  } else {
    TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, "float32 or bfloat16 expected");
    f(static_cast<bfloat*>(nullptr));
  }
}

// ---- products ----------------------------------------------------------------------------------

// What a block reads ahead while it computes: its own stream, or a share of the next pass.
struct Ahead {
  const char* next;
  int64_t step;
};

// sums[m][j] += sum over `depth` of x[k][m] w[k][j], for M rows and `Panels` panels.
template <int M, int Panels, class T>
inline void block(const float* x, const T* w, int64_t panel_stride, int64_t depth, float* sums,
                  bool first, Ahead ahead) {
  constexpr int V = Panels * kVectors;
  floats total[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++)
      total[m][v] = first ? floats{} : load(sums + (m * V + v) * kLanes);
  for (int64_t k = 0; k < depth; k++) {
    floats b[V];
    for (int p = 0; p < Panels; p++) {
      const T* at = w + p * panel_stride + k * kPanel;
      if (!ahead.next) __builtin_prefetch(at + 2048 / sizeof(T));
      floats row[kVectors];
      load_row(at, row);
      for (int v = 0; v < kVectors; v++) b[p * kVectors + v] = row[v];
    }
    if (ahead.next) {
      __builtin_prefetch(ahead.next, 0, 3);
      ahead.next += ahead.step;
    }
    for (int m = 0; m < M; m++) {
      const float scale = x[k * M + m];
      for (int v = 0; v < V; v++) total[m][v] += scale * b[v];
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

// Lay `Rows` rows of one pass out as blocks read them: out[k][m] = x[m][k].
template <int Rows, class T>
void arrange_part(const T* x, int64_t depth, int64_t n, float* out) {
  for (int64_t k = 0; k < n; k++)
    for (int m = 0; m < Rows; m++) out[k * Rows + m] = as_float(x[m * depth + k]);
}

// Lay x (rows, depth) out in the order in which blocks read it: by chunk, pass, part, then (k, m).
template <class T>
void arrange(const T* x, int64_t rows, int64_t depth, float* out) {
  constexpr decltype(&arrange_part<1, T>) kArrange[] = {arrange_part<1, T>, arrange_part<2, T>,
                                                        arrange_part<3, T>, arrange_part<4, T>,
                                                        arrange_part<5, T>, arrange_part<6, T>};
  const int64_t passes = (depth + kDepth - 1) / kDepth;
  const int64_t chunks = (rows + kRows - 1) / kRows;
  // Few rows are arranged faster than a second thread wakes up.
  const int64_t together = std::max<int64_t>(1, 16384 / (std::min(rows, kRows) * kDepth + 1));
  at::parallel_for(0, chunks * passes, together, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t row = task / passes * kRows, k = task % passes * kDepth;
      const int64_t count = std::min(kRows, rows - row), parts = parts_of(count);
      const int64_t n = std::min(depth - k, kDepth);
      for (int64_t i = 0, done = 0; i < parts; i++) {
        const int64_t some = (count - done + parts - i - 1) / (parts - i);
        kArrange[some - 1](x + (row + done) * depth + k, depth, n,
                           out + row * depth + k * count + done * n);
        done += some;
      }
    }
  });
}

// y[m][j] = bias[j] + sum over k of x[m][k] w[k][j] for the features of one or two panels, x as
// `arrange` lays it out.
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
    for (int64_t m = 0; m < count; m++) {
      const float* from = sums + m * Panels * kPanel;
      T* to = y + (row + m) * y_stride;
      for (int64_t first = 0; first < features; first += kPanel) {
        floats row[kVectors];
        load_row(from + first, row);
        in_order<T>(row);
        for (int v = 0; v < kVectors; v++) {
          const int64_t j = first + v * kLanes;
          if (j + kLanes <= features) {
            store(to + j, row[v] + (bias ? load(bias + j) : floats{}));
            continue;
          }
          T last[kLanes];
          for (int lane = 0; lane < features - j; lane++)
            row[v][lane] += bias ? as_float(bias[j + lane]) : 0.0f;
          store(last, row[v]);
          std::copy_n(last, std::max<int64_t>(0, features - j), to + j);
        }
      }
    }
  }
}

// ---- corrections -------------------------------------------------------------------------------

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

// x (..., in) times a packed parameter, plus bias and `term`, to (..., out), all of one dtype.
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              int64_t out_features, const Tensor& header) {
  const int64_t depth = packed.size(1);
  const int64_t panels = packed.size(0);
  TORCH_CHECK(x.size(-1) == depth && panels == (out_features + kPanel - 1) / kPanel &&
                  packed.size(2) == kPanel && packed.is_contiguous() &&
                  x.scalar_type() == packed.scalar_type() &&
                  (!bias || (bias->scalar_type() == packed.scalar_type() &&
                             bias->is_contiguous() && bias->numel() == out_features)),
              "linear: shapes do not fit");
  const Tensor input = x.contiguous();
  const int64_t rows = depth ? input.numel() / depth : 0;
  const Term term = read_term(header, rows, depth, out_features);
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  Tensor result = at::empty(shape, x.options());
  // Few rows leave registers free for a second panel, whose sums do not wait for the first's.
  const int64_t together = rows * 2 <= kBlockRows ? 2 : 1;
  // Kept for the next product: fresh pages would cost more than filling them.
  thread_local std::vector<float> arranged;
  arranged.resize(std::max<size_t>(arranged.size(), rows * depth));
  const float* from = arranged.data();
  with_storage(packed, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    arrange(data<T>(input), rows, depth, arranged.data());
    const T* w = data<T>(packed);
    const T* added = bias ? data<T>(*bias) : nullptr;
    T* y = data<T>(result);
    at::parallel_for(0, (panels + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group++) {
        const int64_t panel = group * together;
        const int64_t count = std::min(together, panels - panel);
        const int64_t first = panel * kPanel;
        const int64_t features = std::min(count * kPanel, out_features - first);
        const auto run = count == 2 ? product<2, T> : product<1, T>;
        run(from, rows, depth, w + first * depth, y + first, out_features, features,
            added ? added + first : nullptr);
      }
    });
    if (term.domains) {
      const Tensor wide = input.to(at::kFloat);
      correct(y, data<float>(wide), rows, depth, out_features, term);
    }
  });
  return result;
}

// ---- fold --------------------------------------------------------------------------------------

template <int Rows, int Rank, class T>
inline void fold_rows(T* out, const T* base, const float* a, const float* b, int64_t any_rank) {
  const int64_t rank = Rank ? Rank : any_rank;
  floats total[Rows][kVectors];
  for (int i = 0; i < Rows; i++) {
    __builtin_prefetch(base + i * kPanel + 4096 / sizeof(T));
    for (int v = 0; v < kVectors; v++) total[i][v] = load(base + i * kPanel + v * kLanes);
  }
#pragma GCC unroll 2
  for (int64_t r = 0; r < rank; r += 4) {
#pragma GCC unroll 4
    for (int64_t s = r; s < r + 4; s++) {
      floats row[kVectors];
      for (int v = 0; v < kVectors; v++) row[v] = load(b + s * kPanel + v * kLanes);
      for (int i = 0; i < Rows; i++) {
        const float scale = a[i * rank + s];
        for (int v = 0; v < kVectors; v++) total[i][v] += scale * row[v];
      }
    }
  }
  for (int i = 0; i < Rows; i++) stream(out + i * kPanel, total[i]);
}

// One panel. The commonest ranks have loops of known length.
template <int Rank, class T>
void fold_panel(T* out, const T* base, const float* a, const float* b, int64_t depth,
                int64_t rank) {
  int64_t k = 0;
  for (; k + kBlockRows <= depth; k += kBlockRows)
    fold_rows<kBlockRows, Rank>(out + k * kPanel, base + k * kPanel, a + k * rank, b, rank);
  for (; k < depth; k++)
    fold_rows<1, Rank>(out + k * kPanel, base + k * kPanel, a + k * rank, b, rank);
}

// out = base + a b in panels: a float32 (in, R), b float32 (panels, R, 16), R a multiple of 4.
void fold(Tensor out, const Tensor& base, const Tensor& a, const Tensor& b) {
  const int64_t panels = out.size(0), depth = out.size(1), rank = a.size(1);
  TORCH_CHECK(out.is_contiguous() && base.is_contiguous() && a.is_contiguous() &&
                  b.is_contiguous() && base.sizes() == out.sizes() && rank % 4 == 0 &&
                  base.scalar_type() == out.scalar_type() && a.size(0) == depth &&
                  b.size(0) == panels && b.size(1) == rank && b.size(2) == kPanel,
              "fold: shapes do not fit");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0, "fold: out is not aligned");
  with_storage(out, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
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

// ---- attention ---------------------------------------------------------------------------------

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

// One head of one token. The keys and values of a head are too short a run for the processor to
// foresee, so each loop fetches what the next one reads: `next`, the keys of the head after this.
// `sink`, where there is one, is a score whose value is 0.
template <class T>
void attend_one(const T* q, const T* keys, const T* values, const T* next, int64_t count,
                int64_t size, int64_t value_size, Scoring scoring, const float* sink,
                float* weights, float* query, T* out) {
  constexpr int64_t kRow = kVectors * kLanes;
  const float scale = scoring.scale;
  const int64_t whole = size / kRow * kRow;
  floats row[kVectors];
  for (int64_t i = 0; i < whole; i += kRow) {
    load_row(q + i, row);
    for (int v = 0; v < kVectors; v++) store(query + i + v * kLanes, row[v] * scale);
  }
  for (int64_t i = whole; i < size; i++) query[i] = as_float(q[i]) * scale;
  for (int64_t p = 0; p < count; p++) {
    const T* key = keys + p * size;
    fetch(values + p * value_size, value_size);
    floats dots[kVectors] = {};
    for (int64_t i = 0; i < whole; i += kRow) {
      load_row(key + i, row);
      for (int v = 0; v < kVectors; v++) dots[v] += load(query + i + v * kLanes) * row[v];
    }
    float dot = sum(dots[0] + (kVectors == 2 ? dots[kVectors - 1] : floats{}));
    for (int64_t i = whole; i < size; i++) dot += query[i] * as_float(key[i]);
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
  constexpr int kWide = 8 / kVectors;  // Sums that stay in registers: 64 numbers, a usual head.
  int64_t i = 0;
  const auto add_up = [&]<int Rows>(std::integral_constant<int, Rows>) {
    floats total[Rows][kVectors] = {};
    for (int64_t p = 0; p < count; p++) {
      fetch(next + p * size + i, Rows * kRow);
      for (int r = 0; r < Rows; r++) {
        load_row(values + p * value_size + i + r * kRow, row);
        for (int v = 0; v < kVectors; v++) total[r][v] += weights[p] * row[v];
      }
    }
    for (int r = 0; r < Rows; r++, i += kRow) {
      in_order<T>(total[r]);
      for (int v = 0; v < kVectors; v++) store(out + i + v * kLanes, total[r][v] * share);
    }
  };
  while (i + kWide * kRow <= value_size) add_up(std::integral_constant<int, kWide>{});
  while (i < whole_value) add_up(std::integral_constant<int, 1>{});
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

TORCH_LIBRARY(superpose, library) {
  library.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int out_features, Tensor term) -> Tensor");
  library.def("fold(Tensor(a!) out, Tensor base, Tensor a, Tensor b) -> ()");
  library.def(
      "attend(Tensor q, Tensor keys, Tensor values, Tensor slots, Tensor starts, Tensor positions, "
      "float scale, int? window=None, float? softcap=None, Tensor? sinks=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(superpose, CPU, library) {
  library.impl("linear", &linear);
  library.impl("fold", &fold);
  library.impl("attend", &attend);
}
