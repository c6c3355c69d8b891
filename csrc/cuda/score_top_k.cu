// The k best items of the catalogue for many users:  score = b_i + c + u·e_i.
//
// A block scores its users for a range of items, chunk by chunk; a warp keeps the k best of each of
// its users, and a second kernel merges those of the ranges. For k beyond what a warp can keep, all
// scores of some users at a time are sorted. A score and its id order all items strictly, so the
// result depends on none of this.
#include <algorithm>

#include "best_list.h"
#include "score_top_k.h"
#include "tensor_tile.h"

namespace metarec_fast::cuda {
namespace {

constexpr int kLongestList = 128;        // candidates that a warp keeps for a user
constexpr int64_t kSmallestRange = 512;  // items
constexpr int kThreads = 256;

// Items that a user is not to get, as numbers  t N + item,  ascending; none if keys is nullptr.
struct Excluded {
  const int64_t* keys;     // [E]
  const int64_t* offsets;  // [T + 1]

  __device__ bool contains(int64_t task, int64_t key) const {
    if (keys == nullptr) return false;
    int64_t begin = offsets[task], end = offsets[task + 1];
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (keys[middle] == key) return true;
      if (keys[middle] < key)
        begin = middle + 1;
      else
        end = middle;
    }
    return false;
  }
};

// Which task owns an entry: the last that begins at it or before.
__device__ int64_t task_of(const int64_t* offsets, int64_t num_tasks, int64_t entry) {
  int64_t task = 0, end = num_tasks;
  while (end - task > 1) {
    const int64_t middle = task + (end - task) / 2;
    (offsets[middle] <= entry ? task : end) = middle;
  }
  return task;
}

// keys[e] = t N + items[e]. One thread an entry.
__global__ void __launch_bounds__(kThreads)
    exclude_keys_kernel(const int64_t* __restrict__ items,    // [E]
                        const int64_t* __restrict__ offsets,  // [T + 1]
                        int64_t count, int64_t num_tasks, int64_t num_items,
                        int64_t* __restrict__ keys) {  // [E]
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= count) return;
  keys[entry] = task_of(offsets, num_tasks, entry) * num_items + items[entry];
}

// The k best of each range of items for each user, best first. Blocks that run at the same time
// have the same range, and meet its rows in the cache.
template <typename Tile>
__global__ void __launch_bounds__(kScoringThreads, kBlocksAtOnce<typename Tile::scalar_t>)
    score_ranges_kernel(ScoreInputs<typename Tile::scalar_t, typename Tile::row_t> inputs,
                        Excluded excluded, int k, int64_t user_blocks, int64_t ranges,
                        typename Tile::scalar_t* __restrict__ best_scores,  // [T, ranges, k]
                        int64_t* __restrict__ best_items) {                 // [T, ranges, k]
  using scalar_t = typename Tile::scalar_t;
  constexpr int kUsers = Tile::kUsers;
  CUDA_DYNAMIC_SHARED(int64_t, list_items);  // [users, k]
  scalar_t* const memory = reinterpret_cast<scalar_t*>(list_items + Tile::kUsersPerBlock * k);
  scalar_t* const list_scores = memory + Tile::kNumbers;  // [users, k]
  Tile tile(inputs, memory);

  const int64_t range = blockIdx.x / user_blocks;
  const int64_t first_user = blockIdx.x % user_blocks * Tile::kUsersPerBlock;
  const int64_t begin = inputs.num_items * range / ranges;
  const int64_t end = inputs.num_items * (range + 1) / ranges;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const auto list_of = [&](int u) {
    const int place = (warp * kUsers + u) * k;
    return BestList<scalar_t>(list_scores + place, list_items + place, k);
  };
  for (int u = 0; u < kUsers; ++u) list_of(u).clear();

  for (int64_t first = begin; first < end; first += kItemsPerChunk) {
    const int64_t last = end_of_chunk(first, end);
    tile.score(first_user, first, last);
#pragma unroll 1
    for (int u = 0; u < kUsers; ++u) {
      const int64_t t = first_user + warp * kUsers + u;
      if (t >= inputs.num_users) break;  // the whole warp
      BestList<scalar_t> best = list_of(u);
      const Candidate<scalar_t> worst = best.worst();
      unsigned waiting = 0;  // which of the lane's items may be let in
#pragma unroll
      for (int j = 0; j < kItemsPerLane; ++j) {
        const int64_t item = first + lane + kWarpSize * j;
        if (item < last && Candidate<scalar_t>{tile.at(u, j), item}.better_than(worst))
          waiting |= 1u << j;
      }
      while (__any_sync(kAllLanes, waiting != 0)) {
        const int j = __ffs(waiting) - 1;  // −1: none
        Candidate<scalar_t> mine = BestList<scalar_t>::nobody();
        if (j >= 0) mine = {tile.at(u, j), first + lane + kWarpSize * j};
        if (j >= 0 && excluded.contains(t, t * inputs.num_items + mine.item))
          mine = BestList<scalar_t>::nobody();
        waiting &= waiting - 1;
        best.offer(mine);
      }
    }
  }

  for (int u = 0; u < kUsers; ++u) {
    const int64_t t = first_user + warp * kUsers + u;
    if (t >= inputs.num_users) break;
    const int64_t place = (t * ranges + range) * k;
    list_of(u).write(best_scores + place, best_items + place);
  }
}

