// metarec_fast._calls: from the arguments of metarec_fast.functional to an operator's and back,
// with nothing to be interpreted in between.

#include <string>
#include <utility>

#include "usual.h"

namespace metarec_fast::calls {
namespace {

const UsualCalls* calls = nullptr;  // never destroyed: the interpreter may be gone by then

void use(const py::dict& known) { calls = new UsualCalls(known); }

// As Python calls a function that is called often: without pybind11, which looks at arguments.
template <auto function, size_t... i>
PyObject* run(PyObject* const* args, Py_ssize_t count, std::index_sequence<i...>) {
  try {
    if (calls == nullptr || count != sizeof...(i))
      throw py::type_error("expected use() before, and " + std::to_string(sizeof...(i)) +
                           " arguments");
    return (calls->*function)(args[i]...).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <auto function, size_t count>
PyObject* method(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run<function>(args, given, std::make_index_sequence<count>());
}

template <auto function, size_t count>
PyMethodDef definition(const char* name) {
  const auto any = reinterpret_cast<void (*)()>(&method<function, count>);
  return {name, reinterpret_cast<PyCFunction>(any), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {definition<&UsualCalls::adapt, 3>("adapt"),
                         definition<&UsualCalls::adapt_and_score, 3>("adapt_and_score"),
                         definition<&UsualCalls::meta_step, 4>("meta_step"),
                         definition<&UsualCalls::reptile_step, 3>("reptile_step"),
                         {}};

}  // namespace

PYBIND11_MODULE(_calls, module) {
  module.doc() = "Usual calls of the operators; metarec_fast/_usual.py says what is usual.";
  module.def("use", &use, py::arg("known"));
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace metarec_fast::calls
