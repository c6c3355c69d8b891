// An MLP tower whose weights adapt to each task, and the exact way back.
//
// Layers l = 1 … L, inputs H_0 = X [S, n_0] (user part and item row of the S candidates of the
// support: its entries' items, and their negatives where the loss compares with them):
//
//     Z_l = H_{l−1} W_lᵀ + b_l      H_l = σ(Z_l), l < L      p = Z_L, one column
//     Δ_L = ∂L_S/∂p                 Δ_l = (Δ_{l+1} W_{l+1}) ∘ σ'(Z_l)
//     W_l ← W_l − s_k Δ_lᵀ H_{l−1}      b_l ← b_l − s_k 1ᵀ Δ_l                   K times
//
// with a rate s_k for each tensor: below, that of the W_l or b_l whose gradient it stands beside.
// The inputs of layer 1 stay, so its weights are never copied: after k steps they are W_1 − A_kᵀ X,
// with A_{k+1} = A_k + s_k Δ_1 [S, n_1], and with G = X Xᵀ
//
//     Z_1 = X W_1ᵀ + b_1 − G A_k        of the query  Z_1 = X_q W_1ᵀ + b_1 − G_q A_K,  G_q = X_q Xᵀ
//
// The query's Δ are found in the same way from dL/dp. Then, with M_l, m_l the gradients of W_l, b_l
// after the last step and Ā that of A,
//
//     M_l = Δ_q,lᵀ H_q,l−1, l ≥ 2      m_l = 1ᵀ Δ_q,l      Ā = −G_qᵀ Δ_q,1      Ḡ_q = −Δ_q,1 A_Kᵀ
//     for k = K−1 … 0, everything of step k:
//         D_l = −s_k V_l − s_k 1 m_lᵀ,  V_l = H_{l−1} M_lᵀ,  V_1 = −Ā      (gradients of Δ_l)
//         s̄_k = −V_l·Δ_l of W_l,  −m_l·(1ᵀ Δ_l) of b_l      H̄_{l−1} = −s_k Δ_l M_l
//         l = 1 … L−1:  E = D_l ∘ σ'(Z_l)
//                       D_{l+1} += E W_{l+1}ᵀ      M_{l+1} += Δ_{l+1}ᵀ E
//         Z̄_L = (∂²L_S/∂p²) D_L
//         l = L … 2:    H̄_{l−1} += Z̄_l W_l     M_l += Z̄_lᵀ H_{l−1}
//                       Z̄_{l−1} = H̄_{l−1} ∘ σ'(Z_{l−1}) + D_{l−1} ∘ (Δ_l W_l) ∘ σ''(Z_{l−1})
//         m_l += 1ᵀ Z̄_l      Ā −= G Z̄_1      Ḡ −= Z̄_1 A_kᵀ      Z̄ += Z̄_1
//     W̄_l = M_l, b̄_l = m_l;     W̄_1 = Z̄ᵀ X + Δ_q,1ᵀ X_q
//     X̄_q = Δ_q,1 W_1 + Ḡ_q X        X̄ = Z̄ W_1 + (Ḡ + Ḡᵀ) X + Ḡ_qᵀ X_q
//
// Where S > 2 n_0 that costs more than it saves, S² numbers above all: layer 1 of such a task has
// weights of its own, as others have, and X̄ = Σ_k H̄_0, X̄_q = Δ_q,1 W_1.
//
// First order leaves out what is inside the loop, but for s̄_k, and X̄. Rows of all matrices are
// filled up to a multiple of kRowsAtOnce, where Δ = 0, so that nothing comes from them.
#pragma once

#include "tower_path.h"

namespace metarec_fast::cpu {

// Where the gradients of a task go.
template <typename scalar_t>
struct TowerGradients {
  scalar_t* record;               // of a block of tasks, added to
  TowerRates<scalar_t> inner_lr;  // the same
  scalar_t* user;                 // [Du]
  scalar_t* rows;                 // of items [·, D], by `places`
  const ItemRows& places;
  int64_t dim, support_begin, query_begin;  // D; the task's first entries

