// An MLP tower on its way through the steps of one task; tower_task.h has the formulas.
#pragma once

#include "activation.h"
#include "tower.h"
#include "tower_loss.h"

namespace metarec_fast::cpu {

// What a step leaves behind of one layer.
template <typename scalar_t>
struct LayerStep {
  scalar_t *weight, *transposed, *bias;  // before the step, l ≥ 2
  scalar_t *hidden, *slope;              // H_l, σ'(Z_l), l < L
  scalar_t* bend;                        // of gelu, (Δ_{l+1} W_{l+1}) ∘ σ''(Z_l)
  scalar_t *delta, *sums;                // Δ_l, 1ᵀ Δ_l
};

template <typename scalar_t>
class TowerPath {
 public:
  using Layer = typename Tower<scalar_t>::Layer;

  TowerPath(const Tower<scalar_t>& tower, const TowerSettings<scalar_t>& settings,
            const TowerLoss<scalar_t>& loss, const scalar_t* user,
            const TowerEntries<scalar_t>& support, const TowerEntries<scalar_t>& query,
            Arena<scalar_t>& arena, std::vector<LayerStep<scalar_t>>& path)
      : tower_(tower),
        settings_(settings),
        loss_(loss),
        S_(support),
        Q_(query),
        arena_(arena),
        path_(path),
        L_(tower.depth()),
        K_(support.count == 0 ? 0 : settings.steps),
        lowest_(K_ > 0 && tower.is_large(support.count) ? 1 : 2),
        D_(tower.item.in_stride),
        n_(tower.item.out_stride),
        width_(std::max(padded<scalar_t>(support.rows), kLanes<scalar_t>)) {
    user_ = arena.take(tower.user.in_stride);
    copy_in(user, tower.user.in, user_);
    path_.resize((K_ + 1) * L_);
    for (int64_t k = 0; k <= K_; ++k) allocate(k, k == K_ ? Q_.rows : S_.rows);
  }

  // φ_1 … φ_K
  void adapt() {
    from_user_ = arena_.take(n_);
    product({user_, 0, 1}, 1, tower_.user.transposed, n_, tower_.user.in, n_, 1,
            {tower_.item.bias, 0}, from_user_, n_);
    if (K_ == 0) return;
    curvatures_ = arena_.take(K_ * width_);
    scores_ = arena_.take(width_);
    if (is_large()) {
      inputs_ = whole_rows(S_);
      query_inputs_ = whole_rows(Q_);
    } else {
      multiply_inputs();
    }
    for (int64_t k = 0; k < K_; ++k) step(k);
  }

  // p of the query, [Q], by φ_K.
  void score(scalar_t* scores) {
    scalar_t* out = L_ == 1 ? at(K_, 1).delta : at(K_, 1).hidden;
    if (is_large()) {
      first_of_large(K_, Q_.rows, out);
    } else {
      product({Q_.items, D_, 1}, Q_.rows, tower_.item.transposed, n_, tower_.item.in, n_, 1,
              {from_user_, 0}, out, n_);
      if (K_ > 0)
        product({cross_, width_, 1}, Q_.rows, A(K_), n_, S_.count, n_, -1, {out, n_}, out, n_);
    }
    put_scores(up(K_, out, Q_.rows), Q_, scores);
  }

 protected:
  LayerStep<scalar_t>& at(int64_t k, int64_t l) { return path_[k * L_ + l - 1]; }
  scalar_t* A(int64_t k) { return coefficients_ + k * S_.rows * n_; }
  // Layers from lowest_ on have weights of each task's own.
  bool is_large() const { return lowest_ == 1; }
  const Layer& layer(int64_t l) const { return l == 1 && is_large() ? tower_.whole : tower_[l]; }
  // H_l, of the query where k = K.
  const scalar_t* hidden(int64_t k, int64_t l) {
    return l > 0 ? at(k, l).hidden : k == K_ ? query_inputs_ : inputs_;
  }
  bool curved() const { return settings_.activation == Activation::kGelu; }

  static void product(const Coefficients<scalar_t>& left, int64_t rows, const scalar_t* right,
                      int64_t right_stride, int64_t count, int64_t width, scalar_t factor,
                      const Start<scalar_t>& start, scalar_t* result, int64_t result_stride) {
    add_product(left, rows, right, right_stride, count, width, factor, start, result,
                result_stride);
  }

  // result = start + factor · left Wᵀ, of a layer's weights or their gradients.
  static void times_transposed(const Layer& layer, const scalar_t* left, int64_t rows,
                               const scalar_t* weight, const scalar_t* transposed, scalar_t factor,
                               const Start<scalar_t>& start, scalar_t* result) {
    if (layer.out == 1)
      add_row_dots(left, layer.in_stride, rows, weight, layer.in_stride, factor, start, result,
                   layer.out_stride);
    else
      product({left, layer.in_stride, 1}, rows, transposed, layer.out_stride, layer.in,
              layer.out_stride, factor, start, result, layer.out_stride);
  }

