// Full adaptation: the rows and biases of a task's support items adapt with its user, each task its
// own copies.
//
//   u ← u − s Σ_i g_i e_i    c ← c − s Σ_i g_i    e_i ← e_i − s g_i u    b_i ← b_i − s g_i (old
//   values on the right)
//
// over the distinct support items i, g_i the derivatives of the item's entries, summed. The rows
// stay in L1 for all K steps, at 2KS·D multiply-adds.
#include <numeric>

#include "task_reader.h"

namespace metarec_fast::cpu {
namespace {

// The distinct items of a task, ascending, and the place of every entry's item among them.
struct DistinctItems {
  std::vector<int64_t> ids, place, order;

  void find(const int64_t* items, int64_t count) {
    order.resize(count);
    place.resize(count);
    ids.clear();
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return items[a] < items[b]; });
    for (const int64_t entry : order) {
      if (ids.empty() || ids.back() != items[entry]) ids.push_back(items[entry]);
      place[entry] = static_cast<int64_t>(ids.size()) - 1;
    }
  }

  // Where `item` stands, or −1.
  int64_t index(int64_t item) const {
    const auto found = std::lower_bound(ids.begin(), ids.end(), item);
    return found != ids.end() && *found == item ? found - ids.begin() : -1;
  }
};

template <typename scalar_t>
MULTIVERSION void adapt_everything(const Task<scalar_t>& task, const DistinctItems& distinct,
                                   Arena<scalar_t>& arena, scalar_t* fast,
                                   scalar_t* rows,      // e of the distinct items [I, stride]
                                   scalar_t* biases) {  // m + b [I]
  const Layout<scalar_t>& layout = task.layout;
  const int64_t items = static_cast<int64_t>(distinct.ids.size());
  scalar_t* item_scores = arena.take(items);
  scalar_t* scores = arena.take(task.size);
  scalar_t* derivative = arena.take(task.size);
  scalar_t* curvature = arena.take(task.size);
  scalar_t* slopes = arena.take(items);  // g
  scalar_t* user_slope = arena.take(layout.stride);
  for (int64_t k = 0; k < task.loop.steps; ++k) {
    dots(fast, rows, items, layout, item_scores);
    for (int64_t s = 0; s < task.size; ++s)
      scores[s] = item_scores[distinct.place[s]] + biases[distinct.place[s]];
    differentiate(task, scores, derivative, curvature);
    std::fill(slopes, slopes + items, scalar_t{0});
    for (int64_t s = 0; s < task.size; ++s)
      slopes[distinct.place[s]] += task.weights[s] * derivative[s];

    const scalar_t rate = task.loop.inner_lr[k];
    combine(slopes, rows, items, layout, user_slope);
    for (int64_t i = 0; i < items; ++i) {
      scalar_t* row = rows + i * layout.stride;
      for (int64_t d = 0; d < layout.width; ++d) row[d] -= rate * slopes[i] * fast[d];
      biases[i] -= rate * slopes[i];
    }
    for (int64_t d = 0; d < layout.stride; ++d) fast[d] -= rate * user_slope[d];
  }
}

template <typename scalar_t>
MULTIVERSION scalar_t score_row(const scalar_t* fast, const scalar_t* row,
                                const Layout<scalar_t>& layout) {
  return dot(fast, row, layout);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapt_all_cpu(
    const Tensor& user_init, const Tensor& user_bias_init, const Tensor& item_table,
    const Tensor& item_bias, const Tensor& offset, const Tensor& support_items,
    const Tensor& support_targets, const Tensor& support_offsets,
    const OptionalTensor& support_weights, const Tensor& query_items, const Tensor& query_offsets,
    const Tensor& inner_lr, double extra_count, int64_t inner_steps, const std::string& loss) {
  STD_TORCH_CHECK(inner_steps >= 0, "inner_steps: must be ≥ 0, got ", inner_steps);
  const Inputs inputs(user_init, user_bias_init, item_table, item_bias, offset, support_items,
                      support_targets, support_offsets, support_weights);
  const LoopArguments loop(inputs, inner_lr, std::nullopt, std::nullopt, std::nullopt, extra_count,
                           inner_steps, loss, /*first_order=*/true, "auto");
  const RaggedItems query("query", query_items, query_offsets, item_table);
  const int64_t T = inputs.T(), entries = inputs.support.size();
  check_query(query, inputs);

  const auto empty = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(inputs.item_table, shape);
  };
  Tensor user = empty({T, inputs.D()}), bias = empty({T}), rows = empty({entries, inputs.D()}),
         biases = empty({entries}), scores = empty({query.size()});

  dispatch_floating(item_table.scalar_type(), "adapt_all", [&](auto zero) {
    using scalar_t = decltype(zero);
    const TaskReader<scalar_t> reader(inputs, loop);
    const Layout<scalar_t>& layout = reader.layout;
    const scalar_t m = *inputs.offset.const_data_ptr<scalar_t>();
    const int64_t* items = query.items.const_data_ptr<int64_t>();
    const int64_t* offsets = query.offsets.const_data_ptr<int64_t>();
    scalar_t* user_out = user.mutable_data_ptr<scalar_t>();
    scalar_t* bias_out = bias.mutable_data_ptr<scalar_t>();
    scalar_t* rows_out = rows.mutable_data_ptr<scalar_t>();
    scalar_t* biases_out = biases.mutable_data_ptr<scalar_t>();
    scalar_t* scores_out = scores.mutable_data_ptr<scalar_t>();

    const TaskBlocks blocks(T, reader.support_offsets, offsets);
    const auto make_distinct = [] { return DistinctItems(); };
    blocks.run(make_distinct, [&](int64_t, int64_t first, int64_t last, auto& distinct) {
      Arena<scalar_t>& arena = thread_arena<scalar_t>();
      for (int64_t t = first; t < last; ++t) {
        arena.reset();
        const Task<scalar_t> task = reader.read(t, arena);
        const int64_t support_begin = reader.support_offsets[t];
        distinct.find(reader.support_items + support_begin, task.size);
        const int64_t count = static_cast<int64_t>(distinct.ids.size());
        scalar_t* adapted = arena.take(count * layout.stride);
        scalar_t* item_biases = arena.take(count);
        scalar_t* fast = arena.take(layout.stride);
        reader.read_rows(distinct.ids.data(), count, adapted, item_biases);
        std::copy(task.start, task.start + layout.stride, fast);
        adapt_everything(task, distinct, arena, fast, adapted, item_biases);

        std::copy(fast, fast + layout.dim, user_out + t * layout.dim);
        bias_out[t] = fast[layout.width];
        for (int64_t s = 0; s < task.size; ++s) {
          const scalar_t* row = adapted + distinct.place[s] * layout.stride;
          std::copy(row, row + layout.dim, rows_out + (support_begin + s) * layout.dim);
          biases_out[support_begin + s] = item_biases[distinct.place[s]] - m;
        }
        const int64_t begin = offsets[t], size = offsets[t + 1] - begin;
        const Query<scalar_t> asked(reader, items + begin, size, arena);
        score_query(asked, layout, fast, scores_out + begin);
        for (int64_t q = 0; q < size; ++q) {
          const int64_t place = distinct.index(items[begin + q]);
          if (place < 0) continue;
          scores_out[begin + q] =
              item_biases[place] + score_row(fast, adapted + place * layout.stride, layout);
        }
      }
    });
  });
  return {user, bias, rows, biases, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) { m.impl("adapt_all", TORCH_BOX(&adapt_all_cpu)); }

}  // namespace metarec_fast::cpu
