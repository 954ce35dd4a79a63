// Loops over Python lists that every round makes. No rule stands here: srn_kernels/backends/host.py
// has each of these functions in Python too, and says what it does.
#include "host.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>

namespace srn {
namespace {

namespace py = pybind11;

// A list or tuple, without a copy of it.
struct Items {
  explicit Items(py::handle sequence)
      : held(py::reinterpret_steal<py::object>(
            PySequence_Fast(sequence.ptr(), "srn_kernels: expected a list"))) {
    if (!held) throw py::error_already_set();
  }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(held.ptr()); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(held.ptr(), i); }

  const at::Tensor& tensor(Py_ssize_t i) const {
    if (!THPVariable_Check((*this)[i]))
      throw py::type_error("srn_kernels: expected a list of tensors");
    return THPVariable_Unpack((*this)[i]);
  }

  py::object held;
};

void tell_autograd(py::handle list) {
  const Items tensors(list);
  for (Py_ssize_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors.tensor(i);
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

bool are_contiguous_matrices(py::handle list) {
  const Items tensors(list);
  for (Py_ssize_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors.tensor(i);
    if (t.dim() < 2 || !t.is_contiguous()) return false;
  }
  return true;
}

bool have_equal_strides(py::handle list, py::handle other) {
  const Items tensors(list), others(other);
  if (tensors.size() != others.size())
    throw py::value_error("srn_kernels: lists of different lengths");
  for (Py_ssize_t i = 0; i < tensors.size(); ++i)
    if (tensors.tensor(i).strides() != others.tensor(i).strides()) return false;
  return true;
}

// Calls action(the module's __dict__, the attribute's name) for each of its (module, name).
template <class Action>
void for_each_site(PyObject* sites, const Action& action) {
  const Items pairs((py::handle(sites)));
  for (Py_ssize_t i = 0; i < pairs.size(); ++i) {
    const Items pair((py::handle(pairs[i])));
    if (pair.size() != 2) throw py::value_error("srn_kernels: a site is (module, name)");
    const auto attributes =
        py::reinterpret_steal<py::object>(PyObject_GenericGetDict(pair[0], nullptr));
    if (!attributes) throw py::error_already_set();
    action(attributes.ptr(), pair[1]);
  }
}

void set_attributes(py::handle sites, py::handle values) {
  const Items places(sites), shown(values);
  if (places.size() != shown.size())
    throw py::value_error("srn_kernels: one value for each list of sites");
  for (Py_ssize_t i = 0; i < places.size(); ++i)
    for_each_site(places[i], [&](PyObject* attributes, PyObject* name) {
      if (PyDict_SetItem(attributes, name, shown[i]) != 0) throw py::error_already_set();
    });
}

py::list take_attributes(py::handle sites) {
  const Items places(sites);
  py::list taken(places.size());
  for (Py_ssize_t i = 0; i < places.size(); ++i) {
    py::object seen = py::none();
    for_each_site(places[i], [&](PyObject* attributes, PyObject* name) {
      PyObject* found = PyDict_GetItemWithError(attributes, name);
      if (!found && PyErr_Occurred()) throw py::error_already_set();
      seen = found ? py::reinterpret_borrow<py::object>(found) : py::object(py::none());
      if (found && PyDict_DelItem(attributes, name) != 0) throw py::error_already_set();
    });
    PyList_SET_ITEM(taken.ptr(), i, seen.release().ptr());
  }
  return taken;
}

}  // namespace

void define_host(py::module_& m) {
  m.def("tell_autograd", tell_autograd);
  m.def("are_contiguous_matrices", are_contiguous_matrices);
  m.def("have_equal_strides", have_equal_strides);
  m.def("set_attributes", set_attributes);
  m.def("take_attributes", take_attributes);
}

}  // namespace srn
