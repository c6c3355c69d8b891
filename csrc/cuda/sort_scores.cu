// The k best items of each user for any k: all scores of some users at a time, sorted.
#include <algorithm>

#include "score_top_k.h"

namespace metarec_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUsers = 4;  // of a warp
constexpr int64_t kScoresAtOnce = int64_t{1} << 24;

template <typename scalar_t>
constexpr scalar_t kMark = std::numeric_limits<scalar_t>::quiet_NaN();  // sorted before all numbers

// All scores of the inputs' users.
template <typename scalar_t, typename row_t>
__global__ void __launch_bounds__(kScoringThreads, kBlocksAtOnce<scalar_t>)
    score_all_kernel(ScoreInputs<scalar_t, row_t> inputs, int64_t user_blocks,
                     scalar_t* __restrict__ all_scores) {  // [T, N]
  using Tile = ScoreTile<kUsers, scalar_t, row_t>;
  CUDA_DYNAMIC_SHARED(scalar_t, memory);
  Tile tile(inputs, memory);
  const int64_t first = blockIdx.x / user_blocks * kItemsPerChunk;
  const int64_t first_user = blockIdx.x % user_blocks * Tile::kUsersPerBlock;
  const int64_t last = end_of_chunk(first, inputs.num_items);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  tile.score(first_user, first, last);
#pragma unroll
  for (int u = 0; u < kUsers; ++u) {
    const int64_t t = first_user + warp * kUsers + u;
#pragma unroll
    for (int j = 0; j < kItemsPerLane; ++j) {
      const int64_t item = first + lane + kWarpSize * j;
      // −0 becomes 0: sorting by bits must not tell them apart.
      if (t < inputs.num_users && item < last)
        all_scores[t * inputs.num_items + item] = tile.at(u, j) == 0 ? scalar_t{0} : tile.at(u, j);
    }
  }
}

// Marks excluded items; one that comes twice, once. One thread a key.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    mark_excluded_kernel(const int64_t* __restrict__ keys,  // [E], ascending
                         int64_t count, int64_t first_key, int64_t end_key,
                         scalar_t* __restrict__ scores) {  // of the keys [first_key, end_key)
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const bool is_new = i == 0 || keys[i] != keys[i - 1];
  if (is_new && keys[i] >= first_key && keys[i] < end_key)
    scores[keys[i] - first_key] = kMark<scalar_t>;
}

// The first k of the sorted scores that are no marks. One thread a result.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    take_best_kernel(const scalar_t* __restrict__ sorted,  // [T, N]
                     const int64_t* __restrict__ order,    // [T, N]
                     int64_t num_users, int64_t num_items, int64_t k,
                     scalar_t* __restrict__ best_scores,  // [T, k]
                     int64_t* __restrict__ best_items) {  // [T, k]
  const int64_t result = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (result >= num_users * k) return;
  const int64_t row = result / k * num_items;
  int64_t marks = 0, end = num_items;
  while (marks < end) {
    const int64_t middle = marks + (end - marks) / 2;
    if (sorted[row + middle] == sorted[row + middle])
      end = middle;
    else
      marks = middle + 1;
  }
  const int64_t place = marks + result % k;
  const bool is_there = place < num_items;
  best_scores[result] = is_there ? sorted[row + place] : kLowest<scalar_t>;
  best_items[result] = is_there ? order[row + place] : -1;
}

// For users [first_user, first_user + num_users); their scores are sorted in `all_scores` [T, N].
template <typename scalar_t, typename row_t>
void sort_some(const TopKArguments& arguments, const OptionalTensor& excluded, int64_t first_user,
               int64_t num_users, Tensor& best_scores, Tensor& best_items, cudaStream_t stream) {
  using Tile = ScoreTile<kUsers, scalar_t, row_t>;
  const int64_t N = arguments.N(), k = arguments.k;
  const int64_t user_blocks = blocks_for(num_users, Tile::kUsersPerBlock);
  Tensor all_scores = empty(best_scores, arguments.dtype(), {num_users, N});
  scalar_t* scores = all_scores.mutable_data_ptr<scalar_t>();
  check_launch(
      "score_top_k",
      launch("score_all_kernel", score_all_kernel<scalar_t, row_t>,
             blocks_for(blocks_for(N, kItemsPerChunk) * user_blocks, 1), kScoringThreads,
             Tile::kNumbers * sizeof(scalar_t), stream,
             score_inputs<scalar_t, row_t>(arguments, first_user, num_users), user_blocks, scores));
  if (excluded)
    check_launch("score_top_k", launch("mark_excluded_kernel", mark_excluded_kernel<scalar_t>,
                                       blocks_for(excluded->size(0), kThreads), kThreads, 0, stream,
                                       excluded->const_data_ptr<int64_t>(), excluded->size(0),
                                       first_user * N, (first_user + num_users) * N, scores));

  const auto [sorted, order] = stable_sort(all_scores, /*descending=*/true);
  check_launch("score_top_k", launch("take_best_kernel", take_best_kernel<scalar_t>,
                                     blocks_for(num_users * k, kThreads), kThreads, 0, stream,
                                     sorted.template const_data_ptr<scalar_t>(),
                                     order.template const_data_ptr<int64_t>(), num_users, N, k,
                                     best_scores.mutable_data_ptr<scalar_t>() + first_user * k,
                                     best_items.mutable_data_ptr<int64_t>() + first_user * k));
}

}  // namespace

void sort_all_scores(const TopKArguments& arguments, const OptionalTensor& excluded,
                     Tensor& best_scores, Tensor& best_items, cudaStream_t stream) {
  const int64_t T = arguments.T();
  const int64_t at_once = std::clamp<int64_t>(kScoresAtOnce / arguments.N(), 1, T);
  dispatch_rows(arguments, [&](auto zero, auto row) {
    for (int64_t first = 0; first < T; first += at_once)
      sort_some<decltype(zero), decltype(row)>(arguments, excluded, first,
                                               std::min(at_once, T - first), best_scores,
                                               best_items, stream);
  });
}

}  // namespace metarec_fast::cuda
