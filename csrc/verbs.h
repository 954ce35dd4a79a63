// The two verbs of a backend as its Python module has them, for the bindings of all of them.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "checks.h"

namespace srn {

// What gains and soft bounds need comes last, and may be left out where no layer has any.
template <class Normalize, class Backward, class... Extra>
void define_verbs(pybind11::module_& m, Normalize&& normalize, Backward&& normalize_backward,
                  const Extra&... extra) {
  using pybind11::arg;
  m.def("normalize", normalize, arg("weights"), arg("us"), arg("vs"), arg("outs"),
        arg("round_state"), arg("stats"), arg("offsets"), arg("target_ranks"), arg("iterations"),
        arg("dims"), arg("eps"), arg("gains") = Tensors(), arg("gained") = Ints(),
        arg("sigma_max") = Doubles(), arg("through") = Bools(), extra...);
  m.def("normalize_backward", normalize_backward, arg("grads"), arg("weights"), arg("round_state"),
        arg("stats"), arg("grad_weights"), arg("rows"), arg("offsets"), arg("dims"),
        arg("grad_gains") = Tensors(), arg("gained") = Ints(), extra...);
}

}  // namespace srn