  scalar_t* support_row(int64_t candidate) const {
    const int64_t group = 1 + places.support_negatives;
    return rows + dim * places.of_support(support_begin + candidate / group, candidate % group);
  }
  scalar_t* query_row(int64_t candidate) const {
    const int64_t group = 1 + places.query_negatives;
    return rows + dim * places.of_query(query_begin + candidate / group, candidate % group);
  }
};

template <typename scalar_t>
class TowerTask : public TowerPath<scalar_t> {
 public:
  using Base = TowerPath<scalar_t>;
  using Base::Base;
  using typename Base::Layer;

  // From the gradients of the query's scores, [Q]. The arena holds what `adapt` and `score` left.
  void adjoint(const scalar_t* grad_scores, const TowerGradients<scalar_t>& grads) {
    put_column(grad_scores, Q_, at(K_, L_).delta);
    down(K_, Q_.rows);
    begin_adjoint();
    for (int64_t k = K_ - 1; k >= 0; --k) {
      undo_update(k, grads.inner_lr);
      if (!settings_.first_order) undo_gradient(k);
    }
    finish(grads);
  }

 private:
  using Base::at, Base::A, Base::is_large, Base::layer, Base::hidden, Base::curved, Base::down;
  using Base::L_, Base::K_, Base::lowest_, Base::D_, Base::n_, Base::width_;
  using Base::product, Base::times, Base::times_transposed, Base::outer, Base::put_column;
  using Base::scores_, Base::kColumn;
  using Base::tower_, Base::settings_, Base::S_, Base::Q_, Base::arena_;
  using Base::user_, Base::gram_, Base::cross_, Base::inputs_, Base::loss_, Base::curvatures_;

  // The gradients of what the last step left.
  void begin_adjoint() {
    grad_weights_.resize(L_ + 1);
    for (int64_t l = 1; l <= L_; ++l) {
      const Layer& layer = this->layer(l);
      auto& mine = grad_weights_[l];
      const int64_t size = S_.rows * layer.out_stride;
      mine.of_delta = arena_.take(size);
      mine.of_score = arena_.take(size);
      if (l < L_) mine.scratch = arena_.take(size);
      mine.bias = arena_.take_zeros(layer.out_stride);
      add_row_sums(at(K_, l).delta, Q_.count, layer.out_stride, scalar_t{1}, mine.bias);
      if (l < lowest_) continue;
      mine.weight = arena_.take(layer.out * layer.in_stride);
      mine.transposed = arena_.take(layer.out == 1 ? 0 : layer.in_stride * layer.out_stride);
      outer(layer, at(K_, l).delta, hidden(K_, l - 1), Q_.count, 1, {}, mine.weight);
    }
    if (K_ == 0) return;
    if (is_large()) {
      grad_inputs_ = arena_.take_zeros(S_.rows * tower_.whole.in_stride);
      return;
    }
    const scalar_t* delta = at(K_, 1).delta;
    grad_coefficients_ = arena_.take(S_.rows * n_);
    product({cross_, 1, width_}, S_.rows, delta, n_, Q_.count, n_, -1, {}, grad_coefficients_, n_);
    // Rows beyond the support have columns of their own in G_q, which say nothing.
    std::fill(grad_coefficients_ + S_.count * n_, grad_coefficients_ + S_.rows * n_, scalar_t{0});
    coefficients_transposed_ = arena_.take(n_ * width_);
    transpose(A(K_), n_, S_.rows, n_, coefficients_transposed_, width_);
    grad_cross_ = arena_.take(Q_.rows * width_);
    product({delta, n_, 1}, Q_.rows, coefficients_transposed_, width_, tower_.item.out, width_, -1,
            {}, grad_cross_, width_);
    if (settings_.first_order) return;
    grad_gram_ = arena_.take_zeros(S_.rows * width_);
    grad_first_ = arena_.take_zeros(S_.rows * n_);
  }

