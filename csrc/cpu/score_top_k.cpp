// The k best items of the catalogue for many users:  score = b_i + c + u·e_i.
//
// Users in small groups meet items in ranges; each meeting keeps its own k best, and those are
// merged. A score and its id order all items strictly, so the result does not depend on how the
// work was cut.
#include <limits>
#include <vector>

#include "../candidate.h"
#include "../top_k_arguments.h"
#include "task_reader.h"

namespace metarec_fast::cpu {
namespace {

constexpr int64_t kUsersPerGroup = 4;     // share each item row that comes from memory
constexpr int64_t kChunk = 256;           // items whose scores fit in L1
constexpr int64_t kGlance = 64;           // of them that are passed over together, if none is good
constexpr int64_t kSmallestRange = 4096;  // items
constexpr int64_t kEnoughMeetings = 64;   // to keep many threads busy

// The k best candidates offered so far; as a heap with the worst on top.
template <typename scalar_t>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {}

  void offer(scalar_t score, int64_t item) {
    const Candidate<scalar_t> candidate{as_number(score), item};
    if (static_cast<int64_t>(heap_.size()) < k_) {
      heap_.push_back(candidate);
      std::push_heap(heap_.begin(), heap_.end(), better);
    } else if (candidate.better_than(heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), better);
      heap_.back() = candidate;
      std::push_heap(heap_.begin(), heap_.end(), better);
    }
  }

