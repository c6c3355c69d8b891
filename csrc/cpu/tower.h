// An MLP tower whose weights adapt to each task, and the exact way back.
//
// Layers l = 1 … L, inputs H_0 = X [S, n_0] (user part and item row of every support entry):
//
//     Z_l = H_{l−1} W_lᵀ + b_l      H_l = σ(Z_l), l < L      p = Z_L, one column
//     Δ_L = c ∘ ℓ'(p, y)            Δ_l = (Δ_{l+1} W_{l+1}) ∘ σ'(Z_l)            c = w/S
//     W_l ← W_l − s_k Δ_lᵀ H_{l−1}      b_l ← b_l − s_k 1ᵀ Δ_l                   K times
//
// The inputs of layer 1 stay, so its weights are never copied: after k steps they are W_1 − A_kᵀ X,
// with A_{k+1} = A_k + s_k Δ_1 [S, n_1], and with G = X Xᵀ + 1 (the bias)
//
//     Z_1 = X W_1ᵀ + b_1 − G A_k        of the query  Z_1 = X_q W_1ᵀ + b_1 − G_q A_K,  G_q = X_q Xᵀ
//     + 1
//
// The query's Δ are found in the same way from dL/dp. Then, with M_l, m_l the gradients of W_l, b_l
// after the last step (l ≥ 2) and Ā that of A,
//
//     M_l = Δ_q,lᵀ H_q,l−1      m_l = 1ᵀ Δ_q,l      Ā = −G_qᵀ Δ_q,1      Ḡ_q = −Δ_q,1 A_Kᵀ
//     for k = K−1 … 0, everything of step k:
//         D_l = −s_k U_l,  U_l = H_{l−1} M_lᵀ + m_l,  l ≥ 2;      D_1 = s_k Ā      (gradients of
//         Δ_l) s̄_k = Ā·Δ_1 − Σ_{l≥2} U_l·Δ_l H̄_{l−1} = −s_k Δ_l M_l l = 1 … L−1:  E = D_l ∘ σ'(Z_l)
//         D_{l+1} += E W_{l+1}ᵀ      M_{l+1} += Δ_{l+1}ᵀ E Z̄_L = D_L ∘ c ∘ ℓ''(p) l = L … 2:
//         H̄_{l−1} += Z̄_l W_l     M_l += Z̄_lᵀ H_{l−1}        m_l += 1ᵀ Z̄_l
//                       Z̄_{l−1} = H̄_{l−1} ∘ σ'(Z_{l−1}) + D_{l−1} ∘ (Δ_l W_l) ∘ σ''(Z_{l−1})
//         Ā −= G Z̄_1      Ḡ −= Z̄_1 A_kᵀ      Z̄ += Z̄_1
//     W̄_l = M_l, b̄_l = m_l;     W̄_1 = Z̄ᵀ X + Δ_q,1ᵀ X_q,   b̄_1 = 1ᵀ Z̄ + 1ᵀ Δ_q,1
//     X̄_q = Δ_q,1 W_1 + Ḡ_q X        X̄ = Z̄ W_1 + (Ḡ + Ḡᵀ) X + Ḡ_qᵀ X_q
//
// First order leaves out what is inside the loop, but for s̄_k, and X̄. Rows of all matrices are
// filled up to a multiple of kRowsAtOnce; those have c = 0, so nothing comes from them.
#pragma once

#include <cmath>

#include "../mlp_arguments.h"
#include "activation.h"
#include "item_table.h"
#include "matrix.h"
#include "task_reader.h"

namespace metarec_fast::cpu {

// The parameters that tasks start from, laid out for products, and where gradients of them stand in
// a record: of layer 1 those of the user part, then of the item part; then layer by layer.
template <typename scalar_t>
class Tower {
 public:
  struct Layer {
    int64_t in, out, in_stride, out_stride;
    scalar_t* weight = nullptr;      // [out, in_stride]
    scalar_t* transposed = nullptr;  // [in_stride, out_stride]
    scalar_t* bias = nullptr;        // [out_stride]
    int64_t weight_at = 0, bias_at = 0;
  };

