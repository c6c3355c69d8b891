// Full adaptation: the item rows and biases of a task's support adapt with its user. A team keeps
// the rows in scratch and moves them; an item that comes twice is moved where it comes first.
//
//   g_i = Σ over entries of item i of w ℓ'/(S + n0),   all old on the right:
//   u ← u − s Σ_i g_i e_i    c ← c − s Σ_i g_i    e_i ← e_i − s g_i u    b_i ← b_i − s g_i
//
// and back, with r_i = e_i·ū + c̄ + ē_i·u + b̄_i and P̄ = Σ over entries of −s w/(S + n0) H r:
//
//   ū += Σ_i P̄_i e_i − s g_i ē_i    c̄ += Σ_i P̄_i    ē_i += P̄_i u − s g_i ū    b̄_i += P̄_i
#pragma once

#include "adapt.h"
#include "booking.h"
#include "query.h"

namespace metarec_fast::cuda {

// The items of the support as they are now; query items among them are found and noted.
template <typename TaskType>
struct AdaptedItems {
  using scalar_t = typename TaskType::scalar_t;
  using Fast = typename TaskType::Fast;
  static constexpr bool kAdapt = true;
  int* hit_places;
  scalar_t* hit_grads;

  // Where `item` comes first in the support, or −1; all lanes of a warp ask together, each group
  // for its own.
  __device__ __forceinline__ int find(const TaskType& task, int64_t item) const {
    const int64_t* items = task.problem.support.items + task.begin();
    int found = task.rows();
    for (int e = task.columns.lane; e < task.rows(); e += task.columns.lanes())
      if (items[e] == item && e < found) found = e;
    for (int apart = task.columns.lanes() / 2; apart > 0; apart /= 2) {
      const int other = __shfl_xor_sync(kAllLanes, found, apart);
      found = other < found ? other : found;
    }
    return found < task.rows() ? found : -1;
  }

  __device__ __forceinline__ void note(const EntryData<scalar_t>& query, int64_t entry, int64_t j,
                                       int found, scalar_t grad) const {
    hit_places[entry * query.candidates() + j] = found;
    hit_grads[entry * query.candidates() + j] = grad;
  }
};

template <typename scalar_t, typename table_t, int kChunks>
struct ItemsRunner {
  using TaskType = Task<scalar_t, table_t, kChunks, /*kIsPlain=*/false>;
  using Fast = typename TaskType::Fast;
  using Judging = Judge<TaskType, AdaptedItems<TaskType>>;

  const AdaptWork<scalar_t, table_t>& work;
  const TaskType& task;
  const Record<TaskType>& record;
  const Scratch<scalar_t>& scratch;
  const InnerLoop<scalar_t>& loop;

  __device__ __forceinline__ ItemsRunner(const AdaptWork<scalar_t, table_t>& work_in,
                                         const TaskType& task_in, const Record<TaskType>& record_in)
      : work(work_in),
        task(task_in),
        record(record_in),
        scratch(task_in.scratch),
        loop(work_in.problem.loop) {}

  __device__ __forceinline__ void run() const {
    const QueryData<scalar_t>& query = work.query;
    const GradientData<scalar_t>& grads = work.grads;
    const int K = static_cast<int>(loop.steps);
    start();
    Fast fast = task.start();
    for (int k = 0; k < K; ++k) fast = step(k, fast);
    write_fast(task, record, query, fast);
    if (work.rows_out != nullptr) write_items();
    if (query.ask == Ask::kNothing) return;
    if (query.ask == Ask::kMove) return move(fast);

    Judging judge(task, query, grads, {work.hit_places, work.hit_grads});
    Fast grad_fast = given_gradient(task, query);
    task.each_own(task.rows(), [&](int i) { task.columns.store(Fast::zero(), grad_row(i)); });
    task.each(task.rows(),
              [&](int i) { scratch.grad_biases()[i] = scratch.grad_weights()[i] = 0; });
    task.team.sync();
    if (work.grad_rows != nullptr) take_given();
    scalar_t offset = 0;
    for (int k = K; k >= 0; --k) {
      if (k == K || query.whole_path()) judge_at(judge, k, fast, /*first=*/k == K, grad_fast);
      if (k == 0 || !(grads.wanted.any() || query.whole_path())) break;
      fast = task.load_kept(scratch.path(), scratch.path_bias(), k - 1);
      undo(k - 1, fast, grad_fast, offset);
    }
    if (query.ask == Ask::kScores) return;
    record.add(record.at.loss(), task.team.sum(judge.loss, scratch.partial()));
    if (!grads.wanted.any()) return;
    record.add(record.at.offset(), task.team.sum(offset + judge.offset, scratch.partial()));
    task.team.sync();
    task.each(task.rows(), [&](int e) {
      scratch.grad_base()[e] = scratch.place()[e] == e ? scratch.grad_biases()[e] : 0;
    });
    task.team.sync();
    write_support_rows(task, grads, [&](int e) {
      Fast row = Fast::zero();
      if (scratch.place()[e] == e) task.columns.load(grad_row(e), row);
      return row;
    });
    write_weights(task, grads);
    book_start(task, record, grads, grad_fast);
  }

