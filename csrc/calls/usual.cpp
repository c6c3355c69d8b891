#include "usual.h"

#include <cstdint>
#include <initializer_list>
#include <utility>

namespace metarec_fast::calls {
namespace {

// Something has to be looked at more closely. Never leaves this file.
struct Unusual {};

void expect(bool usual) {
  if (!usual) throw Unusual{};
}

// What `body` gives, or None where something is unusual or an error comes up: whoever looks closely
// finds out what it is, and says it by name.
template <typename Body>
py::object attempt(Body&& body) {
  try {
    return body();
  } catch (const Unusual&) {
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
  }
  return py::none();
}

// An attribute's name as the string that Python has of it already, by which it is found at once.
PyObject* interned(const char* name) {
  return owned(PyUnicode_InternFromString(name)).release().ptr();
}

struct Names {
  PyObject* const items = interned("items");
  PyObject* const targets = interned("targets");
  PyObject* const offsets = interned("offsets");
  PyObject* const weights = interned("weights");
  PyObject* const negatives = interned("negatives");
  PyObject* const negative_rows = interned("negative_rows");
  PyObject* const log_q = interned("log_q");
  PyObject* const size_bound = interned("size_bound");
  PyObject* const max_item = interned("max_item");
  PyObject* const support = interned("support");
  PyObject* const query = interned("query");
  PyObject* const dtype = interned("dtype");
  PyObject* const is_cpu = interned("is_cpu");
  PyObject* const requires_grad = interned("requires_grad");
  PyObject* const numel = interned("numel");
  PyObject* const new_zeros = interned("new_zeros");
};

const Names& names() {
  static const Names all;
  return all;
}

py::object get(const py::handle& object, PyObject* name) {
  return owned(PyObject_GetAttr(object.ptr(), name));
}

int64_t integer(const py::handle& value) {
  const int64_t result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

int64_t numel(const py::handle& tensor) {
  return integer(owned(PyObject_CallMethodNoArgs(tensor.ptr(), names().numel)));
}

bool requires_grad(const py::handle& value) {
  return !value.is_none() && is_true(get(value, names().requires_grad));
}

py::handle item(const py::handle& tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

// A tuple, or an object of a class derived from it that has nothing of its own, such as a named
// tuple.
py::object tuple_of(const py::handle& type, std::initializer_list<py::handle> values) {
  auto* const cls = reinterpret_cast<PyTypeObject*>(type.ptr());
  py::object result = owned(cls->tp_alloc(cls, static_cast<Py_ssize_t>(values.size())));
  Py_ssize_t next = 0;
  for (const py::handle& value : values)
    PyTuple_SET_ITEM(result.ptr(), next++, value.inc_ref().ptr());
  return result;
}

py::object pair(const py::handle& first, const py::handle& second) {
  return owned(PyTuple_Pack(2, first.ptr(), second.ptr()));
}

// What is kept under a key, or nothing.
py::object find(const py::dict& kept, const py::handle& key) {
  PyObject* value = PyDict_GetItemWithError(kept.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(value);
}

py::object call(const py::object& function, const py::handle& first, const py::handle& second) {
  return owned(PyObject_CallFunctionObjArgs(function.ptr(), first.ptr(), second.ptr(), nullptr));
}

}  // namespace

// An operator's arguments, one after the other.
class UsualCalls::ArgumentList {
 public:
  explicit ArgumentList(Py_ssize_t size) : args_(size) {}

  void add(py::object value) { PyTuple_SET_ITEM(args_.ptr(), next_++, value.release().ptr()); }
  void add_borrowed(const py::handle& value) { add(py::reinterpret_borrow<py::object>(value)); }
  void add_all(const py::handle& tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple.ptr()); ++i) add_borrowed(item(tuple, i));
  }
  // Entries with these targets.
  void add_entries(const py::handle& entries, py::object targets) {
    add(get(entries, names().items));
    add(std::move(targets));
    add(get(entries, names().offsets));
    add(get(entries, names().weights));
    py::object negatives = get(entries, names().negatives);
    add(negatives.is_none() ? std::move(negatives) : get(entries, names().negative_rows));
    add(get(entries, names().log_q));
  }

  const py::tuple& tuple() const { return args_; }

 private:
  py::tuple args_;
  Py_ssize_t next_ = 0;
};

namespace {

constexpr Py_ssize_t kInputs = 12, kQuery = 7, kLoop = 10;  // how many arguments of each
constexpr Py_ssize_t kLoopTensors = 4, kAdapt = 9;          // among the inner loop's

Operator operator_of(const py::dict& known, const char* name) {
  const py::tuple parts = known["operators"][name];
  return {parts[0], reinterpret_cast<DirectKernel>(parts[1].cast<uintptr_t>())};
}

}  // namespace

// What every operator is given; handles are held by whoever calls.
struct UsualCalls::Inputs {
  py::handle user_init, item_table, item_bias, support;
  py::object user_bias, offset, loop;
  int64_t num_items;
  bool gradients;  // whether any are recorded

