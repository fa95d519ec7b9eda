// A layer: the product with a packed parameter, its bias, and the correction of the batch.

#pragma once

#include <optional>
#include <string_view>

#include "corrections.h"
#include "float_products.h"
#include "pair_products.h"
#include "tile_products.h"

namespace {

using Products = void (*)(const bfloat* x, int64_t rows, int64_t depth, const bfloat* w, bfloat* y,
                          int64_t out, const bfloat* bias);

// How products in bfloat16 are computed; null: in float32 arithmetic. One choice for a process, never
// one by the rows of a batch, whose bits would then depend on its company.
Products bfloat_products = nullptr;

// Choose it by name; returns false, and changes nothing, where this processor has no such thing.
bool use_products(std::string_view name) {
  if (name == "floats") {
    bfloat_products = nullptr;
    return true;
  }
#ifdef __AVX512F__
  if (name == "pairs" && __builtin_cpu_supports("avx512bf16")) {
    bfloat_products = pair_products;
    return true;
  }
  if (name == "tiles" && tiles_allowed()) {
    bfloat_products = tile_products;
    return true;
  }
#endif
  return false;
}

void products(const float* x, int64_t rows, int64_t depth, const float* w, float* y, int64_t out,
              const float* bias) {
  float_products(x, rows, depth, w, y, out, bias);
}

void products(const bfloat* x, int64_t rows, int64_t depth, const bfloat* w, bfloat* y, int64_t out,
              const bfloat* bias) {
  if (!bfloat_products) return float_products(x, rows, depth, w, y, out, bias);
  const int64_t width = padded<bfloat>(depth);
  if (width == depth) return bfloat_products(x, rows, depth, w, y, out, bias);
  std::vector<bfloat> filled(rows * width);
  for (int64_t m = 0; m < rows; m++)
    std::copy_n(x + m * depth, depth, filled.data() + m * width);
  bfloat_products(filled.data(), rows, width, w, y, out, bias);
}

// x (..., in) times a packed parameter, plus bias and `term`, to (..., out), all of one dtype.
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
              int64_t out_features, const Tensor& header) {
  const int64_t depth = x.size(-1);
  TORCH_CHECK(packed.dim() == 4 && packed.size(0) == (out_features + kPanel - 1) / kPanel &&
                  packed.size(2) == kPanel && packed.is_contiguous() &&
                  x.scalar_type() == packed.scalar_type() &&
                  (!bias || (bias->scalar_type() == packed.scalar_type() &&
                             bias->is_contiguous() && bias->numel() == out_features)),
              "linear: shapes do not fit");
  const Tensor input = x.contiguous();
  const int64_t rows = depth ? input.numel() / depth : 0;
  const Term term = read_term(header, rows, depth, out_features, packed.element_size());
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  Tensor result = at::empty(shape, x.options());
  with_storage(packed, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    TORCH_CHECK(packed.size(3) == kSide<T> && packed.size(1) * kSide<T> == padded<T>(depth),
                "linear: shapes do not fit");
    T* y = data<T>(result);
    products(data<T>(input), rows, depth, data<T>(packed), y, out_features,
             bias ? data<T>(*bias) : nullptr);
    if (term.domains) correct(y, data<T>(input), depth, out_features, term);
  });
  return result;
}

}  // namespace