  // D_l, H̄_{l−1} as far as it comes from the update of step k, and s̄_k, which is added.
  void undo_update(int64_t k, const TowerRates<scalar_t>& grad_rates) {
    for (int64_t l = 1; l <= L_; ++l) {
      const Layer& layer = this->layer(l);
      const LayerStep<scalar_t>& now = at(k, l);
      auto& mine = grad_weights_[l];
      const scalar_t rate = settings_.inner_lr.weight(k, l);
      grad_rates.bias(k, l) -= dot(mine.bias, now.sums, layer.out_stride);
      if (l < lowest_) {
        undo_rate(k, l, grad_coefficients_, /*sign=*/-1, grad_rates);
        continue;
      }
      if (layer.out > 1)
        transpose(mine.weight, layer.in_stride, layer.out, layer.in, mine.transposed,
                  layer.out_stride);
      times_transposed(layer, hidden(k, l - 1), S_.rows, mine.weight, mine.transposed, 1, {},
                       mine.of_delta);
      undo_rate(k, l, mine.of_delta, /*sign=*/1, grad_rates);
      if (settings_.first_order) continue;
      scalar_t* grad = l > 1 ? grad_weights_[l - 1].of_score : grad_inputs_;
      const Start<scalar_t> start{l > 1 ? nullptr : grad, layer.in_stride};
      times(layer, now.delta, S_.rows, mine.weight, -rate, start, grad);
    }
  }

  // D_l and s̄_k of W_l, given V_l, or −V_l.
  void undo_rate(int64_t k, int64_t l, const scalar_t* products, scalar_t sign,
                 const TowerRates<scalar_t>& grad_rates) {
    const int64_t width = layer(l).out_stride;
    const scalar_t rate = -sign * settings_.inner_lr.weight(k, l),
                   bias_rate = settings_.inner_lr.bias(k, l);
    const scalar_t *delta = at(k, l).delta, *bias = grad_weights_[l].bias;
    scalar_t* of_delta = grad_weights_[l].of_delta;
    Vector<scalar_t> total = {};
    for (int64_t s = 0, i = 0; s < S_.rows; ++s)
      for (int64_t o = 0; o < width; o += kLanes<scalar_t>, i += kLanes<scalar_t>) {
        const Vector<scalar_t> here = load(products + i);
        total += here * load(delta + i);
        store(of_delta + i) = rate * here - bias_rate * load(bias + o);
      }
    grad_rates.weight(k, l) -= sign * sum_lanes<scalar_t>(total);
  }