  explicit Tower(const TowerInputs& inputs) {
    const scalar_t* from = inputs.parameters.const_data_ptr<scalar_t>();
    const int64_t out = inputs.widths[1];
    user = layer(inputs.Du(), out);
    pack(from, inputs.widths[0], user);
    item = layer(inputs.D(), out);
    pack(from + inputs.Du(), inputs.widths[0], item);
    from += out * inputs.widths[0];
    bias(from, item);
    from += out;
    for (size_t l = 2; l < inputs.widths.size(); ++l) {
      Layer next = layer(inputs.widths[l - 1], inputs.widths[l]);
      pack(from, next.in, next);
      bias(from + next.in * next.out, next);
      from += (next.in + 1) * next.out;
      deeper.push_back(next);
    }
  }

  // A record [record_size] as the gradient of the parameters.
  void unpack(const scalar_t* record, scalar_t* result) const {
    const auto columns = [&](const Layer& part, int64_t first, int64_t width) {
      for (int64_t o = 0; o < part.out; ++o)
        std::copy_n(record + part.weight_at + o * part.in_stride, part.in,
                    result + o * width + first);
    };
    const int64_t width = user.in + item.in;
    columns(user, 0, width);
    columns(item, user.in, width);
    result = std::copy_n(record + item.bias_at, item.out, result + item.out * width);
    for (const Layer& part : deeper) {
      columns(part, 0, part.in);
      result = std::copy_n(record + part.bias_at, part.out, result + part.out * part.in);
    }
  }

  int64_t depth() const { return static_cast<int64_t>(deeper.size()) + 1; }  // L
  const Layer& operator[](int64_t l) const { return l == 1 ? item : deeper[l - 2]; }

  Layer user, item;           // the two parts of layer 1, whose bias is with the item's
  std::vector<Layer> deeper;  // 2 … L
  int64_t record_size = 0;

 private:
  static Layer layer(int64_t in, int64_t out) {
    return {in, out, std::max(padded<scalar_t>(in), kLanes<scalar_t>), padded<scalar_t>(out)};
  }

  int64_t place(int64_t count) {
    const int64_t begin = record_size;
    record_size += count;
    return begin;
  }

  void pack(const scalar_t* from, int64_t width, Layer& part) {
    part.weight_at = place(part.out * part.in_stride);
    part.weight = scratch_.take_zeros(part.out * part.in_stride);
    part.transposed = scratch_.take_zeros(part.in_stride * part.out_stride);
    for (int64_t o = 0; o < part.out; ++o)
      copy_in(from + o * width, part.in, part.weight + o * part.in_stride);
    transpose(part.weight, part.in_stride, part.out, part.in, part.transposed, part.out_stride);
  }

  void bias(const scalar_t* from, Layer& part) {
    part.bias_at = place(part.out_stride);
    part.bias = scratch_.take(part.out_stride);
    copy_in(from, part.out, part.bias);
  }

  Arena<scalar_t> scratch_;
};

// What a step leaves behind of one layer.
template <typename scalar_t>
struct LayerStep {
  scalar_t *weight, *transposed, *bias;  // before the step, l ≥ 2
  scalar_t *hidden, *slope,
      *bend;        // H_l, σ'(Z_l) and, of gelu, (Δ_{l+1} W_{l+1}) ∘ σ''(Z_l), l < L
  scalar_t* delta;  // Δ_l
};

template <typename scalar_t>
struct TowerSettings {
  int64_t steps;
  PerIndex<scalar_t> inner_lr;
  Activation activation;
  Loss loss;
  bool first_order;
};

// Where the gradients of a task go.
template <typename scalar_t>
struct TowerGradients {
  scalar_t* record;    // of a block of tasks, added to
  scalar_t* inner_lr;  // the same, by step or (stride 0) of all
  int64_t inner_lr_stride;
  scalar_t* user;          // [Du]
  scalar_t* support_rows;  // [S, D], or nullptr
  scalar_t* query_rows;    // [Q, D]
};

// Rows [count, D] of a task's items and what is known of them.
template <typename scalar_t>
struct TowerEntries {
  int64_t count, rows;  // rows: count up to a multiple of kRowsAtOnce
  scalar_t* items;      // [rows, D]

