// Rows of a parameter in panels, as an embedding that is tied to the head reads them.

#pragma once

#include <ATen/Parallel.h>

#include "panels.h"
#include "storage.h"

namespace {

// Tokens that one thread reads before another is worth waking up.
constexpr int64_t kTokensAlone = 16;

// Rows `ids` (...) of a packed parameter whose panels hold `in` input features, to (..., in).
Tensor embed(const Tensor& ids, const Tensor& packed, int64_t in) {
  TORCH_CHECK(ids.scalar_type() == at::kLong && packed.dim() == 4 && packed.size(2) == kPanel &&
                  packed.is_contiguous(),
              "embed: shapes do not fit");
  const Tensor wanted = ids.contiguous();
  auto shape = ids.sizes().vec();
  shape.push_back(in);
  Tensor result = at::empty(shape, packed.options());
  with_storage(packed, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t depth = packed.size(1) * kSide<T>;
    TORCH_CHECK(packed.size(3) == kSide<T> && depth == padded<T>(in), "embed: shapes do not fit");
    const int64_t rows = packed.size(0) * kPanel;
    const int64_t* id = data<int64_t>(wanted);
    for (int64_t t = 0; t < wanted.numel(); t++)
      TORCH_CHECK_INDEX(0 <= id[t] && id[t] < rows, "embed: row ", id[t], " of ", rows);
    at::parallel_for(0, wanted.numel(), kTokensAlone, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const T* row = data<T>(packed) + id[t] / kPanel * depth * kPanel + id[t] % kPanel * kSide<T>;
        T* to = data<T>(result) + t * in;
        for (int64_t k = 0; k < in; k++)
          to[k] = row[k / kSide<T> * kPanel * kSide<T> + k % kSide<T>];
      }
    });
  });
  return result;
}

}  // namespace
