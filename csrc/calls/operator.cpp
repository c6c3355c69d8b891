#include "operator.h"

#include <array>

namespace metarec_fast::calls {
namespace {

using Kind = DirectArgument::Kind;

// Whether a mode, a transform, forward differentiation, a trace or a profiler has to see what
// operators are called.
bool is_watched(const Torch& torch) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers.ptr()); ++i)
    if (is_true(owned(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.watchers.ptr(), i))))) return true;
  return false;
}

void append(const py::list& list, const py::handle& value) {
  if (PyList_Append(list.ptr(), value.ptr()) != 0) throw py::error_already_set();
}

void* pointer(PyObject* capsule) {
  void* result = PyCapsule_GetPointer(capsule, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return result;
}

// A call's arguments as the kernel takes them.
class Arguments {
 public:
  // Whether the kernel can be given them.
  bool take(const Torch& torch, const py::tuple& args) {
    count_ = PyTuple_GET_SIZE(args.ptr());
    if (count_ > kMostArguments) return false;
    for (int64_t i = 0; i < count_; ++i)
      if (!take(torch, PyTuple_GET_ITEM(args.ptr(), i), arguments_[i])) return false;
    return true;
  }

  // The kernel's results as an operator returns them, or nothing where it refuses.
  py::object give_to(DirectKernel kernel, const Torch& torch) {
    const py::object handles = owned(PyObject_CallOneArg(torch.to_handles.ptr(), tensors_.ptr()));
    for (int64_t i = 0, next = 0; i < count_; ++i)
      if (arguments_[i].kind == Kind::kTensor)
        arguments_[i].tensor = pointer(PyList_GET_ITEM(handles.ptr(), next++));

    std::array<void*, kMostResults> found;
    int64_t count;
    Py_BEGIN_ALLOW_THREADS;
    count = kernel(arguments_.data(), count_, found.data());
    Py_END_ALLOW_THREADS;
    if (count < 0) return {};

    const py::list given;
    for (int64_t i = 0; i < count; ++i)
      if (found[i] != nullptr) append(given, owned(PyCapsule_New(found[i], nullptr, nullptr)));
    const py::object tensors = owned(PyObject_CallOneArg(torch.from_handles.ptr(), given.ptr()));
    py::tuple results(count);
    for (int64_t i = 0, next = 0; i < count; ++i)
      PyTuple_SET_ITEM(
          results.ptr(), i,
          Py_NewRef(found[i] == nullptr ? Py_None : PyList_GET_ITEM(tensors.ptr(), next++)));
    return results;
  }

 private:
  bool take(const Torch& torch, PyObject* value, DirectArgument& argument) {
    if (value == Py_None) {
      argument.kind = Kind::kNone;
    } else if (is_plain_tensor(torch, value)) {
      argument.kind = Kind::kTensor;
      if (is_true(owned(PyObject_CallOneArg(torch.is_negated.ptr(), value)))) return false;
      append(tensors_, value);
    } else if (PyBool_Check(value)) {
      argument.kind = Kind::kTruth;
      argument.truth = value == Py_True;
    } else if (PyLong_CheckExact(value)) {
      argument.kind = Kind::kInteger;
      argument.integer = PyLong_AsLongLong(value);
      if (argument.integer == -1 && PyErr_Occurred()) throw py::error_already_set();
    } else if (PyFloat_CheckExact(value)) {
      argument.kind = Kind::kReal;
      argument.real = PyFloat_AS_DOUBLE(value);
    } else if (PyUnicode_CheckExact(value)) {
      argument.kind = Kind::kText;
      argument.text = PyUnicode_AsUTF8(value);
      if (argument.text == nullptr) throw py::error_already_set();
    } else {
      return false;
    }
    return true;
  }

  std::array<DirectArgument, kMostArguments> arguments_;
  int64_t count_ = 0;
  py::list tensors_;  // of the arguments, in their order
};

}  // namespace

py::object Operator::call(const Torch& torch, const py::tuple& args, bool is_tracked) const {
  if (is_watched(torch)) return {};
  if (is_tracked) return owned(PyObject_Call(op.ptr(), args.ptr(), nullptr));
  Arguments arguments;
  return arguments.take(torch, args) ? arguments.give_to(kernel, torch) : py::object();
}

}  // namespace metarec_fast::calls
