// metarec_fast._tasks: the task sampler over NumPy arrays, without the GIL and without torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "sampler.h"

namespace py = pybind11;

namespace metarec {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Hands the memory over to NumPy.
template <typename T>
py::array_t<T> to_numpy(Buffer<T> buffer, std::vector<py::ssize_t> shape) {
  T* const data = buffer.release();
  const py::capsule owner(data, [](void* memory) { delete[] static_cast<T*>(memory); });
  return py::array_t<T>(std::move(shape), data, owner);
}

py::array_t<int64_t> to_numpy(std::vector<int64_t> values) {
  auto* const held = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(held,
                          [](void* memory) { delete static_cast<std::vector<int64_t>*>(memory); });
  return py::array_t<int64_t>({static_cast<py::ssize_t>(held->size())}, held->data(), owner);
}

// The fields of SampledEntries in metarec_fast/_numpy_sampler.py.
py::tuple to_python(SampledEntries entries, int64_t num_negatives) {
  const int64_t n = entries.items.size();
  const int64_t num_offsets = entries.offsets.size();
  const auto matrix = [&](Buffer<int64_t> values) -> py::object {
    if (num_negatives == 0) return py::none();
    return to_numpy(std::move(values), {n, num_negatives});
  };
  return py::make_tuple(
      to_numpy(std::move(entries.offsets), {num_offsets}), to_numpy(std::move(entries.items), {n}),
      to_numpy(std::move(entries.targets), {n}), matrix(std::move(entries.negatives)),
      to_numpy(std::move(entries.local_items), {n}), matrix(std::move(entries.local_negatives)),
      entries.max_size, entries.max_item);
}

// Keeps the arrays of the log alive, and vouches for them: the sampler itself looks at nothing
// twice.
class BoundSampler {
 public:
  BoundSampler(Array<int64_t> offsets, Array<int32_t> items, Array<float> ratings,
               int64_t num_items, std::pair<int64_t, int64_t> support,
               std::pair<int64_t, int64_t> query, bool by_time, int64_t num_negatives)
      : offsets_(std::move(offsets)),
        items_(std::move(items)),
        ratings_(std::move(ratings)),
        num_negatives_(num_negatives),
        has_query_(query.second != 0),
        sampler_(checked_log(num_items), Settings{{support.first, support.second},
                                                  {query.first, query.second},
                                                  by_time,
                                                  num_negatives}) {}

  py::tuple sample(const Array<int64_t>& users, uint64_t key) {
    const auto ids = users.unchecked<1>();
    const int64_t num_users = offsets_.size() - 1;
    for (py::ssize_t t = 0; t < ids.shape(0); ++t) {
      if (ids(t) < 0 || ids(t) >= num_users) {
        throw py::index_error("users: must be in [0, " + std::to_string(num_users) + "), got " +
                              std::to_string(ids(t)) + " at position " + std::to_string(t));
      }
    }
    std::optional<SampledBatch> batch;
    {
      const py::gil_scoped_release release;
      batch.emplace(sampler_.sample(users.data(), users.size(), key));
    }
    py::object query = py::none();
    if (has_query_) query = to_python(std::move(batch->query), num_negatives_);
    return py::make_tuple(to_numpy(std::move(batch->unique_items)),
                          to_python(std::move(batch->support), num_negatives_), query);
  }

 private:
  Log checked_log(int64_t num_items) const {
    const int64_t n = items_.size();
    const auto offsets = offsets_.unchecked<1>();
    if (offsets.shape(0) == 0 || ratings_.size() != n || offsets(0) != 0 ||
        offsets(offsets.shape(0) - 1) != n) {
      throw py::value_error("offsets: must run from 0 to the number of items and of ratings");
    }
    for (py::ssize_t u = 1; u < offsets.shape(0); ++u) {
      if (offsets(u) < offsets(u - 1)) throw py::value_error("offsets: must not decrease");
    }
    for (const int32_t* item = items_.data(); item != items_.data() + n; ++item) {
      if (*item < 0 || *item >= num_items) {
        throw py::index_error("items: must be in [0, " + std::to_string(num_items) + "), got " +
                              std::to_string(*item) + " at position " +
                              std::to_string(item - items_.data()));
      }
    }
    return Log{offsets_.data(), items_.data(), ratings_.data(), offsets.shape(0) - 1, num_items};
  }

  const Array<int64_t> offsets_;
  const Array<int32_t> items_;
  const Array<float> ratings_;
  const int64_t num_negatives_;
  const bool has_query_;
  Sampler sampler_;
};

}  // namespace

PYBIND11_MODULE(_tasks, module) {
  module.doc() = "Task sampler in C++; metarec_fast.sampler is its public side.";
  py::class_<BoundSampler>(module, "Sampler")
      .def(py::init<Array<int64_t>, Array<int32_t>, Array<float>, int64_t,
                    std::pair<int64_t, int64_t>, std::pair<int64_t, int64_t>, bool, int64_t>(),
           py::arg("offsets").noconvert(), py::arg("items").noconvert(),
           py::arg("ratings").noconvert(), py::arg("num_items"), py::arg("support"),
           py::arg("query"), py::arg("by_time"), py::arg("negatives"))
      .def("sample", &BoundSampler::sample, py::arg("users").noconvert(), py::arg("key"));
}

}  // namespace metarec
