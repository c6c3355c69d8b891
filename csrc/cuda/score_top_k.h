// What the two ways to the best items have in common, and the one that sorts.
#pragma once

#include "../top_k_arguments.h"
#include "aten.h"
#include "launch.h"
#include "score_tile.h"

namespace metarec_fast::cuda {

// What kernels read, of users [first_user, first_user + num_users).
template <typename scalar_t, typename row_t>
ScoreInputs<scalar_t, row_t> score_inputs(const TopKArguments& arguments, int64_t first_user,
                                          int64_t num_users) {
  return {arguments.user.const_data_ptr<scalar_t>() + first_user * arguments.D(),
          arguments.user_bias.const_data_ptr<scalar_t>() + first_user,
          static_cast<const row_t*>(arguments.item_table.const_data_ptr()),
          arguments.item_bias.const_data_ptr<scalar_t>(),
          num_users,
          arguments.N(),
          arguments.D()};
}

// Calls body(scalar_t{}, row_t{}) with the types of arithmetic and of the table.
template <typename Body>
void dispatch_rows(const TopKArguments& arguments, const Body& body) {
  if (arguments.narrow()) return body(float{}, BFloat16{});
  dispatch_floating(arguments.dtype(), "score_top_k", [&](auto zero) { body(zero, zero); });
}

// The first k of all scores, sorted, for any k: as many users at a time as there is room for.
void sort_all_scores(const TopKArguments& arguments,
                     const OptionalTensor& excluded,  // keys [E], see score_top_k.cu
                     Tensor& best_scores,             // [T, k]
                     Tensor& best_items,              // [T, k]
                     cudaStream_t stream);

}  // namespace metarec_fast::cuda