  // Below this score, or at it, nobody is let in any more.
  scalar_t threshold() const {
    return static_cast<int64_t>(heap_.size()) < k_ ? std::numeric_limits<scalar_t>::quiet_NaN()
                                                   : heap_.front().score;
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

// Four numbers, or a register of them, from any address.
template <typename Numbers, typename scalar_t>
ALWAYS_INLINE Numbers load_unaligned(const scalar_t* address) {
  Numbers result;
  std::memcpy(&result, address, sizeof(result));
  return result;
}

// scores[u, i] = b_i + u·e_i for `kUsers` padded vectors and the items [first, last), and for items
// up to a multiple of four garbage. Rows that do not fill registers are copied to `copies` first.
template <int64_t kUsers, typename scalar_t>
void score_items(const scalar_t* users, const ItemTable<scalar_t>& table, const scalar_t* bias,
                 int64_t width, int64_t first, int64_t last, scalar_t* copies, scalar_t* scores,
                 int64_t stride) {
  constexpr int64_t kItems = kRowsAtOnce, kLane = kLanes<scalar_t>, kAheadBytes = 8192;
  for (int64_t item = first; item < last; item += kItems) {
    const scalar_t* rows[kItems];
    Quad<scalar_t> biases;
    for (int64_t i = 0; i < kItems; ++i) {
      const int64_t id = std::min(item + i, last - 1);
      rows[i] = table.row(id);
      biases[i] = bias[id];
      if (copies == nullptr) continue;
      rows[i] = copies + i * width;
      table.read(id, copies + i * width);
    }
    // The system's pages end what the hardware looks ahead.
    const std::byte* ahead = table.data + item * table.row_bytes + kAheadBytes;
    for (int64_t at = 0; at < kItems * table.row_bytes; at += kCacheLine)
      __builtin_prefetch(ahead + at, 0, 2);
    Vector<scalar_t> sums[kUsers][kItems] = {};
    for (int64_t d = 0; d < width; d += kLane) {
      Vector<scalar_t> parts[kItems];
      for (int64_t i = 0; i < kItems; ++i) parts[i] = load_unaligned<Vector<scalar_t>>(rows[i] + d);
      for (int64_t u = 0; u < kUsers; ++u) {
        const Vector<scalar_t> user = load(users + u * width + d);
        for (int64_t i = 0; i < kItems; ++i) sums[u][i] += user * parts[i];
      }
    }
    for (int64_t u = 0; u < kUsers; ++u)
      put(scores + u * stride + item - first, sum_lanes<scalar_t>(sums[u]) + biases);
  }
}

// The largest of `count` scores, a multiple of a register, that are numbers.
template <typename scalar_t>
scalar_t largest(const scalar_t* scores, int64_t count) {
  Vector<scalar_t> most = load(scores);
  for (int64_t i = 0; i < count; i += kLanes<scalar_t>) {
    const Vector<scalar_t> more = load(scores + i);
    most = more > most || most != most ? more : most;
  }
  scalar_t result = -std::numeric_limits<scalar_t>::infinity();
  for (int64_t i = 0; i < kLanes<scalar_t>; ++i)
    if (most[i] > result) result = most[i];
  return result;
}

std::tuple<Tensor, Tensor> score_top_k_cpu(const Tensor& user_in, const Tensor& user_bias_in,
                                           const Tensor& item_table_in, const Tensor& item_bias_in,
                                           int64_t k, const OptionalTensor& exclude_items,
                                           const OptionalTensor& exclude_offsets,
                                           bool /*tensor_cores*/) {
  const TopKArguments arguments(user_in, user_bias_in, item_table_in, item_bias_in, k,
                                exclude_items, exclude_offsets);
  const Tensor &user = arguments.user, &user_bias = arguments.user_bias,
               &item_table = arguments.item_table, &item_bias = arguments.item_bias;
  const auto& exclude = arguments.exclude;
  const int64_t T = arguments.T(), N = arguments.N(), D = arguments.D();

  // Every user's excluded items, ascending, so that a walk over the items meets them in turn.
  std::vector<int64_t> excluded, bounds(T + 1);
  if (exclude) {
    check_ragged("exclude", *exclude, N);
    const int64_t* items = exclude->items.const_data_ptr<int64_t>();
    excluded.assign(items, items + exclude->size());
    std::copy_n(exclude->offsets.const_data_ptr<int64_t>(), T + 1, bounds.begin());
    for (int64_t t = 0; t < T; ++t)
      std::sort(excluded.begin() + bounds[t], excluded.begin() + bounds[t + 1]);
  }

  Tensor best_items = torch::stable::empty({T, k}, ScalarType::Long);
  Tensor best_scores = torch::stable::new_empty(user, {T, k});

  dispatch_floating(arguments.dtype(), "score_top_k", [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* vectors = user.const_data_ptr<scalar_t>();
    const scalar_t* biases = user_bias.const_data_ptr<scalar_t>();
    const ItemTable<scalar_t> table(item_table, D);
    const Layout<scalar_t> layout(D);
    const int64_t width = layout.width;
    const bool fills_registers = D == width && !arguments.narrow();
    const scalar_t* bias = item_bias.const_data_ptr<scalar_t>();
    int64_t* items_out = best_items.mutable_data_ptr<int64_t>();
    scalar_t* scores_out = best_scores.mutable_data_ptr<scalar_t>();

    const int64_t groups = (T + kUsersPerGroup - 1) / kUsersPerGroup;
    const int64_t ranges =
        std::max<int64_t>(1, std::min((kEnoughMeetings + groups - 1) / std::max<int64_t>(groups, 1),
                                      N / kSmallestRange));
    std::vector<Best<scalar_t>> best(T * ranges, Best<scalar_t>(k));

    torch::stable::parallel_for(0, groups * ranges, 1, [&](int64_t begin, int64_t end) {
      Arena<scalar_t>& arena = thread_arena<scalar_t>();
      arena.reset();
      scalar_t* scores = arena.take(kUsersPerGroup * kChunk);
      scalar_t* padded_users = arena.take(kUsersPerGroup * width);
      scalar_t* copies = fills_registers ? nullptr : arena.take(kRowsAtOnce * width);
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
        for (int64_t u = 0; u < users; ++u)
          copy_in(vectors + (first_user + u) * D, D, padded_users + u * width);
        for (int64_t item = first; item < last; item += kChunk) {
          const int64_t chunk_end = std::min(item + kChunk, last);
          if (users == kUsersPerGroup)
            score_items<kUsersPerGroup>(padded_users, table, bias, width, item, chunk_end, copies,
                                        scores, kChunk);
          else
            for (int64_t u = 0; u < users; ++u)
              score_items<1>(padded_users + u * width, table, bias, width, item, chunk_end, copies,
                             scores + u * kChunk, kChunk);
          for (int64_t u = 0; u < users; ++u) {
            const int64_t t = first_user + u;
            Best<scalar_t>& found = best[t * ranges + range];
            for (int64_t begin = item; begin < chunk_end; begin += kGlance) {
              const scalar_t* here = scores + u * kChunk + begin - item;
              const int64_t end = std::min(begin + kGlance, chunk_end);
              if (end == begin + kGlance && largest(here, kGlance) + biases[t] <= found.threshold())
                continue;
              for (int64_t i = begin; i < end; ++i) {
                while (walk[u] < bounds[t + 1] && excluded[walk[u]] < i) ++walk[u];
                if (walk[u] < bounds[t + 1] && excluded[walk[u]] == i) continue;
                found.offer(here[i - begin] + biases[t], i);
              }
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
