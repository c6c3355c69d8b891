// Reptile's step for a batch: how far tasks end up from where they started, averaged, as a
// gradient.
//
//   φ_0 − Σ_t ω_t φ_K,t / Σ_t ω_t,   of item rows over the tasks that hold the item
//   L = Σ_t ω_t L_t / Σ_t ω_t,       L_t = Σ_s w_s ℓ(p_s, y_s) / Σ_s w_s  on the support at φ_K
#include "direct_call.h"
#include "factored_form.h"
#include "gradients.h"
#include "inner_solver.h"
#include "query_loss.h"

namespace metarec_fast::cpu {
namespace {

// 1 / Σ ω over the tasks that hold an item. As many numbers as the table has rows, kept from call
// to call: only those of the batch are looked at, and cleared again.
template <typename scalar_t>
class ItemShares {
 public:
  void assign(const EntryData<scalar_t>& support, const scalar_t* task_weight, int64_t num_tasks,
              int64_t num_items) {
    if (static_cast<int64_t>(totals_.size()) < num_items) {
      totals_.resize(num_items);
      last_task_.resize(num_items);  // that counted, from 1
    }
    for (int64_t t = 0; t < num_tasks; ++t)
      for (int64_t e = support.begin(t); e < support.begin(t + 1); ++e) {
        const int64_t item = support.items[e];
        if (std::exchange(last_task_[item], t + 1) == t + 1) continue;
        totals_[item] += task_weight == nullptr ? 1 : task_weight[t];
      }
  }

  scalar_t operator[](int64_t item) const { return totals_[item] > 0 ? 1 / totals_[item] : 0; }

  void clear(const EntryData<scalar_t>& support, int64_t num_tasks) {
    for (int64_t e = 0; e < support.begin(num_tasks); ++e)
      totals_[support.items[e]] = last_task_[support.items[e]] = 0;
  }

 private:
  std::vector<scalar_t> totals_;
  std::vector<int64_t> last_task_;
};

// Σ w ℓ(p, y) / Σ w of a task's support entries
template <typename scalar_t>
scalar_t support_loss(const Task<scalar_t>& task, const OuterLoss& loss, const scalar_t* scores,
                      Arena<scalar_t>& arena) {
  if (task.size == 0) return 0;
  scalar_t* ignored = arena.take(task.size);
  return judge_points(loss, scores, task.targets, task.weights, task.size, ignored) /
         sum(task.weights, task.size);
}

// moved = share (before − after)
template <typename scalar_t>
void move_of(const scalar_t* before, const scalar_t* after, scalar_t share, int64_t count,
             scalar_t* moved) {
  for (int64_t i = 0; i < count; i += kLanes<scalar_t>)
    store(moved + i) = share * (load(before + i) - load(after + i));
}

// How far a task's items go: moves.rows and moves.biases are share_i (before − after); item_scores
// are those afterwards. Returns φ_K.
template <typename scalar_t>
const scalar_t* move_items(const Task<scalar_t>& task, const ItemIndex& index,
                           const scalar_t* shares, Arena<scalar_t>& arena,
                           FullGradients<scalar_t>& moves, scalar_t* item_scores) {
  const int64_t K = task.loop.steps, width = task.layout.width;
  FullPath<scalar_t> path;
  start_full(task, index, arena, path);
  moves.rows = arena.take(path.items * width);
  moves.biases = arena.take(path.items);
  std::copy_n(path.rows, path.items * width, moves.rows);
  std::copy_n(path.biases, path.items, moves.biases);
  for (int64_t k = 0; k < K; ++k) step_full(task, index, k, arena, path);
  const scalar_t* fast = path.fast + K * task.layout.stride;
  score_query<scalar_t>({path.items, 1, path.item_rows, path.biases}, fast, item_scores);
  for (int64_t i = 0; i < path.items; ++i) {
    scalar_t* row = moves.rows + i * width;
    move_of(row, path.rows + i * width, shares[i], width, row);
    moves.biases[i] = shares[i] * (moves.biases[i] - path.biases[i]);
  }
  return fast;
}

// The same by factors: E_0 − E_K = −Σ_j a_j u_jᵀ. Rows [I, D] go to `rows` where that is given.
template <typename scalar_t>
const scalar_t* move_by_factors(const Task<scalar_t>& task, const ItemIndex& index,
                                const scalar_t* shares, Arena<scalar_t>& arena,
                                FullGradients<scalar_t>& moves, scalar_t* item_scores,
                                scalar_t* rows, bool stream) {
  constexpr int64_t kLane = kLanes<scalar_t>;
  const Layout<scalar_t>& layout = task.layout;
  const int64_t K = task.loop.steps;
  FactoredPath<scalar_t> path;
  factored_forward(task, index, arena, path);
  factored_scores(path, item_scores);
  moves.biases = arena.take_zeros(path.stride);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < path.stride; i += kLane) {
      store(path.moves(k) + i) *= -load(shares + i);
      store(moves.biases + i) += load(path.moves(k) + i);
    }
  const bool own_rows = rows == nullptr;
  if (own_rows) rows = moves.rows = arena.take(path.items * layout.width);
  write_rows<scalar_t>(layout, {path.moves(0), 1, path.row}, path.items,
                       Stack<scalar_t>{path.vectors, layout.stride}, K, arena, rows,
                       own_rows ? layout.width : layout.dim, stream && !own_rows);
  return path.vector(K);
}

ReptileTuple reptile_step_cpu(const Tensor& user_init, const Tensor& user_bias_init,
                              const Tensor& item_table, const Tensor& item_bias,
                              const Tensor& offset, const Tensor& support_items,
                              const Tensor& support_targets, const Tensor& support_offsets,
                              const OptionalTensor& support_weights,
                              const OptionalTensor& support_negatives,
                              const OptionalTensor& support_log_q, int64_t largest_support,
                              const OptionalTensor& task_weights_in, const Tensor& inner_lr,
                              const OptionalTensor& preconditioner,
                              const OptionalTensor& prior_pull, const OptionalTensor& momentum,
                              double extra_count, int64_t inner_steps, const std::string& loss_name,
                              bool first_order, const std::string& form, const std::string& adapt) {
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights, support_negatives,
                      support_log_q, largest_support);
  const LoopArguments loop(inputs, inner_lr, preconditioner, prior_pull, momentum, extra_count,
                           inner_steps, loss_name, first_order, form, adapt);
  const ReptileArguments reptile(inputs, loop, loss_name, task_weights_in);
  const OptionalTensor& task_weights = reptile.task_weights;
  const RaggedItems nothing = inputs.support.without_entries();
  const Wanted wanted{loop.adapts_items ? 3 : 1};  // the start, and items