 private:
  __device__ __forceinline__ scalar_t* grad_row(int i) const {
    return scratch.grad_rows() + i * task.columns.width();
  }

  // Where every entry's item comes first, and where it comes next; the first point of the path.
  __device__ __forceinline__ void start() const {
    const int64_t* items = task.problem.support.items + task.begin();
    task.each(task.rows(), [&](int e) {
      int first = 0, next = e + 1;
      while (items[first] != items[e]) ++first;
      while (next < task.rows() && items[next] != items[e]) ++next;
      scratch.place()[e] = first;
      scratch.next()[e] = next < task.rows() ? next : -1;
      scratch.biases()[e] = scratch.base()[e];
    });
    task.keep(task.start(), scratch.path(), scratch.path_bias(), 0);
    task.team.sync();
  }

  // Of an item, at the entry where it comes first: Σ of its entries' values; 0 at the others.
  __device__ __forceinline__ scalar_t by_item(const scalar_t* values, int i) const {
    if (scratch.place()[i] != i) return 0;
    scalar_t sum = 0;
    for (int e = i; e >= 0; e = scratch.next()[e]) sum += values[e];
    return sum;
  }

  // Scores of the entries at (u, c), into scratch; ends in step.
  __device__ __forceinline__ void score(const Fast& fast) const {
    task.dots(fast, task.rows(),
              [&](int i, scalar_t product) { scratch.along()[i] = scratch.biases()[i] + product; });
    task.team.sync();
    task.each(task.rows(),
              [&](int e) { scratch.scores()[e] = scratch.along()[scratch.place()[e]]; });
    task.team.sync();
  }

  __device__ __forceinline__ Fast step(int k, const Fast& now) const {
    const int R = task.rows();
    const scalar_t rate = loop.inner_lr[k];
    scalar_t *push = scratch.pushes() + k * R, *slopes = scratch.slopes() + k * R;
    score(now);
    task.differentiate(scratch.scores(), push, scratch.curvatures() + k * R);
    task.each(task.rows(), [&](int i) {
      slopes[i] = by_item(push, i);
      scratch.moves()[i] = rate * slopes[i];
      scratch.biases()[i] -= scratch.moves()[i];
    });
    task.team.sync();
    Fast sum = Fast::zero();
    task.each_own(task.rows(), [&](int i) {
      Fast row;
      task.columns.load(task.row(i), row);
      row.bias = 1;
      sum.add(scratch.moves()[i], row);
      row.add(-scratch.moves()[i], now);
      task.columns.store(row, task.row(i));
    });
    Fast next = now;
    next.add(-1, task.sum_team(sum));
    task.keep(next, scratch.path(), scratch.path_bias(), k + 1);
    task.team.sync();
    return next;
  }

  // The adjoint of step k: rows and biases, and all gradients, go back to its beginning.
  __device__ __forceinline__ void undo(int k, const Fast& user, Fast& grad_fast,
                                       scalar_t& offset) const {
    const int R = task.rows();
    const scalar_t rate = loop.inner_lr[k];
    const scalar_t *push = scratch.pushes() + k * R, *slopes = scratch.slopes() + k * R;
    task.each(task.rows(), [&](int i) {
      scratch.moves()[i] = rate * slopes[i];
      scratch.biases()[i] += scratch.moves()[i];
    });
    task.team.sync();
    const int stride = task.team.warps * task.columns.groups();
    for (int first = task.team.warp * task.columns.groups(); first < task.rows(); first += stride) {
      const int i = first + task.columns.group;
      scalar_t sum = 0;
      if (i < task.rows()) {
        Fast row, grad;
        task.columns.load(task.row(i), row);
        task.columns.load(grad_row(i), grad);
        row.bias = grad.bias = 0;
        row.add(scratch.moves()[i], user);
        task.columns.store(row, task.row(i));
        sum = row.dot(grad_fast) + grad.dot(user);
      }
      sum = task.columns.sum(sum);
      if (i < task.rows() && task.columns.lane == 0)
        scratch.along()[i] = sum + grad_fast.bias + scratch.grad_biases()[i];
    }
    task.team.sync();
    if (work.grads.wanted.inner_lr()) {
      scalar_t sum = 0;
      task.each(task.rows(), [&](int i) { sum += slopes[i] * scratch.along()[i]; });
      record.add(record.at.inner_lr() + k, -task.team.sum(sum, scratch.partial()));
    }
    if (loop.first_order) return task.team.sync();

    task.each(task.rows(),
              [&](int e) { scratch.scores()[e] = scratch.along()[scratch.place()[e]]; });
    scalar_t* bends = scratch.bends() + k * R;
    task.bend(push, scratch.curvatures() + k * R, rate, scratch.scores(), bends,
              work.grads.support_weights != nullptr);
    task.each(task.rows(), [&](int i) {
      const scalar_t grad_score = by_item(bends, i);  // P̄
      scratch.along()[i] = grad_score;
      scratch.grad_biases()[i] += grad_score;
      offset += grad_score;
    });
    task.team.sync();
    Fast sum = Fast::zero();
    task.each_own(task.rows(), [&](int i) {
      const scalar_t grad_score = scratch.along()[i], moved = scratch.moves()[i];
      Fast row, grad;
      task.columns.load(task.row(i), row);
      task.columns.load(grad_row(i), grad);
      row.bias = 1, grad.bias = 0;
      sum.add(grad_score, row);
      sum.add(-moved, grad);
      grad.add(grad_score, user);
      grad.add(-moved, grad_fast);
      task.columns.store(grad, grad_row(i));
    });
    grad_fast.add(1, task.sum_team(sum));
    task.team.sync();
  }

