// Full adaptation without the adapted rows. What K steps do to the rows X of the distinct support
// items is of rank K, and what comes back to them too:
//
//   E_k = X + Σ_{j<k} a_j u_jᵀ,   Ē_k = Σ_{j≥k} h_j u_jᵀ + a_j λ_{j+1}ᵀ,   a_j = −s_j g_j
//
// g_j the derivatives of the items' scores at step j, h_j what the way back says of these scores, λ
// the gradient at u; at the end h_K are the gradients of the query's scores of support items. A
// step goes over X twice, as if the user alone adapted, and over the vectors of the steps before
// it. So it suits few steps on many items; full_form.h has the others.
#pragma once

#include "full_form.h"

namespace metarec_fast::cpu {

// Rows that a step is made of: X, and then vectors u_0 … u_{K−1}, λ_K … λ_1, u_K, so that what a
// step needs of them comes first on the way there and on the way back.
template <typename scalar_t>
struct FactoredPath {
  int64_t steps, width;            // K, layout.width
  int64_t items, stride, entries;  // I; I and R, padded
  int64_t row, columns;            // of factors; of products, K padded
  const scalar_t* const* at;       // these rows, the last of X again up to `stride`
  scalar_t* vectors;               // u_0 … u_{K−1}, λ_1 … λ_K, u_K [2K + 1, layout.stride]
  scalar_t* factors;               // h_0 … h_{K−1}, a_0 … a_{K−1}, h_K [2K + 1, row]: numbers of
                                   // items, then what the step takes of the vectors
  scalar_t* biases;                // m + b, as they are now [stride]
  scalar_t* slopes;                // g_k [K, stride]
  scalar_t* pushes;                // w ∘ ℓ'/(S + n0) of the entries [K, entries]
  scalar_t* curvatures;            // w ∘ ℓ''/(S + n0) [K, entries]
  scalar_t* products;              // row k: u_j·u_k for j < k [K + 1, columns]

  scalar_t* vector(int64_t k) const { return stacked(k < steps ? k : 2 * steps); }          // u_k
  scalar_t* adjoint(int64_t k) const { return stacked(steps + k - 1); }                     // λ_k
  scalar_t* bends(int64_t k) const { return factors + (k < steps ? k : 2 * steps) * row; }  // h_k
  scalar_t* moves(int64_t k) const { return factors + (steps + k) * row; }                  // a_k

 private:
  scalar_t* stacked(int64_t j) const { return vectors + j * (width + kLanes<scalar_t>); }
};

// Whether this form takes less than going over the rows themselves,
// for I items and K steps: what belongs to steps grows with K², measured at K = 1 … 24, I = 1 … 32
// (benchmarks/notes.md).
inline bool worth_factoring(int64_t items, int64_t steps) {
  return items > 2 && 2 * steps <= items + 8;
}

template <typename scalar_t>
void factored_forward(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                      FactoredPath<scalar_t>& path);

// scores[i] = E_K[i]·u_K + b_K[i] + c_K of the support items [stride].
template <typename scalar_t>
void factored_scores(const FactoredPath<scalar_t>& path, scalar_t* scores);

// Everything the task began with, from λ_K, whose bias has the sum of all p̄ as the offset has, and
// h_K [stride] of support items, which `met` says that there are. grads.fast is overwritten; rows
// of items are afterwards Σ_j factors[j] vectors[j]ᵀ, of first order h_K u_Kᵀ.
template <typename scalar_t>
void factored_adjoint(const Task<scalar_t>& task, const ItemIndex& index, Arena<scalar_t>& arena,
                      const FactoredPath<scalar_t>& path, bool met, FullGradients<scalar_t>& grads);

}  // namespace metarec_fast::cpu
