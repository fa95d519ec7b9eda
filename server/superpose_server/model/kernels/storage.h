// Tensors as the kernels see them: an address, and how numbers are stored there.

#pragma once

#include <ATen/ATen.h>

#include "vectors.h"

namespace {

using at::Tensor;

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

}  // namespace
