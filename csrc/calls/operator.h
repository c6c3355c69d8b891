// An operator, and how it is called: past the dispatcher where that would only look at arguments.
#pragma once

#include <pybind11/pybind11.h>

#include "../direct_call.h"

namespace metarec_fast::calls {

namespace py = pybind11;

// What is asked of PyTorch's Python side.
struct Torch {
  py::object tensor, parameter;  // types whose objects are tensors and nothing more
  py::tuple watchers;            // functions that say, by what is true, that operators are watched
  py::object is_negated;         // whether the numbers in memory have the other sign
  py::object to_handles;         // tensors → capsules of handles, to be owned
  py::object from_handles;       // and back
};

struct Operator {
  py::object op;
  DirectKernel kernel;  // on the CPU

  // Its results, a tuple; or nothing, where somebody watches or the kernel refuses its arguments.
  py::object call(const Torch& torch, const py::tuple& args, bool is_tracked) const;
};

inline bool is_plain_tensor(const Torch& torch, const py::handle& value) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value.ptr()));
  return type == torch.tensor.ptr() || type == torch.parameter.ptr();
}

// The object, or the error that there is instead of it.
inline py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline bool is_true(const py::object& value) {
  const int answer = PyObject_IsTrue(value.ptr());
  if (answer < 0) throw py::error_already_set();
  return answer != 0;
}

}  // namespace metarec_fast::calls
