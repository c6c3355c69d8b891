// Adapts one task, and goes back again: chooses the form of the inner loop by what it would cost.
#pragma once

#include "exact_form.h"
#include "gram_form.h"
#include "plain_form.h"
#include "step_form.h"

namespace metarec_fast::cpu {

// Above this many support entries the Gram matrices no longer sit in L2.
constexpr int64_t kLargestGram = 192;

// What each form would cost, in multiply-adds of whole registers. V is a row's registers, kSum what
// it takes besides to sum the lanes of one (plain steps sum many rows in one tree), step what a
// step takes beyond its rows; the products of the Gram matrix, in tiles, take kGram times as long,
// and kGramStart besides. Fitted to times of S from 4 to 32, D from 16 to 128 and K from 1 to 20
// under AVX-512 and AVX2 (benchmarks/notes.md).
template <typename scalar_t>
Form cheapest_form(const InnerLoop<scalar_t>& loop, const Layout<scalar_t>& layout, int64_t size,
                   bool backward) {
  if (loop.form != Form::kAuto) return loop.form;
  constexpr double kSum = 2, kGramStep = 42, kGram = 1.1, kGramStart = 200;
  const double step = loop.plain() ? 35 : 60, sum = loop.plain() ? 1 : kSum;
  const double lanes = static_cast<double>(kLanes<scalar_t>),
               V = static_cast<double>(layout.width) / lanes, W = static_cast<double>(layout.width),
               R = static_cast<double>(size), K = static_cast<double>(loop.steps),
               tiled = static_cast<double>((size + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce),
               Rv = static_cast<double>(padded<scalar_t>(size)) / lanes;
  const bool adjoint = backward && !loop.first_order;
  const double ways = adjoint ? 2 : 1;
  const double direct = K * (ways * (R * (2 * V + sum) + step) + (adjoint ? 2 * R * V : 0));
  const double scaling = loop.preconditioner == nullptr ? 0 : R * V * (backward ? R + 3 : 1);
  const double gram = kGramStart +
                      kGram * (tiled * tiled / 2 * (V + kSum) + ways * 2 * R * V +
                               (adjoint ? tiled * tiled * V : 0) + scaling) +
                      K * (ways * (R * Rv + kGramStep) + (adjoint ? 2 * R * Rv : 0));
  const double normal = W * R * V + K * ways * (W * (V + 1 + kSum) + step) +
                        (adjoint ? K * R * (4 * V + 2 * kSum) : 0);
  const bool gram_is_exact = loop.preconditioner == nullptr || loop.prior_pull.values == nullptr;
  if (gram_is_exact && size <= kLargestGram && gram < std::min(direct, normal)) return Form::kGram;
  return loop.loss == Loss::kSquared && normal < direct ? Form::kNormal : Form::kDirect;
}

template <typename scalar_t>
class InnerSolver {
 public:
  // φ_K of the task, valid until the arena is reset. With `keep_path` every φ_k is kept, for
  // `path`.
  const scalar_t* forward(const Task<scalar_t>& task, Arena<scalar_t>& arena, bool backward,
                          bool keep_path = false) {
    if (task.size == 0) {
      if (keep_path) stay(task, arena);
      return task.start;
    }
    if (task.loop.exact()) {
      exact_forward(task, arena, exact_);
      return exact_.fast;
    }
    if (task.size != fitted_size_) {  // tasks of a batch often are of one size
      fitted_form_ = cheapest_form(task.loop, task.layout, task.size, backward);
      fitted_size_ = task.size;
    }
    form_ = fitted_form_;
    if (keep_path && form_ == Form::kGram) form_ = Form::kDirect;
    if (form_ == Form::kGram) {
      scalar_t* fast = arena.take(task.layout.stride);
      gram_forward(task, arena, gram_, fast);
      return fast;
    }
    if (form_ == Form::kDirect && task.loop.plain()) form_ = Form::kPlain;
    if (form_ == Form::kPlain) {
      plain_forward(task, arena, plain_);
      return plain_.fast + task.loop.steps * task.layout.stride;
    }
    step_forward(task, arena, form_ == Form::kNormal, steps_);
    return steps_.fast + task.loop.steps * task.layout.stride;
  }

  // φ_0 … φ_K [K + 1, layout.stride], if they were kept.
  const scalar_t* path() const { return form_ == Form::kPlain ? plain_.fast : steps_.fast; }

  // From φ̄_K, or from φ̄_0 … φ̄_K where `whole_path`, to everything the task began with.
  void adjoint(const Task<scalar_t>& task, Arena<scalar_t>& arena, const scalar_t* grad_fast,
               bool whole_path, const TaskGradients<scalar_t>& grads) const {
    if (task.size == 0) {
      const int64_t stride = task.layout.stride, count = whole_path ? task.loop.steps + 1 : 1;
      std::fill(grads.start, grads.start + stride, scalar_t{0});
      for (int64_t k = 0; k < count; ++k)
        for (int64_t d = 0; d < stride; ++d) grads.start[d] += grad_fast[k * stride + d];
    } else if (task.loop.exact()) {
      exact_adjoint(task, arena, exact_, grad_fast, grads);
    } else if (form_ == Form::kGram) {
      gram_adjoint(task, arena, gram_, grad_fast, grads);
    } else if (form_ == Form::kPlain) {
      plain_adjoint(task, arena, plain_, grad_fast, whole_path, grads);
    } else {
      step_adjoint(task, arena, steps_, grad_fast, whole_path, grads);
    }
  }

 private:
  // The path of a task without support: its start, again and again.
  void stay(const Task<scalar_t>& task, Arena<scalar_t>& arena) {
    const int64_t stride = task.layout.stride, count = task.loop.steps + 1;
    form_ = Form::kDirect;
    steps_.fast = arena.take(count * stride);
    for (int64_t k = 0; k < count; ++k)
      std::copy(task.start, task.start + stride, steps_.fast + k * stride);
  }

  Form form_ = Form::kAuto, fitted_form_ = Form::kAuto;  // of this task, of tasks of that size
  int64_t fitted_size_ = 0;
  PlainPath<scalar_t> plain_{};
  GramPath<scalar_t> gram_{};
  StepPath<scalar_t> steps_{};
  ExactPath<scalar_t> exact_{};
};

}  // namespace metarec_fast::cpu
