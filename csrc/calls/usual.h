// The usual call: what functional.py is given becomes what an operator takes, if all of it is as it
// mostly is. Whatever is not is left to Python, which looks at every argument and names what is
// wrong: that takes longer than a small batch does.
#pragma once

#include "operator.h"

namespace metarec_fast::calls {

class UsualCalls {
 public:
  // `known`: what metarec_fast/_usual.py knows, by the names of the members below.
  explicit UsualCalls(const py::dict& known);

  // What functional.py returns, or None where arguments have to be looked at.
  py::object adapt(const py::handle& start, const py::handle& settings,
                   const py::handle& support) const;
  py::object adapt_and_score(const py::handle& start, const py::handle& settings,
                             const py::handle& batch) const;
  py::object meta_step(const py::handle& start, const py::handle& settings, const py::handle& batch,
                       const py::handle& outer_loss) const;
  py::object reptile_step(const py::handle& start, const py::handle& settings,
                          const py::handle& support) const;

 private:
  struct Inputs;
  class ArgumentList;

  Inputs take(const py::handle& start, const py::handle& settings, const py::handle& support) const;
  bool is_tracked(const Inputs& inputs) const;
  py::object results(const Operator& op, const ArgumentList& args, bool is_tracked) const;
  void expect_known_items(const py::handle& entries, const Inputs& inputs) const;
  void expect_what_it_looks_at(const py::handle& loss, const py::handle& entries,
                               const Inputs& inputs) const;
  void expect_data(const py::handle& value, const Inputs& inputs) const;
  py::object scalar(const py::handle& value, const py::handle& dtype) const;
  py::object loop(const py::handle& settings, const py::handle& dtype) const;
  py::object outer(const py::handle& outer_loss) const;

  Torch torch_;
  Operator adapt_, adapt_all_, adapt_and_score_, meta_step_, reptile_step_;
  py::object float32_, float64_;  // dtypes that arithmetic is done in
  py::object entries_type_, fast_weights_type_, adapted_items_type_, meta_step_type_,
      sparse_rows_type_;
  py::object pairwise_;                      // the losses that compare items
  py::dict scalars_, loops_, outer_losses_;  // what Python has made of them before
  py::object make_scalar_, make_loop_, make_outer_;
  py::object is_grad_enabled_;
  py::tuple gradient_names_;  // in the operators' order
  py::object want_all_;
};

}  // namespace metarec_fast::calls