  // What the query says at point k; rows of the support get theirs.
  __device__ __forceinline__ void judge_at(Judging& judge, int k, const Fast& fast, bool first,
                                           Fast& grad_fast) const {
    judge.at(k, fast, first, grad_fast);
    if (!work.query.goes_back()) return;
    task.team.sync();
    const int64_t candidates = judge.group, from = judge.begin * candidates;
    const int count = judge.entries * judge.group;
    int hits = 0;
    task.each(count, [&](int c) { hits += work.hit_places[from + c] >= 0 ? 1 : 0; });
    if (task.team.sum(hits, reinterpret_cast<int*>(scratch.partial())) == 0) return;
    task.each_own(task.rows(), [&](int i) {
      scalar_t grad_bias = 0;
      Fast grad;
      task.columns.load(grad_row(i), grad);
      for (int c = 0; c < count; ++c) {
        if (work.hit_places[from + c] != i) continue;
        grad.add(work.hit_grads[from + c], fast);
        grad_bias += work.hit_grads[from + c];
      }
      task.columns.store(grad, grad_row(i));
      if (task.columns.lane == 0) scratch.grad_biases()[i] += grad_bias;
    });
    task.team.sync();
  }

  // What arrives at the adapted items themselves.
  __device__ __forceinline__ void take_given() const {
    const int64_t D = task.problem.shape.dim;
    task.each_own(task.rows(), [&](int i) {
      if (scratch.place()[i] != i) return;
      Fast sum = Fast::zero();
      for (int e = i; e >= 0; e = scratch.next()[e]) {  // every entry has what its item has become
        Fast grad;
        task.columns.load_row(work.grad_rows + (task.begin() + e) * D, /*packed=*/false, grad);
        grad.bias = work.grad_biases[task.begin() + e];
        sum.add(1, grad);
      }
      task.columns.store(sum, grad_row(i));
      if (task.columns.lane == 0) scratch.grad_biases()[i] = sum.bias;
    });
    task.team.sync();
  }

  // The adapted row and bias of each entry's item.
  __device__ __forceinline__ void write_items() const {
    task.each_own(task.rows(), [&](int e) {
      Fast row;
      const int i = scratch.place()[e];
      task.columns.load(task.row(i), row);
      const int64_t entry = task.begin() + e;
      task.columns.store_row(row, /*packed=*/false, work.rows_out + entry * task.problem.shape.dim);
      if (task.columns.lane == 0)
        work.biases_out[entry] = scratch.biases()[i] - *task.problem.offset;
    });
  }

  // Reptile: how far user and items are from where they ended, and the loss there.
  __device__ __forceinline__ void move(const Fast& fast) const {
    const QueryData<scalar_t>& query = work.query;
    const scalar_t weight = query.task_weight(task.index());
    book_move(task, record, work, fast);
    const auto share = [&](int i) {
      return scratch.place()[i] == i ? weight * work.item_shares[task.begin() + i] : scalar_t{0};
    };
    task.each(task.rows(), [&](int i) {
      scratch.grad_base()[i] = share(i) * (scratch.base()[i] - scratch.biases()[i]);
    });
    task.team.sync();
    write_support_rows(task, work.grads, [&](int i) {
      Fast after, sum = Fast::zero();
      task.columns.load(task.row(i), after);
      after.bias = 0;
      sum.add(share(i), task.load_item(task.problem.support.items[task.begin() + i]));
      sum.add(-share(i), after);
      return sum;
    });
    if (task.rows() == 0 || !(weight > 0)) return;
    score(fast);
    record.add(record.at.loss(), weight * query.normalisers[1] * support_loss(task, query.loss));
  }
};

template <typename scalar_t, typename table_t, int kChunks>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<scalar_t, false>)
    adapt_items_kernel(const __grid_constant__ AdaptWork<scalar_t, table_t> work) {
  CUDA_DYNAMIC_SHARED(scalar_t, shared);
  run_tasks<ItemsRunner<scalar_t, table_t, kChunks>>(work, shared);
}

}  // namespace metarec_fast::cuda