// The k best of all ranges. One block owns a user, one warp every kWarpsPerBlock-th range.
template <typename scalar_t>
__global__ void __launch_bounds__(kScoringThreads)
    merge_ranges_kernel(const scalar_t* __restrict__ range_scores,  // [T, ranges, k]
                        const int64_t* __restrict__ range_items,    // [T, ranges, k]
                        int64_t ranges, int k,
                        scalar_t* __restrict__ best_scores,  // [T, k]
                        int64_t* __restrict__ best_items) {  // [T, k]
  CUDA_DYNAMIC_SHARED(int64_t, list_items);                  // [warps, k]
  scalar_t* const list_scores = reinterpret_cast<scalar_t*>(list_items + kWarpsPerBlock * k);
  const int64_t t = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize;
  const auto list_of = [&](int owner) {
    return BestList<scalar_t>(list_scores + owner * k, list_items + owner * k, k);
  };
  BestList<scalar_t> best = list_of(warp);
  best.clear();
  for (int64_t range = warp; range < ranges; range += kWarpsPerBlock) {
    const int64_t place = (t * ranges + range) * k;
    best.merge([&](int i) {
      const int64_t item = range_items[place + i];
      return Candidate<scalar_t>{range_scores[place + i], item < 0 ? kNoItem : item};
    });
  }
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < kWarpsPerBlock; ++other)
    best.merge([&](int i) { return list_of(other).at(i); });
  best.write(best_scores + t * k, best_items + t * k);
}

// The keys of excluded items, ascending; nothing if there are none.
OptionalTensor sort_excluded(const TopKArguments& arguments, cudaStream_t stream) {
  const auto& exclude = arguments.exclude;
  if (!exclude || exclude->size() == 0) return std::nullopt;
  Tensor keys = empty(exclude->items, ScalarType::Long, {exclude->size()});
  check_launch(
      "score_top_k",
      launch("exclude_keys_kernel", exclude_keys_kernel, blocks_for(exclude->size(), kThreads),
             kThreads, 0, stream, exclude->items.const_data_ptr<int64_t>(),
             exclude->offsets.const_data_ptr<int64_t>(), exclude->size(), arguments.T(),
             arguments.N(), keys.mutable_data_ptr<int64_t>()));
  return stable_sort(keys).first;
}

// Into how many ranges the items are cut. Few blocks of users share the device in one round, so
// that there are few lists to merge; many do in some, so that the last one costs little.
int64_t count_ranges(int64_t num_items, int64_t user_blocks, int64_t resident) {
  const int64_t rounds = user_blocks * 8 <= resident ? 1 : 4;
  const int64_t most = (num_items + kSmallestRange - 1) / kSmallestRange;
  return std::clamp<int64_t>(rounds * resident / user_blocks, 1, most);
}