  TowerEntries(const ItemTable<scalar_t>& table, const int64_t* ids, int64_t count_in,
               int64_t stride, Arena<scalar_t>& arena)
      : count(count_in), rows((count + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce) {
    items = arena.take(rows * stride);
    for (int64_t i = 0; i < count; ++i) table.read(ids[i], items + i * stride);
    std::fill(items + count * stride, items + rows * stride, scalar_t{0});
  }
};

template <typename scalar_t>
class TowerTask {
 public:
  using Layer = typename Tower<scalar_t>::Layer;

  TowerTask(const Tower<scalar_t>& tower, const TowerSettings<scalar_t>& settings,
            const scalar_t* user, const TowerEntries<scalar_t>& support,
            const TowerEntries<scalar_t>& query, Arena<scalar_t>& arena,
            std::vector<LayerStep<scalar_t>>& path)
      : tower_(tower),
        settings_(settings),
        S_(support),
        Q_(query),
        arena_(arena),
        path_(path),
        L_(tower.depth()),
        K_(support.count == 0 ? 0 : settings.steps),
        D_(tower.item.in_stride),
        n_(tower.item.out_stride),
        width_(std::max(padded<scalar_t>(support.rows), kLanes<scalar_t>)) {
    user_ = arena.take(tower.user.in_stride);
    copy_in(user, tower.user.in, user_);
    path_.resize((K_ + 1) * L_);
    for (int64_t k = 0; k <= K_; ++k) allocate(k, k == K_ ? Q_.rows : S_.rows);
  }

  // φ_1 … φ_K; targets and shares c are [S], filled up with zeros.
  void adapt(const scalar_t* targets, const scalar_t* shares) {
    from_user_ = arena_.take(n_);
    product({user_, 0, 1}, 1, tower_.user.transposed, n_, tower_.user.in, n_, 1,
            {tower_.item.bias, 0}, from_user_, n_);
    if (K_ == 0) return;
    const scalar_t shift = 1 + dot(user_, user_, tower_.user.in_stride);
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
    curvatures_ = arena_.take(K_ * width_);
    scores_ = arena_.take(width_);
    for (int64_t k = 0; k < K_; ++k) step(k, targets, shares);
  }

  // p of the query, [Q], by φ_K.
  void score(scalar_t* scores) {
    scalar_t* out = L_ == 1 ? at(K_, 1).delta : at(K_, 1).hidden;
    product({Q_.items, D_, 1}, Q_.rows, tower_.item.transposed, n_, tower_.item.in, n_, 1,
            {from_user_, 0}, out, n_);
    if (K_ > 0)
      product({cross_, width_, 1}, Q_.rows, A(K_), n_, S_.count, n_, -1, {out, n_}, out, n_);
    put_scores(up(K_, out, Q_.rows), Q_.count, scores);
  }

  // From the gradients of the query's scores, [Q]. The arena holds what `adapt` and `score` left.
  void adjoint(const scalar_t* grad_scores, const TowerGradients<scalar_t>& grads) {
    put_column(grad_scores, Q_, at(K_, L_).delta);
    down(K_, Q_.rows);
    begin_adjoint();
    for (int64_t k = K_ - 1; k >= 0; --k) {
      grads.inner_lr[k * grads.inner_lr_stride] += undo_update(k);
      if (!settings_.first_order) undo_gradient(k);
    }
    finish(grads);
  }

 private:
  LayerStep<scalar_t>& at(int64_t k, int64_t l) { return path_[k * L_ + l - 1]; }
  scalar_t* A(int64_t k) { return coefficients_ + k * S_.rows * n_; }
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
      const Layer& layer = tower_[l];
      const int64_t size = rows * layer.out_stride;
      mine = {};
      mine.delta = arena_.take(size);
      if (l < L_) {
        mine.hidden = arena_.take(size);
        mine.slope = arena_.take(size);
        if (curved()) mine.bend = arena_.take(size);
      }
      if (l == 1) continue;
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

