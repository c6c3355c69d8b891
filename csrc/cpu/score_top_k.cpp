// The k best items of the catalogue for many users:  score = b_i + c + u·e_i.
//
// Users in small groups meet items in ranges; each meeting keeps its own k best, and those are
// merged. A score and its id order all items strictly, so the result does not depend on how the
// work was cut.
#include <limits>
#include <vector>

#include "../arguments.h"
#include "task_blocks.h"
#include "vector.h"

namespace metarec_fast::cpu {
namespace {

constexpr int64_t kUsersPerGroup = 4;     // share each item row that comes from memory
constexpr int64_t kSmallestRange = 4096;  // items
constexpr int64_t kEnoughMeetings = 64;   // to keep many threads busy

template <typename scalar_t>
struct Candidate {
  scalar_t score;
  int64_t item;

  bool better_than(const Candidate& other) const {
    return score > other.score || (score == other.score && item < other.item);
  }
};

// The k best candidates offered so far; as a heap with the worst on top.
template <typename scalar_t>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {}

  void offer(scalar_t score, int64_t item) {
    if (!(score >= -std::numeric_limits<scalar_t>::infinity()))  // not a number
      score = -std::numeric_limits<scalar_t>::infinity();
    const Candidate<scalar_t> candidate{score, item};
    if (static_cast<int64_t>(heap_.size()) < k_) {
      heap_.push_back(candidate);
      std::push_heap(heap_.begin(), heap_.end(), better);
    } else if (candidate.better_than(heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), better);
      heap_.back() = candidate;
      std::push_heap(heap_.begin(), heap_.end(), better);
    }
  }

  void merge(const Best& other) {
    for (const auto& candidate : other.heap_) offer(candidate.score, candidate.item);
  }

  // Best first; id −1 and score −inf where there are fewer than k.
  void write(int64_t* items, scalar_t* scores) {
    std::sort_heap(heap_.begin(), heap_.end(), better);
    for (int64_t i = 0; i < k_; ++i) {
      const bool is_there = i < static_cast<int64_t>(heap_.size());
      items[i] = is_there ? heap_[i].item : -1;
      scores[i] = is_there ? heap_[i].score : -std::numeric_limits<scalar_t>::infinity();
    }
  }

 private:
  static bool better(const Candidate<scalar_t>& a, const Candidate<scalar_t>& b) {
    return a.better_than(b);
  }

  int64_t k_;
  std::vector<Candidate<scalar_t>> heap_;
};

// A row of the table, which begins at any address.
template <typename scalar_t>
ALWAYS_INLINE Vector<scalar_t> load_unaligned(const scalar_t* address) {
  Vector<scalar_t> result;
  std::memcpy(&result, address, sizeof(result));
  return result;
}

// scores[u, i] = b_i + u·e_i for a group of users and the items [first, last).
template <int64_t kUsers, typename scalar_t>
ALWAYS_INLINE void score_range(const scalar_t* users, const scalar_t* table, const scalar_t* bias,
                               int64_t dim, int64_t first, int64_t last, scalar_t* scores,
                               int64_t stride) {
  const int64_t whole = dim / kLanes<scalar_t> * kLanes<scalar_t>;
  for (int64_t item = first; item < last; ++item) {
    const scalar_t* row = table + item * dim;
    Vector<scalar_t> sums[kUsers] = {};
    for (int64_t d = 0; d < whole; d += kLanes<scalar_t>) {
      const Vector<scalar_t> part = load_unaligned(row + d);
      for (int64_t u = 0; u < kUsers; ++u) sums[u] += part * load_unaligned(users + u * dim + d);
    }
    for (int64_t u = 0; u < kUsers; ++u) {
      scalar_t sum = bias[item] + sum_lanes<scalar_t>(sums[u]);
      for (int64_t d = whole; d < dim; ++d) sum += row[d] * users[u * dim + d];
      scores[u * stride + item - first] = sum;
    }
  }
}

template <typename scalar_t>
void score_group(int64_t users, const scalar_t* vectors, const scalar_t* table,
                 const scalar_t* bias, int64_t dim, int64_t first, int64_t last, scalar_t* scores,
                 int64_t stride) {
  if (users == kUsersPerGroup) {
    score_range<kUsersPerGroup>(vectors, table, bias, dim, first, last, scores, stride);
  } else {
    for (int64_t u = 0; u < users; ++u)
      score_range<1>(vectors + u * dim, table, bias, dim, first, last, scores + u * stride, stride);
  }
}