  // From D_l and H̄_{l−1} through step k's gradient to its weights. `of_score` is H̄, then Z̄.
  void undo_gradient(int64_t k) {
    for (int64_t l = 1; l < L_; ++l) {
      const Layer& above = tower_[l + 1];
      const auto &mine = grad_weights_[l], &next = grad_weights_[l + 1];
      const LayerStep<scalar_t>& then = at(k, l + 1);
      for (int64_t i = 0; i < S_.rows * above.in_stride; i += kLanes<scalar_t>)
        store(mine.scratch + i) = load(mine.of_delta + i) * load(at(k, l).slope + i);
      times_transposed(above, mine.scratch, S_.rows, then.weight, then.transposed, 1,
                       {next.of_delta, above.out_stride}, next.of_delta);
      outer(above, then.delta, mine.scratch, S_.count, 1, {next.weight, above.in_stride},
            next.weight);
    }
    const auto& last = grad_weights_[L_];
    for (int64_t i = 0; i < S_.count; ++i) scores_[i] = last.of_delta[i * kColumn];
    loss_.bend(curvatures_ + k * width_, scores_);
    put_column(scores_, S_, last.of_score);
    for (int64_t l = L_; l >= 2; --l) {
      const Layer& layer = tower_[l];
      const auto &mine = grad_weights_[l], &below = grad_weights_[l - 1];
      const LayerStep<scalar_t>& inside = at(k, l - 1);
      times(layer, mine.of_score, S_.rows, at(k, l).weight, 1, {below.of_score, layer.in_stride},
            below.of_score);
      outer(layer, mine.of_score, inside.hidden, S_.count, 1, {mine.weight, layer.in_stride},
            mine.weight);
      add_row_sums(mine.of_score, S_.count, layer.out_stride, scalar_t{1}, mine.bias);
      for (int64_t i = 0; i < S_.rows * layer.in_stride; i += kLanes<scalar_t>)
        store(below.of_score + i) *= load(inside.slope + i);
      if (curved())
        for (int64_t i = 0; i < S_.rows * layer.in_stride; i += kLanes<scalar_t>)
          store(below.of_score + i) += load(below.of_delta + i) * load(inside.bend + i);
    }
    const auto& mine = grad_weights_[1];
    const scalar_t* grad = mine.of_score;
    add_row_sums(grad, S_.count, n_, scalar_t{1}, mine.bias);
    if (is_large()) {
      const Layer& first = tower_.whole;
      times(first, grad, S_.rows, at(k, 1).weight, 1, {grad_inputs_, first.in_stride},
            grad_inputs_);
      outer(first, grad, inputs_, S_.count, 1, {mine.weight, first.in_stride}, mine.weight);
      return;
    }
    for (int64_t i = 0; i < S_.rows * n_; i += kLanes<scalar_t>)
      store(grad_first_ + i) += load(grad + i);
    if (k == 0) return;  // A_0 is zero, and nobody asks for its gradient
    product({gram_, width_, 1}, S_.rows, grad, n_, S_.count, n_, -1, {grad_coefficients_, n_},
            grad_coefficients_, n_);
    std::fill(grad_coefficients_ + S_.count * n_, grad_coefficients_ + S_.rows * n_, scalar_t{0});
    transpose(A(k), n_, S_.rows, n_, coefficients_transposed_, width_);
    product({grad, n_, 1}, S_.rows, coefficients_transposed_, width_, tower_.item.out, width_, -1,
            {grad_gram_, width_}, grad_gram_, width_);
  }

  void finish(const TowerGradients<scalar_t>& grads) {
    const Layer &item = tower_.item, &user = tower_.user;
    const scalar_t* delta = at(K_, 1).delta;
    const bool whole = K_ > 0 && !settings_.first_order;  // the support has gradients too
    for (int64_t l = 1; l <= L_; ++l) {
      const Layer& layer = tower_[l];
      const auto& mine = grad_weights_[l];
      add_to(mine.bias, layer.out_stride, grads.record + layer.bias_at);
      if (l > 1) add_to(mine.weight, layer.out * layer.in_stride, grads.record + layer.weight_at);
    }
    if (is_large()) return finish_large(grads);
    scalar_t* weight = grads.record + item.weight_at;
    outer(item, delta, Q_.items, Q_.count, 1, {weight, D_}, weight);
    if (whole) outer(item, grad_first_, S_.items, S_.count, 1, {weight, D_}, weight);
    const scalar_t* sums = grad_weights_[1].bias;  // over all entries
    scalar_t* user_weight = grads.record + user.weight_at;
    product({sums, 1, 0}, user.out, user_, user.in_stride, 1, user.in_stride, 1,
            {user_weight, user.in_stride}, user_weight, user.in_stride);

    scalar_t* grad_user = arena_.take(user.in_stride);
    product({sums, 0, 1}, 1, user.weight, user.in_stride, user.out, user.in_stride, 1, {},
            grad_user, user.in_stride);
    scalar_t* rows = arena_.take(std::max(S_.rows, Q_.rows) * D_);
    times(item, delta, Q_.rows, item.weight, 1, {}, rows);
    if (K_ > 0) {
      product({grad_cross_, width_, 1}, Q_.rows, S_.items, D_, S_.count, D_, 1, {rows, D_}, rows,
              D_);
      scalar_t shift = total(grad_cross_, Q_.count) * (whole ? 2 : 1);
      if (whole) shift += 2 * total(grad_gram_, S_.count);
      for (int64_t i = 0; i < user.in_stride; i += kLanes<scalar_t>)
        store(grad_user + i) += shift * load(user_ + i);
    }
    copy_out(grad_user, user.in, grads.user);
    for (int64_t i = 0; i < Q_.count; ++i) copy_out(rows + i * D_, item.in, grads.query_row(i));
    if (!grads.places.support || S_.count == 0) return;
    if (!whole) {
      for (int64_t i = 0; i < S_.count; ++i)
        std::fill_n(grads.support_row(i), item.in, scalar_t{0});
      return;
    }
    times(item, grad_first_, S_.rows, item.weight, 1, {}, rows);
    for (const auto& [left, row, column] :
         {std::tuple(grad_gram_, width_, int64_t{1}), std::tuple(grad_gram_, int64_t{1}, width_)})
      product({left, row, column}, S_.rows, S_.items, D_, S_.count, D_, 1, {rows, D_}, rows, D_);
    product({grad_cross_, 1, width_}, S_.rows, Q_.items, D_, Q_.count, D_, 1, {rows, D_}, rows, D_);
    for (int64_t i = 0; i < S_.count; ++i) copy_out(rows + i * D_, item.in, grads.support_row(i));
  }