  // The arguments before those of the query.
  void add_to(ArgumentList& args) const {
    for (const py::handle& value :
         {user_init, py::handle(user_bias), item_table, item_bias, py::handle(offset)})
      args.add_borrowed(value);
    py::object targets = get(support, names().targets);
    if (targets.is_none())
      targets = owned(PyObject_CallMethodOneArg(
          item_bias.ptr(), names().new_zeros, py::int_(numel(get(support, names().items))).ptr()));
    args.add_entries(support, std::move(targets));
    args.add(get(support, names().size_bound));
  }
};

UsualCalls::UsualCalls(const py::dict& known)
    : torch_{known["tensor"],     known["parameter"],  known["watchers"],
             known["is_negated"], known["to_handles"], known["from_handles"]},
      adapt_(operator_of(known, "adapt")),
      adapt_all_(operator_of(known, "adapt_all")),
      adapt_and_score_(operator_of(known, "adapt_and_score")),
      meta_step_(operator_of(known, "meta_step")),
      reptile_step_(operator_of(known, "reptile_step")),
      float32_(known["float32"]),
      float64_(known["float64"]),
      entries_type_(known["entries_type"]),
      fast_weights_type_(known["fast_weights_type"]),
      adapted_items_type_(known["adapted_items_type"]),
      meta_step_type_(known["meta_step_type"]),
      sparse_rows_type_(known["sparse_rows_type"]),
      pairwise_(known["pairwise"]),
      scalars_(known["scalars"]),
      loops_(known["loops"]),
      outer_losses_(known["outer_losses"]),
      make_scalar_(known["make_scalar"]),
      make_loop_(known["make_loop"]),
      make_outer_(known["make_outer"]),
      is_grad_enabled_(known["is_grad_enabled"]),
      gradient_names_(known["gradient_names"]),
      want_all_(known["want_all"]) {}

py::object UsualCalls::adapt(const py::handle& start, const py::handle& settings,
                             const py::handle& support) const {
  return attempt([&] {
    const Inputs inputs = take(start, settings, support);
    ArgumentList args(kInputs + kLoop);
    inputs.add_to(args);
    args.add_all(inputs.loop);
    const bool all = py::str("all").equal(item(inputs.loop, kAdapt));
    const py::object found = results(all ? adapt_all_ : adapt_, args, is_tracked(inputs));
    const py::object items =
        all ? tuple_of(adapted_items_type_, {item(found, 2), item(found, 3)}) : py::none();
    return tuple_of(fast_weights_type_, {item(found, 0), item(found, 1), items});
  });
}

py::object UsualCalls::adapt_and_score(const py::handle& start, const py::handle& settings,
                                       const py::handle& batch) const {
  return attempt([&] {
    const py::object support = get(batch, names().support), query = get(batch, names().query);
    const Inputs inputs = take(start, settings, support);
    expect_known_items(query, inputs);
    expect(get(query, names().negatives).is_none());
    for (const py::object& data :
         {get(query, names().targets), get(query, names().weights), get(batch, names().weights)})
      expect_data(data, inputs);
    ArgumentList args(kInputs + 2 + kLoop);
    inputs.add_to(args);
    args.add(get(query, names().items));
    args.add(get(query, names().offsets));
    args.add_all(inputs.loop);
    const py::object found = results(adapt_and_score_, args, is_tracked(inputs));
    return py::reinterpret_borrow<py::object>(item(found, 2));
  });
}

py::object UsualCalls::meta_step(const py::handle& start, const py::handle& settings,
                                 const py::handle& batch, const py::handle& outer_loss) const {
  return attempt([&] {
    const py::object support = get(batch, names().support), query = get(batch, names().query),
                     weights = get(batch, names().weights);
    const Inputs inputs = take(start, settings, support);
    const py::object losses = outer(outer_loss);
    expect_what_it_looks_at(item(losses, 1), query, inputs);
    expect_data(get(query, names().weights), inputs);
    expect_data(weights, inputs);
    ArgumentList args(kInputs + kQuery + kLoop + 3);
    inputs.add_to(args);
    args.add_entries(query, get(query, names().targets));
    args.add(weights);
    args.add_all(inputs.loop);
    args.add_borrowed(item(losses, 0));
    args.add(/*step_weights=*/py::none());
    args.add(want_all_);

    const py::object found = results(meta_step_, args, is_tracked(inputs));
    const Py_ssize_t count = PyTuple_GET_SIZE(gradient_names_.ptr());
    const py::handle ids = item(found, count + 1);
    py::dict gradients;
    for (Py_ssize_t i = 0; i < count; ++i) {
      const py::handle gradient = item(found, i + 1);
      if (gradient.is_none()) continue;
      const bool of_items = i == 2 || i == 3;
      gradients[item(gradient_names_, i)] = of_items ? tuple_of(sparse_rows_type_, {ids, gradient})
                                                     : py::reinterpret_borrow<py::object>(gradient);
    }
    return tuple_of(meta_step_type_, {item(found, 0), gradients});
  });
}

py::object UsualCalls::reptile_step(const py::handle& start, const py::handle& settings,
                                    const py::handle& support) const {
  return attempt([&] {
    const Inputs inputs = take(start, settings, support);
    ArgumentList args(kInputs + 1 + kLoop);
    inputs.add_to(args);
    args.add(/*task_weights=*/py::none());
    args.add_all(inputs.loop);

    const py::object found = results(reptile_step_, args, /*is_tracked=*/false);
    const py::object ids = get(support, names().items);
    py::dict moves;
    for (Py_ssize_t i = 0; i < 4; ++i) {
      const py::handle move = item(found, i + 1);
      if (move.is_none()) continue;
      moves[item(gradient_names_, i)] = i < 2 ? py::reinterpret_borrow<py::object>(move)
                                              : tuple_of(sparse_rows_type_, {ids, move});
    }
    return tuple_of(meta_step_type_, {item(found, 0), moves});
  });
}

py::object UsualCalls::results(const Operator& op, const ArgumentList& args,
                               bool is_tracked) const {
  py::object found = op.call(torch_, args.tuple(), is_tracked);
  expect(found && PyTuple_Check(found.ptr()));
  return found;
}

UsualCalls::Inputs UsualCalls::take(const py::handle& start, const py::handle& settings,
                                    const py::handle& support) const {
  Inputs inputs;
  inputs.user_init = item(start, 0);
  inputs.item_table = item(start, 2);
  inputs.item_bias = item(start, 3);
  inputs.support = support;
  expect(is_plain_tensor(torch_, inputs.item_table) && is_plain_tensor(torch_, inputs.item_bias));
  expect(is_true(get(inputs.item_table, names().is_cpu)));
  const py::handle steps = item(settings, 1);
  // True would be found where 1 is kept, and 1.0.
  expect(PyLong_CheckExact(steps.ptr()) || PyUnicode_CheckExact(steps.ptr()));

  inputs.num_items = numel(inputs.item_bias);
  inputs.gradients = is_true(owned(PyObject_CallNoArgs(is_grad_enabled_.ptr())));
  expect_what_it_looks_at(item(settings, 6), support, inputs);

  const py::object dtype = get(inputs.item_bias, names().dtype);
  expect(dtype.is(float32_) || dtype.is(float64_));  // others are under autocast
  const py::handle user_bias = item(start, 1);
  inputs.user_bias = scalar(user_bias.is_none() ? py::float_(0.0) : user_bias, dtype);
  inputs.offset = scalar(item(start, 4), dtype);
  inputs.loop = loop(settings, dtype);
  return inputs;
}

bool UsualCalls::is_tracked(const Inputs& inputs) const {
  if (!inputs.gradients) return false;
  for (const py::handle& value : {inputs.user_init, py::handle(inputs.user_bias), inputs.item_table,
                                  inputs.item_bias, py::handle(inputs.offset)})
    if (requires_grad(value)) return true;
  for (Py_ssize_t i = 0; i < kLoopTensors; ++i)
    if (requires_grad(item(inputs.loop, i))) return true;
  return requires_grad(get(inputs.support, names().weights));
}

void UsualCalls::expect_known_items(const py::handle& entries, const Inputs& inputs) const {
  expect(reinterpret_cast<PyObject*>(Py_TYPE(entries.ptr())) == entries_type_.ptr());
  expect(get(entries, names().log_q).is_none());
  expect(integer(get(entries, names().max_item)) < inputs.num_items);
}

// Entries of known items, with all that the loss looks at and nothing besides.
void UsualCalls::expect_what_it_looks_at(const py::handle& loss, const py::handle& entries,
                                         const Inputs& inputs) const {
  expect_known_items(entries, inputs);
  const int pairwise = PySequence_Contains(pairwise_.ptr(), loss.ptr());
  if (pairwise < 0) throw py::error_already_set();
  expect(get(entries, names().negatives).is_none() == !pairwise);
  const py::object targets = get(entries, names().targets);
  expect(pairwise || !targets.is_none());
  expect_data(targets, inputs);
}

// What is not differentiated must not ask for it.
void UsualCalls::expect_data(const py::handle& value, const Inputs& inputs) const {
  expect(!inputs.gradients || !requires_grad(value));
}

// A number as a tensor.
py::object UsualCalls::scalar(const py::handle& value, const py::handle& dtype) const {
  if (is_plain_tensor(torch_, value)) return py::reinterpret_borrow<py::object>(value);
  const py::object kept = find(scalars_, pair(value, dtype));
  return kept ? kept : call(make_scalar_, value, dtype);
}

// The inner loop as operators take it.
py::object UsualCalls::loop(const py::handle& settings, const py::handle& dtype) const {
  const py::object kept = find(loops_, pair(settings, dtype));
  return kept ? kept : call(make_loop_, settings, dtype);
}

// Losses as the operator takes them, and one of them.
py::object UsualCalls::outer(const py::handle& outer_loss) const {
  py::object key = py::reinterpret_borrow<py::object>(outer_loss);
  if (!PyUnicode_CheckExact(outer_loss.ptr())) {
    expect(PyDict_CheckExact(outer_loss.ptr()));
    key = owned(PyList_AsTuple(owned(PyDict_Items(outer_loss.ptr())).ptr()));
  }
  const py::object kept = find(outer_losses_, key);
  return kept ? kept : call(make_outer_, key, outer_loss);
}

}  // namespace metarec_fast::calls