  // result = start + factor · left W
  static void times(const Layer& layer, const scalar_t* left, int64_t rows, const scalar_t* weight,
                    scalar_t factor, const Start<scalar_t>& start, scalar_t* result) {
    product({left, layer.out_stride, 1}, rows, weight, layer.in_stride, layer.out, layer.in_stride,
            factor, start, result, layer.in_stride);
  }

  // result = start + factor · leftᵀ right, such as weights are: left [count, out], right [count,
  // in]
  static void outer(const Layer& layer, const scalar_t* left, const scalar_t* right, int64_t count,
                    scalar_t factor, const Start<scalar_t>& start, scalar_t* result) {
    product({left, 1, layer.out_stride}, layer.out, right, layer.in_stride, count, layer.in_stride,
            factor, start, result, layer.in_stride);
  }

  void allocate(int64_t k, int64_t rows) {
    for (int64_t l = 1; l <= L_; ++l) {
      LayerStep<scalar_t>& mine = at(k, l);
      const Layer& layer = this->layer(l);
      const int64_t size = rows * layer.out_stride;
      mine = {};
      mine.delta = arena_.take(size);
      mine.sums = k < K_ ? arena_.take_zeros(layer.out_stride) : nullptr;
      if (l < L_) {
        mine.hidden = arena_.take(size);
        mine.slope = arena_.take(size);
        if (curved()) mine.bend = arena_.take(size);
      }
      if (l < lowest_) continue;
      if (k == 0) {
        mine.weight = layer.weight;
        mine.transposed = layer.transposed;
        mine.bias = layer.bias;
      } else {
        mine.weight = arena_.take(layer.out * layer.in_stride);
        mine.transposed = arena_.take(layer.out == 1 ? 0 : layer.in_stride * layer.out_stride);
        mine.bias = arena_.take(layer.out_stride);
      }
    }
  }

  // G, G_q, X W_1ᵀ + b_1 and A_0.
  void multiply_inputs() {
    const scalar_t shift = dot(user_, user_, tower_.user.in_stride);
    scalar_t* columns = arena_.take(D_ * width_);
    transpose(S_.items, D_, S_.rows, D_, columns, width_);
    scalar_t* shifts = arena_.take(width_);
    std::fill(shifts, shifts + width_, shift);
    gram_ = arena_.take(S_.rows * width_);
    product({S_.items, D_, 1}, S_.rows, columns, width_, tower_.item.in, width_, 1, {shifts, 0},
            gram_, width_);
    cross_ = arena_.take(Q_.rows * width_);
    product({Q_.items, D_, 1}, Q_.rows, columns, width_, tower_.item.in, width_, 1, {shifts, 0},
            cross_, width_);

    first_ = arena_.take(S_.rows * n_);
    product({S_.items, D_, 1}, S_.rows, tower_.item.transposed, n_, tower_.item.in, n_, 1,
            {from_user_, 0}, first_, n_);
    coefficients_ = arena_.take((K_ + 1) * S_.rows * n_);
    std::fill(coefficients_, coefficients_ + S_.rows * n_, scalar_t{0});
  }

  // [user part; item row] of every entry.
  scalar_t* whole_rows(const TowerEntries<scalar_t>& entries) {
    const int64_t width = tower_.whole.in_stride, first = tower_.user.in;
    scalar_t* rows = arena_.take_zeros(entries.rows * width);
    for (int64_t i = 0; i < entries.count; ++i) {
      std::copy_n(user_, first, rows + i * width);
      std::copy_n(entries.items + i * D_, tower_.item.in, rows + i * width + first);
    }
    return rows;
  }

  // From Z_1, in H_1's place, to Z_L, in Δ_L's.
  scalar_t* up(int64_t k, scalar_t* out, int64_t rows) {
    for (int64_t l = 2; l <= L_; ++l) {
      LayerStep<scalar_t>& below = at(k, l - 1);
      activate(rows * tower_[l].in_stride, below);
      out = l == L_ ? at(k, l).delta : at(k, l).hidden;
      times_transposed(tower_[l], below.hidden, rows, at(k, l).weight, at(k, l).transposed, 1,
                       {at(k, l).bias, 0}, out);
    }
    return out;
  }

  // Z_1 of a large task.
  void first_of_large(int64_t k, int64_t rows, scalar_t* result) {
    times_transposed(tower_.whole, hidden(k, 0), rows, at(k, 1).weight, at(k, 1).transposed, 1,
                     {at(k, 1).bias, 0}, result);
  }

  void activate(int64_t size, LayerStep<scalar_t>& layer) const {
    if (curved()) {
      for (int64_t i = 0; i < size; i += kLanes<scalar_t>) {
        const Activated<scalar_t> z = gelu<scalar_t>(load(layer.hidden + i));
        store(layer.hidden + i) = z.value;
        store(layer.slope + i) = z.slope;
        store(layer.bend + i) = z.bend;
      }
    } else {
      for (int64_t i = 0; i < size; i += kLanes<scalar_t>) {
        const Activated<scalar_t> z = relu<scalar_t>(load(layer.hidden + i));
        store(layer.hidden + i) = z.value;
        store(layer.slope + i) = z.slope;
      }
    }
  }