  static void put_scores(const scalar_t* out, int64_t count, scalar_t* scores) {
    for (int64_t i = 0; i < count; ++i) scores[i] = out[i * kColumn];
  }
  static void put_column(const scalar_t* numbers, const TowerEntries<scalar_t>& entries,
                         scalar_t* column) {
    for (int64_t i = 0; i < entries.rows; ++i)
      store(column + i * kColumn) = first_lane(i < entries.count ? numbers[i] : scalar_t{0});
  }

  void step(int64_t k, const scalar_t* targets, const scalar_t* shares) {
    scalar_t* out = L_ == 1 ? at(k, 1).delta : at(k, 1).hidden;
    product({gram_, width_, 1}, S_.rows, A(k), n_, k == 0 ? 0 : S_.count, n_, -1, {first_, n_}, out,
            n_);
    out = up(k, out, S_.rows);
    std::fill(scores_ + S_.count, scores_ + width_, scalar_t{0});
    put_scores(out, S_.count, scores_);
    scalar_t* curvatures = curvatures_ + k * width_;
    for (int64_t i = 0; i < width_; i += kLanes<scalar_t>) {
      const Vector<scalar_t> share = load(shares + i), p = load(scores_ + i), y = load(targets + i);
      differentiate_loss<VectorMath<scalar_t>, Vector<scalar_t>>(
          settings_.loss, share, p, y, store(scores_ + i), store(curvatures + i));
    }
    put_column(scores_, S_, at(k, L_).delta);
    down(k, S_.rows);

    const scalar_t rate = settings_.inner_lr[k];
    for (int64_t i = 0; i < S_.rows * n_; i += kLanes<scalar_t>)
      store(A(k + 1) + i) = load(A(k) + i) + rate * load(at(k, 1).delta + i);
    for (int64_t l = 2; l <= L_; ++l) {
      const Layer& layer = tower_[l];
      const LayerStep<scalar_t>&now = at(k, l), &next = at(k + 1, l);
      outer(layer, now.delta, at(k, l - 1).hidden, S_.count, -rate, {now.weight, layer.in_stride},
            next.weight);
      if (layer.out > 1)
        transpose(next.weight, layer.in_stride, layer.out, layer.in, next.transposed,
                  layer.out_stride);
      std::copy_n(now.bias, layer.out_stride, next.bias);
      add_row_sums(now.delta, S_.count, layer.out_stride, -rate, next.bias);
    }
  }

