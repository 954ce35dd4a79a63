// What a round does with Python's lists beside its kernels; see srn_kernels/backends/host.py.
#pragma once

#include <pybind11/pybind11.h>

namespace srn {

void define_host(pybind11::module_& m);

}  // namespace srn
