// The engine's own CPU kernels: products with packed parameters, their rows as embeddings, corrections,
// attention over slots, and the fold.
//
// Every sum here runs in one fixed order that depends neither on the batch nor on the number of
// threads: a row's bits do not depend on who shares its batch, nor a fold's bits on the machine's
// cores. Sums are float32 whatever the storage; a result is rounded once, that of a corrected row
// once more, since its term is added to what the product has stored.

#include <torch/library.h>

#include <string>

#include "attention.h"
#include "embedding.h"
#include "fold.h"
#include "linear.h"

TORCH_LIBRARY(superpose, library) {
  library.def("use_products(str name) -> bool", [](std::string name) { return use_products(name); });
  library.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int out_features, Tensor term) -> Tensor");
  library.def("embed(Tensor ids, Tensor packed, int in_features) -> Tensor");
  library.def("fold(Tensor(a!) out, Tensor base, Tensor a, Tensor b) -> ()");
  library.def(
      "attend(Tensor q, Tensor keys, Tensor values, Tensor slots, Tensor starts, Tensor positions, "
      "float scale, int? window=None, float? softcap=None, Tensor? sinks=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(superpose, CPU, library) {
  library.impl("linear", &linear);
  library.impl("embed", &embed);
  library.impl("fold", &fold);
  library.impl("attend", &attend);
}