  // The gradients of what the last step left.
  void begin_adjoint() {
    grad_weights_.resize(L_ + 1);
    for (int64_t l = 1; l <= L_; ++l) {
      const Layer& layer = tower_[l];
      auto& mine = grad_weights_[l];
      const int64_t size = S_.rows * layer.out_stride;
      mine.of_delta = arena_.take(size);
      mine.of_score = arena_.take(size);
      if (l < L_) mine.scratch = arena_.take(size);
      if (l == 1) continue;
      mine.weight = arena_.take(layer.out * layer.in_stride);
      mine.transposed = arena_.take(layer.out == 1 ? 0 : layer.in_stride * layer.out_stride);
      mine.bias = arena_.take_zeros(layer.out_stride);
      outer(layer, at(K_, l).delta, at(K_, l - 1).hidden, Q_.count, 1, {}, mine.weight);
      add_row_sums(at(K_, l).delta, Q_.count, layer.out_stride, scalar_t{1}, mine.bias);
    }
    if (K_ == 0) return;
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

  // D_l, and H̄_{l−1} as far as it comes from the update of step k; returns s̄_k.
  scalar_t undo_update(int64_t k) {
    const scalar_t rate = settings_.inner_lr[k];
    Vector<scalar_t> total = {};
    for (int64_t l = 2; l <= L_; ++l) {
      const Layer& layer = tower_[l];
      auto& mine = grad_weights_[l];
      if (layer.out > 1)
        transpose(mine.weight, layer.in_stride, layer.out, layer.in, mine.transposed,
                  layer.out_stride);
      times_transposed(layer, at(k, l - 1).hidden, S_.rows, mine.weight, mine.transposed, 1,
                       {mine.bias, 0}, mine.of_delta);
      for (int64_t i = 0; i < S_.rows * layer.out_stride; i += kLanes<scalar_t>) {
        Vector<scalar_t>& here = store(mine.of_delta + i);
        total -= here * load(at(k, l).delta + i);
        here *= -rate;
      }
      if (!settings_.first_order)
        times(layer, at(k, l).delta, S_.rows, mine.weight, -rate, {},
              grad_weights_[l - 1].of_score);
    }
    for (int64_t i = 0; i < S_.rows * n_; i += kLanes<scalar_t>) {
      const Vector<scalar_t> here = load(grad_coefficients_ + i);
      total += here * load(at(k, 1).delta + i);
      store(grad_weights_[1].of_delta + i) = rate * here;
    }
    return sum_lanes<scalar_t>(total);
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
    for (int64_t i = 0; i < S_.rows; ++i)
      store(last.of_score + i * kColumn) =
          first_lane(last.of_delta[i * kColumn] * curvatures_[k * width_ + i]);
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
    const scalar_t* grad = grad_weights_[1].of_score;
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
    for (int64_t l = 2; l <= L_; ++l) {
      const Layer& layer = tower_[l];
      const auto& mine = grad_weights_[l];
      add_to(mine.weight, layer.out * layer.in_stride, grads.record + layer.weight_at);
      add_to(mine.bias, layer.out_stride, grads.record + layer.bias_at);
    }
    scalar_t* weight = grads.record + item.weight_at;
    outer(item, delta, Q_.items, Q_.count, 1, {weight, D_}, weight);
    if (whole) outer(item, grad_first_, S_.items, S_.count, 1, {weight, D_}, weight);
    scalar_t* sums = arena_.take_zeros(n_);  // over all entries
    add_row_sums(delta, Q_.count, n_, scalar_t{1}, sums);
    if (whole) add_row_sums(grad_first_, S_.count, n_, scalar_t{1}, sums);
    add_to(sums, n_, grads.record + item.bias_at);
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
    for (int64_t i = 0; i < Q_.count; ++i)
      copy_out(rows + i * D_, item.in, grads.query_rows + i * item.in);
    if (grads.support_rows == nullptr || S_.count == 0) return;
    if (!whole) {
      std::fill_n(grads.support_rows, S_.count * item.in, scalar_t{0});
      return;
    }
    times(item, grad_first_, S_.rows, item.weight, 1, {}, rows);
    for (const auto& [left, row, column] :
         {std::tuple(grad_gram_, width_, int64_t{1}), std::tuple(grad_gram_, int64_t{1}, width_)})
      product({left, row, column}, S_.rows, S_.items, D_, S_.count, D_, 1, {rows, D_}, rows, D_);
    product({grad_cross_, 1, width_}, S_.rows, Q_.items, D_, Q_.count, D_, 1, {rows, D_}, rows, D_);
    for (int64_t i = 0; i < S_.count; ++i)
      copy_out(rows + i * D_, item.in, grads.support_rows + i * item.in);
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

  const Tower<scalar_t>& tower_;
  const TowerSettings<scalar_t>& settings_;
  const TowerEntries<scalar_t>&S_, &Q_;
  Arena<scalar_t>& arena_;
  std::vector<LayerStep<scalar_t>>& path_;  // [K + 1, L]; the last is the query by φ_K
  const int64_t L_, K_, D_, n_;             // layers, steps, strides of item rows and of layer 1
  const int64_t width_;                     // stride of G, and of numbers by support entry
  std::vector<LayerGradient> grad_weights_;
  scalar_t *user_, *from_user_;      // u; b_1 + W_1 u
  scalar_t *gram_, *cross_;          // G [S, S], G_q [Q, S]
  scalar_t *first_, *coefficients_;  // X W_1ᵀ + b_1 [S, n_1], A_0 … A_K
  scalar_t *curvatures_, *scores_;   // c ℓ''(p) [K, S], scratch [S]
  scalar_t *grad_coefficients_, *coefficients_transposed_, *grad_cross_, *grad_gram_, *grad_first_;
};

}  // namespace metarec_fast::cpu