  Tensor loss = empty(item_bias, inputs.dtype(), {});
  ReptileTuple result{loss, loss, loss, {}, {}};
  dispatch_floating(inputs.dtype(), "reptile_step", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const Layout<scalar_t>& layout = reader.layout;
    const scalar_t* task_weight = task_weights ? task_weights->const_data_ptr<scalar_t>() : nullptr;
    const int64_t T = inputs.T();
    scalar_t total = 0, judged_total = 0;
    for (int64_t t = 0; t < T; ++t) {
      const scalar_t weight = task_weight == nullptr ? 1 : task_weight[t];
      total += weight;
      if (reader.support.size(t) > 0) judged_total += weight;
    }
    static thread_local ItemShares<scalar_t> kept_shares;
    ItemShares<scalar_t>& shares = kept_shares;  // this thread's, for all workers
    if (loop.adapts_items) shares.assign(reader.support, task_weight, T, inputs.N());

    const TaskBlocks blocks(T, reader.support.offsets, nullptr, reader.entry_cost());
    Gradients<scalar_t> gradients(inputs, loop, wanted, nothing, blocks.size());
    struct State {
      InnerSolver<scalar_t> solver;
      ItemIndex index;
    };
    blocks.run<Worker<scalar_t, State>>([&](int64_t block, int64_t t, int64_t last, auto& worker) {
      auto& [arena, ahead, state] = worker;
      const Task<scalar_t> task = reader.next(t, last, nullptr, arena, ahead);
      const scalar_t weight = task_weight == nullptr ? 1 : task_weight[t];
      const int64_t begin = reader.support.begin(t);
      scalar_t* scores = arena.take(task.size);
      FullGradients<scalar_t> moves{arena.take(layout.stride), nullptr, nullptr, 0, nullptr, {}};
      const scalar_t* fast = nullptr;
      if (loop.adapts_items) {
        ItemIndex& index = state.index;
        index.assign(reader.support.items + begin, task.size);
        scalar_t *item_scores = arena.take(index.size()), *item_shares = arena.take(index.size());
        for (int64_t i = 0; i < index.size(); ++i) item_shares[i] = weight * shares[index.ids[i]];
        if (worth_factoring(index.size(), reader.loop.steps))
          fast = move_by_factors(task, index, item_shares, arena, moves, item_scores,
                                 index.all_distinct() ? gradients.support_row(begin) : nullptr,
                                 gradients.stream());
        else
          fast = move_items(task, index, item_shares, arena, moves, item_scores);
        for (int64_t e = 0; e < task.size; ++e) scores[e] = item_scores[index.place[e]];
      } else {
        fast = state.solver.forward(task, arena, /*backward=*/false);
        score_query<scalar_t>({task.size, 1, task.rows, task.base}, fast, scores);
      }
      const scalar_t share = total > 0 ? weight / total : 0;
      move_of(task.start, fast, share, layout.stride, moves.fast);
      if (task.size > 0 && weight > 0)
        gradients.add_loss(block,
                           weight / judged_total * support_loss(task, reptile.loss, scores, arena));
      gradients.add_moves(block, task, moves, state.index, begin);
    });
    if (loop.adapts_items) shares.clear(reader.support, T);
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(gradients.finish());
    result = {loss, *gradients.user_init, *gradients.user_bias_init, gradients.item_rows,
              gradients.item_bias_rows};
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("reptile_step", TORCH_BOX(&reptile_step_cpu));
}

METAREC_DIRECT_CALL(reptile_step, reptile_step_cpu)

}  // namespace metarec_fast::cpu