  void finish_large(const TowerGradients<scalar_t>& grads) {
    const Layer &whole = tower_.whole, &item = tower_.item, &user = tower_.user;
    const auto& mine = grad_weights_[1];
    for (int64_t o = 0; o < whole.out; ++o) {
      const scalar_t* row = mine.weight + o * whole.in_stride;
      add(row, user.in, grads.record + user.weight_at + o * user.in_stride);
      add(row + user.in, item.in, grads.record + item.weight_at + o * item.in_stride);
    }

    scalar_t* rows = arena_.take(Q_.rows * whole.in_stride);
    times(whole, at(K_, 1).delta, Q_.rows, at(K_, 1).weight, 1, {}, rows);
    std::fill_n(grads.user, user.in, scalar_t{0});
    const auto put = [&](const scalar_t* from, scalar_t* result) {
      add(from, user.in, grads.user);
      std::copy_n(from + user.in, item.in, result);
    };
    for (int64_t i = 0; i < Q_.count; ++i) put(rows + i * whole.in_stride, grads.query_row(i));
    for (int64_t i = 0; grads.places.support && i < S_.count; ++i)
      put(grad_inputs_ + i * whole.in_stride, grads.support_row(i));
  }

  static void add_to(const scalar_t* from, int64_t count, scalar_t* result) {
    for (int64_t i = 0; i < count; i += kLanes<scalar_t>) store(result + i) += load(from + i);
  }

  // Σ of a matrix [count, S] whose rows have a stride of width_; columns beyond S are zero.
  scalar_t total(const scalar_t* matrix, int64_t count) const {
    Vector<scalar_t> sum = {};
    for (int64_t i = 0; i < count * width_; i += kLanes<scalar_t>) sum += load(matrix + i);
    return sum_lanes<scalar_t>(sum);
  }

  struct LayerGradient {
    scalar_t *weight, *transposed, *bias;     // M_l, M_lᵀ, m_l
    scalar_t *of_delta, *of_score, *scratch;  // D_l; H̄_l, then Z̄_l; E
  };

  std::vector<LayerGradient> grad_weights_;
  scalar_t *grad_coefficients_, *grad_first_;  // Ā [S, n_1], Z̄ [S, n_1]
  scalar_t *grad_gram_, *grad_cross_;          // Ḡ [S, S], Ḡ_q [Q, S]
  scalar_t* coefficients_transposed_;          // A_kᵀ
  scalar_t* grad_inputs_;                      // X̄ of a large task
};

}  // namespace metarec_fast::cpu