  // From Δ_L to Δ_1.
  void down(int64_t k, int64_t rows) {
    for (int64_t l = L_ - 1; l >= 1; --l) {
      const LayerStep<scalar_t>&above = at(k, l + 1), &mine = at(k, l);
      times(tower_[l + 1], above.delta, rows, above.weight, 1, {}, mine.delta);
      const int64_t size = rows * tower_[l].out_stride;
      if (curved())
        for (int64_t i = 0; i < size; i += kLanes<scalar_t>)
          store(mine.bend + i) *= load(mine.delta + i);
      for (int64_t i = 0; i < size; i += kLanes<scalar_t>)
        store(mine.delta + i) *= load(mine.slope + i);
    }
  }

  static constexpr int64_t kColumn = kLanes<scalar_t>;  // the stride of layer L's numbers

  static void put_scores(const scalar_t* out, const TowerEntries<scalar_t>& entries,
                         scalar_t* scores) {
    for (int64_t i = 0; i < entries.count; ++i) scores[i] = out[i * kColumn];
    if (entries.biases != nullptr)
      for (int64_t i = 0; i < entries.count; ++i) scores[i] += entries.biases[i];
  }
  static void put_column(const scalar_t* numbers, const TowerEntries<scalar_t>& entries,
                         scalar_t* column) {
    for (int64_t i = 0; i < entries.rows; ++i)
      store(column + i * kColumn) = first_lane(i < entries.count ? numbers[i] : scalar_t{0});
  }

  void step(int64_t k) {
    scalar_t* out = L_ == 1 ? at(k, 1).delta : at(k, 1).hidden;
    if (is_large())
      first_of_large(k, S_.rows, out);
    else
      product({gram_, width_, 1}, S_.rows, A(k), n_, k == 0 ? 0 : S_.count, n_, -1, {first_, n_},
              out, n_);
    out = up(k, out, S_.rows);
    put_scores(out, S_, scores_);
    loss_.differentiate(scores_, curvatures_ + k * width_);
    put_column(scores_, S_, at(k, L_).delta);
    down(k, S_.rows);
    update(k);
  }

  // φ_{k+1}
  void update(int64_t k) {
    for (int64_t l = 1; l <= L_; ++l) {
      const Layer& layer = this->layer(l);
      const LayerStep<scalar_t>&now = at(k, l), &next = at(k + 1, l);
      const scalar_t rate = settings_.inner_lr.weight(k, l),
                     bias_rate = settings_.inner_lr.bias(k, l);
      add_row_sums(now.delta, S_.count, layer.out_stride, scalar_t{1}, now.sums);
      if (l < lowest_) {
        update_first(k, rate, bias_rate);
        continue;
      }
      outer(layer, now.delta, hidden(k, l - 1), S_.count, -rate, {now.weight, layer.in_stride},
            next.weight);
      if (layer.out > 1)
        transpose(next.weight, layer.in_stride, layer.out, layer.in, next.transposed,
                  layer.out_stride);
      for (int64_t i = 0; i < layer.out_stride; i += kLanes<scalar_t>)
        store(next.bias + i) = load(now.bias + i) - bias_rate * load(now.sums + i);
    }
  }

  // A_{k+1}, and the bias of layer 1 where it has been added already.
  void update_first(int64_t k, scalar_t rate, scalar_t bias_rate) {
    const LayerStep<scalar_t>& now = at(k, 1);
    for (int64_t i = 0; i < S_.rows * n_; i += kLanes<scalar_t>)
      store(A(k + 1) + i) = load(A(k) + i) + rate * load(now.delta + i);
    for (int64_t i = 0; i < n_; i += kLanes<scalar_t>) {
      const Vector<scalar_t> change = bias_rate * load(now.sums + i);
      store(from_user_ + i) -= change;
      for (int64_t s = 0; s < S_.rows; ++s) store(first_ + s * n_ + i) -= change;
    }
  }

  const Tower<scalar_t>& tower_;
  const TowerSettings<scalar_t>& settings_;
  const TowerLoss<scalar_t>& loss_;
  const TowerEntries<scalar_t>&S_, &Q_;
  Arena<scalar_t>& arena_;
  std::vector<LayerStep<scalar_t>>& path_;  // [K + 1, L]; the last is the query by φ_K
  const int64_t L_, K_, lowest_;      // layers, steps, the first layer with weights of its own
  const int64_t D_, n_;               // strides of item rows and of layer 1
  const int64_t width_;               // stride of G, and of numbers by support entry
  scalar_t *user_, *from_user_;       // u; b_1 of the step + W_1 u
  scalar_t *gram_, *cross_;           // G [S, S], G_q [Q, S]
  scalar_t *first_, *coefficients_;   // X W_1ᵀ + b_1 of the step [S, n_1], A_0 … A_K
  scalar_t *inputs_, *query_inputs_;  // of a large task: X, X_q, users' part included
  scalar_t *curvatures_, *scores_;    // of the loss [K, S], scratch [S]
};

}  // namespace metarec_fast::cpu