std::tuple<Tensor, Tensor> score_top_k_cpu(const Tensor& user_in, const Tensor& user_bias_in,
                                           const Tensor& item_table_in, const Tensor& item_bias_in,
                                           int64_t k, const OptionalTensor& exclude_items,
                                           const OptionalTensor& exclude_offsets) {
  const Tensor user = as_contiguous(user_in), user_bias = as_contiguous(user_bias_in),
               item_table = as_contiguous(item_table_in), item_bias = as_contiguous(item_bias_in);
  STD_TORCH_CHECK(item_table.dim() == 2, "item_table: expected shape [N, D]");
  const int64_t N = item_table.size(0), D = item_table.size(1);
  STD_TORCH_CHECK(user.dim() == 2 && user.size(1) == D, "user: expected shape [T, ", D, "]");
  const int64_t T = user.size(0);
  for (const auto& [name, tensor] : {std::pair{"user", user}, std::pair{"user_bias", user_bias},
                                     std::pair{"item_bias", item_bias}})
    check_tensor(name, tensor, item_table.scalar_type(), item_table);
  check_size("user_bias", user_bias, T);
  check_size("item_bias", item_bias, N);
  STD_TORCH_CHECK(k >= 1 && k <= N, "k: must be in [1, ", N, "], got ", k);
  STD_TORCH_CHECK(exclude_items.has_value() == exclude_offsets.has_value(),
                  "exclude_items, exclude_offsets: expected both or none");

  // Every user's excluded items, ascending, so that a walk over the items meets them in turn.
  std::vector<int64_t> excluded, bounds(T + 1);
  if (exclude_items) {
    const RaggedItems exclude("exclude", *exclude_items, *exclude_offsets, item_table);
    STD_TORCH_CHECK(exclude.num_tasks == T, "exclude_offsets: expected ", T, " tasks, got ",
                    exclude.num_tasks);
    check_ragged("exclude", exclude, N);
    const int64_t* items = exclude.items.const_data_ptr<int64_t>();
    excluded.assign(items, items + exclude.size());
    std::copy_n(exclude.offsets.const_data_ptr<int64_t>(), T + 1, bounds.begin());
    for (int64_t t = 0; t < T; ++t)
      std::sort(excluded.begin() + bounds[t], excluded.begin() + bounds[t + 1]);
  }

  Tensor best_items = torch::stable::empty({T, k}, ScalarType::Long);
  Tensor best_scores = torch::stable::new_empty(user, {T, k});

  dispatch_floating(item_table.scalar_type(), "score_top_k", [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* vectors = user.const_data_ptr<scalar_t>();
    const scalar_t* biases = user_bias.const_data_ptr<scalar_t>();
    const scalar_t* table = item_table.const_data_ptr<scalar_t>();
    const scalar_t* bias = item_bias.const_data_ptr<scalar_t>();
    int64_t* items_out = best_items.mutable_data_ptr<int64_t>();
    scalar_t* scores_out = best_scores.mutable_data_ptr<scalar_t>();

    const int64_t groups = (T + kUsersPerGroup - 1) / kUsersPerGroup;
    const int64_t ranges =
        std::max<int64_t>(1, std::min((kEnoughMeetings + groups - 1) / std::max<int64_t>(groups, 1),
                                      N / kSmallestRange));
    std::vector<Best<scalar_t>> best(T * ranges, Best<scalar_t>(k));

    torch::stable::parallel_for(0, groups * ranges, 1, [&](int64_t begin, int64_t end) {
      constexpr int64_t kChunk = 256;  // items whose scores fit in L1
      std::vector<scalar_t> scores(kUsersPerGroup * kChunk);
      for (int64_t meeting = begin; meeting < end; ++meeting) {
        const int64_t group = meeting / ranges, range = meeting % ranges;
        const int64_t first_user = group * kUsersPerGroup,
                      users = std::min(kUsersPerGroup, T - first_user);
        const int64_t first = N * range / ranges, last = N * (range + 1) / ranges;
        int64_t walk[kUsersPerGroup];  // the next excluded item of each user
        for (int64_t u = 0; u < users; ++u)
          walk[u] = std::lower_bound(excluded.begin() + bounds[first_user + u],
                                     excluded.begin() + bounds[first_user + u + 1], first) -
                    excluded.begin();
        for (int64_t item = first; item < last; item += kChunk) {
          const int64_t chunk_end = std::min(item + kChunk, last);
          score_group(users, vectors + first_user * D, table, bias, D, item, chunk_end,
                      scores.data(), kChunk);
          for (int64_t u = 0; u < users; ++u) {
            const int64_t t = first_user + u;
            Best<scalar_t>& found = best[t * ranges + range];
            for (int64_t i = item; i < chunk_end; ++i) {
              while (walk[u] < bounds[t + 1] && excluded[walk[u]] < i) ++walk[u];
              if (walk[u] < bounds[t + 1] && excluded[walk[u]] == i) continue;
              found.offer(scores[u * kChunk + i - item] + biases[t], i);
            }
          }
        }
      }
    });
    torch::stable::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        Best<scalar_t>& merged = best[t * ranges];
        for (int64_t range = 1; range < ranges; ++range) merged.merge(best[t * ranges + range]);
        merged.write(items_out + t * k, scores_out + t * k);
      }
    });
  });
  return {best_items, best_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metarec_fast, CPU, m) {
  m.impl("score_top_k", TORCH_BOX(&score_top_k_cpu));
}

}  // namespace metarec_fast::cpu
