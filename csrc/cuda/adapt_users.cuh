// The user side adapts: a team gathers a task's rows into scratch, runs the inner loop there,
// judges the query as its rows come by, goes back, and writes each gradient row once.
#pragma once

#include "booking.h"
#include "direct_form.h"
#include "exact_form.h"
#include "gram_form.h"
#include "query.h"

namespace metarec_fast::cuda {

template <typename scalar_t, typename table_t, int kChunks, Way kWay>
struct UserRunner {
  using TaskType = Task<scalar_t, table_t, kChunks, kWay == Way::kPlain>;
  static constexpr bool kDirect = kWay == Way::kDirect || kWay == Way::kPlain;
  using Fast = typename TaskType::Fast;

  const AdaptWork<scalar_t, table_t>& work;
  const TaskType& task;
  const Record<TaskType>& record;

  __device__ __forceinline__ void run() const {
    const QueryData<scalar_t>& query = work.query;
    const GradientData<scalar_t>& grads = work.grads;
    const ExactForm<TaskType> exact(task);
    const Fast fast = forward(exact);
    write_fast(task, record, query, fast);
    if (query.ask == Ask::kNothing) return;
    if (query.ask == Ask::kMove) return move(fast);

    const bool goes_back = query.goes_back() && grads.wanted.any();
    Fast adjoint = given_gradient(task, query);
    if (grads.support_weights != nullptr)
      task.each(task.rows(), [&](int r) { task.scratch.grad_weights()[r] = 0; });
    Judge<TaskType, SharedItems> judge(task, query, grads, {});
    const Fast grad_fast = back(judge, exact, fast, goes_back, adjoint);
    if (query.ask == Ask::kScores) return;
    record.add(record.at.loss(), task.team.sum(judge.loss, task.scratch.partial()));
    if (!goes_back) return;

    const bool rows_too = task.rows() > 0 && !task.problem.loop.first_order;
    if (rows_too) {
      if (task.row_bias != 0)
        task.each(task.rows(), [&](int r) { judge.offset += task.scratch.grad_base()[r]; });
      write_support_rows(task, grads, [&](int r) {
        if constexpr (kWay == Way::kExact) return exact.row(r, fast, adjoint);
        if constexpr (kWay == Way::kGram) return gram_row(task, r, grad_fast);
        if constexpr (kDirect) return direct_row(task, r);
      });
    }
    record.add(record.at.offset(), task.team.sum(judge.offset, task.scratch.partial()));
    write_weights(task, grads);
    book_start(task, record, grads, adjoint);
    book_pull(task, record, grads);
  }

 private:
  __device__ __forceinline__ Fast forward(const ExactForm<TaskType>& exact) const {
    if (task.rows() == 0) return task.start();
    if constexpr (kWay == Way::kExact) return exact.forward();
    if constexpr (kWay == Way::kGram) return gram_forward(task);
    if constexpr (kDirect) return direct_forward(task, work.query.goes_back());
  }

  // Judges φ_K, or the whole path, and takes `adjoint` from there to φ̄_0; returns φ̄_K.
  template <typename JudgeType>
  __device__ __forceinline__ Fast back(JudgeType& judge, const ExactForm<TaskType>& exact,
                                       const Fast& fast, bool goes_back, Fast& adjoint) const {
    const bool whole_path = kWay == Way::kDirect && work.query.whole_path();
    const int K = task.problem.loop.exact() ? 0 : static_cast<int>(task.problem.loop.steps);
    Fast point = fast, grad_fast;
    const DirectAdjoint<TaskType> direct{task, record, work.grads.wanted};
    for (int k = K; k >= 0; --k) {
      if (k == K || whole_path) judge.at(k, point, /*first=*/k == K, adjoint);
      if (k == K) grad_fast = adjoint;
      if (!kDirect || task.rows() == 0) {
        if (whole_path) continue;  // the start, again and again
        break;
      }
      if (k == 0 || !(goes_back || whole_path)) break;
      if (goes_back) direct.undo(k - 1, adjoint);
      if (!whole_path) continue;
      task.team.sync();
      point = task.load_kept(task.scratch.path(), task.scratch.path_bias(), k - 1);
    }
    if (!goes_back || task.rows() == 0) return grad_fast;
    if constexpr (kWay == Way::kExact) adjoint = exact.adjoint(record, work.grads.wanted, adjoint);
    if constexpr (kWay == Way::kGram)
      adjoint = gram_adjoint(task, record, work.grads.wanted, adjoint);
    if constexpr (kDirect) direct.finish(adjoint);
    return grad_fast;
  }

  // Reptile: how far the start is from φ_K, and the loss there.
  __device__ __forceinline__ void move(const Fast& fast) const {
    const QueryData<scalar_t>& query = work.query;
    const scalar_t weight = query.task_weight(task.index());
    book_move(task, record, work, fast);
    if (task.rows() == 0 || !(weight > 0)) return;
    task.team.sync();
    task.dots(fast, task.rows(), [&](int r, scalar_t product) {
      task.scratch.scores()[r] = task.scratch.base()[r] + product;
    });
    task.team.sync();
    record.add(record.at.loss(), weight * query.normalisers[1] * support_loss(task, query.loss));
  }
};

template <typename scalar_t, typename table_t, int kChunks, Way kWay>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<scalar_t, kChunks == 1>)
    adapt_users_kernel(const __grid_constant__ AdaptWork<scalar_t, table_t> work) {
  CUDA_DYNAMIC_SHARED(scalar_t, shared);
  run_tasks<UserRunner<scalar_t, table_t, kChunks, kWay>>(work, shared);
}

}  // namespace metarec_fast::cuda
