// The losses by which tasks adapt and by which their queries are judged.
//
//   squared   (p − y)²                     logistic  log(1 + eᵖ) − y p, y in [0, 1]
//   absolute  |p − y|, quadratic within kAbsoluteWidth of the target
//   bpr       log(1 + e^(p⁻ − p⁺)), the mean over an entry's negatives (Rendle et al. 2009)
//   softmax   −log of the share of an entry's own item in Σ e^(p − log q) over it and its negatives
#pragma once

#include "host_device.h"

namespace metarec_fast {

enum class Loss { kSquared, kLogistic, kBpr, kSoftmax };

// Whether a loss compares an entry's item with its negatives.
HOST_DEVICE constexpr bool is_pairwise(Loss loss) {
  return loss == Loss::kBpr || loss == Loss::kSoftmax;
}

constexpr double kAbsoluteWidth = 0.1;

// A weighted sum of losses, what queries are judged by.
struct OuterLoss {
  double squared, logistic, absolute, bpr, softmax;

  HOST_DEVICE bool pointwise() const { return squared != 0 || logistic != 0 || absolute != 0; }
  HOST_DEVICE bool pairwise() const { return bpr != 0 || softmax != 0; }
};

// share ℓ' and share ℓ'' of the squared, the logistic or (of a difference p, with y = 1) the bpr
// loss. A Number is one number or a register of them; Math knows its sigmoid and softplus.
template <typename Math, typename Number>
HOST_DEVICE void differentiate_loss(Loss loss, const Number& share, const Number& p,
                                    const Number& y, Number& push, Number& curvature) {
  if (loss == Loss::kSquared) {
    curvature = 2 * share;
    push = curvature * (p - y);
  } else {
    const Number probability = Math::sigmoid(p);
    push = share * (probability - y);
    curvature = share * probability * (1 - probability);
  }
}

// ℓ and ℓ' of the pointwise losses in a weighted sum.
template <typename Math, typename Number>
HOST_DEVICE void judge_point(const OuterLoss& loss, const Number& p, const Number& y, Number& value,
                             Number& slope) {
  using scalar_t = typename Math::scalar_t;
  const scalar_t squared = static_cast<scalar_t>(loss.squared),
                 logistic = static_cast<scalar_t>(loss.logistic),
                 absolute = static_cast<scalar_t>(loss.absolute),
                 width = static_cast<scalar_t>(kAbsoluteWidth);
  const Number difference = p - y;
  value = squared * difference * difference;
  slope = 2 * squared * difference;
  if (logistic != 0) {
    value += logistic * (Math::softplus(p) - y * p);
    slope += logistic * (Math::sigmoid(p) - y);
  }
  if (absolute != 0) {
    const Number distance = difference < 0 ? -difference : difference, one = Math::one();
    value +=
        absolute * (distance < width ? distance * distance / (2 * width) : distance - width / 2);
    slope += absolute * (distance < width ? difference / width : (difference < 0 ? -one : one));
  }
}

}  // namespace metarec_fast