// The best of all items, by lists of those of every range.
template <typename Tile>
void keep_best(const TopKArguments& arguments, const Excluded& excluded, Tensor& best_scores,
               Tensor& best_items, cudaStream_t stream) {
  using scalar_t = typename Tile::scalar_t;
  using row_t = typename Tile::row_t;
  const int64_t T = arguments.T(), N = arguments.N();
  const int k = static_cast<int>(arguments.k);
  const size_t entry_bytes = sizeof(int64_t) + sizeof(scalar_t);
  const size_t bytes = Tile::kNumbers * sizeof(scalar_t) + Tile::kUsersPerBlock * k * entry_bytes;
  const auto kernel = score_ranges_kernel<Tile>;
  const int64_t user_blocks = blocks_for(T, Tile::kUsersPerBlock);
  const int64_t ranges =
      count_ranges(N, user_blocks, resident_blocks(kernel, kScoringThreads, bytes));

  // One range's best are the best.
  Tensor scores = best_scores, items = best_items;
  if (ranges > 1) {
    scores = empty(best_scores, best_scores.scalar_type(), {T, ranges, k});
    items = empty(best_items, ScalarType::Long, {T, ranges, k});
  }

  check_launch(
      "score_top_k",
      launch("score_ranges_kernel", kernel, blocks_for(user_blocks * ranges, 1), kScoringThreads,
             bytes, stream, score_inputs<scalar_t, row_t>(arguments, 0, T), excluded, k,
             user_blocks, ranges, scores.mutable_data_ptr<scalar_t>(),
             items.mutable_data_ptr<int64_t>()));
  if (ranges == 1) return;
  check_launch(
      "score_top_k",
      launch("merge_ranges_kernel", merge_ranges_kernel<scalar_t>, blocks_for(T, 1),
             kScoringThreads, kWarpsPerBlock * k * entry_bytes, stream,
             scores.const_data_ptr<scalar_t>(), items.const_data_ptr<int64_t>(), ranges, k,
             best_scores.mutable_data_ptr<scalar_t>(), best_items.mutable_data_ptr<int64_t>()));
}

std::tuple<Tensor, Tensor> score_top_k_cuda(const Tensor& user, const Tensor& user_bias,
                                            const Tensor& item_table, const Tensor& item_bias,
                                            int64_t k, const OptionalTensor& exclude_items,
                                            const OptionalTensor& exclude_offsets,
                                            bool tensor_cores) {
  const TopKArguments arguments(user, user_bias, item_table, item_bias, k, exclude_items,
                                exclude_offsets);
  const int64_t T = arguments.T();
  STD_TORCH_CHECK(T == 0 || arguments.N() <= std::numeric_limits<int64_t>::max() / T,
                  "score_top_k: too many users and items");

  const OnDevice device(arguments.user);
  Tensor best_items = empty(arguments.user, ScalarType::Long, {T, k});
  Tensor best_scores = empty(arguments.user, arguments.dtype(), {T, k});
  if (T == 0) return {best_items, best_scores};

  const OptionalTensor keys = sort_excluded(arguments, device.stream);
  if (k > kLongestList) {
    sort_all_scores(arguments, keys, best_scores, best_items, device.stream);
    return {best_items, best_scores};
  }
  const Excluded excluded{keys ? keys->const_data_ptr<int64_t>() : nullptr,
                          keys ? arguments.exclude->offsets.const_data_ptr<int64_t>() : nullptr};
  dispatch_rows(arguments, [&](auto zero, auto row) {
    using scalar_t = decltype(zero);
    using row_t = decltype(row);
    auto run = T <= kWarpsPerBlock ? keep_best<ScoreTile<1, scalar_t, row_t>>
                                   : keep_best<ScoreTile<4, scalar_t, row_t>>;
    if constexpr (std::is_same_v<scalar_t, float>)
      if (tensor_cores && T > kWarpsPerBlock) run = keep_best<TensorTile<row_t>>;
    run(arguments, excluded, best_scores, best_items, device.stream);
  });
  return {best_items, best_scores};
}

}  // namespace

METAREC_CUDA_OPERATORS(m) { m.impl("score_top_k", TORCH_BOX(&score_top_k_cuda)); }

}  // namespace metarec_fast::cuda
