// The losses ℓ(score, target) with their derivatives in the score, for host and device.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace metarec_fast {

// (p − y)²
struct SquaredLoss {
  template <typename scalar_t>
  HOST_DEVICE static scalar_t value(scalar_t score, scalar_t target) {
    return (score - target) * (score - target);
  }
  template <typename scalar_t>
  HOST_DEVICE static scalar_t derivative(scalar_t score, scalar_t target) {
    return 2 * (score - target);
  }
  template <typename scalar_t>
  HOST_DEVICE static scalar_t curvature(scalar_t, scalar_t) {
    return 2;
  }
};

// log(1 + eᵖ) − y p, the cross-entropy of σ(p) to y in [0, 1]
struct LogisticLoss {
  template <typename scalar_t>
  HOST_DEVICE static scalar_t sigmoid(scalar_t score) {
    const scalar_t small = std::exp(-std::abs(score));  // in (0, 1]: never overflows
    return (score >= 0 ? scalar_t{1} : small) / (1 + small);
  }
  template <typename scalar_t>
  HOST_DEVICE static scalar_t value(scalar_t score, scalar_t target) {
    const scalar_t positive = score > 0 ? score : scalar_t{0};
    return positive + std::log1p(std::exp(-std::abs(score))) - target * score;
  }
  template <typename scalar_t>
  HOST_DEVICE static scalar_t derivative(scalar_t score, scalar_t target) {
    return sigmoid(score) - target;
  }
  template <typename scalar_t>
  HOST_DEVICE static scalar_t curvature(scalar_t score, scalar_t) {
    const scalar_t probability = sigmoid(score);
    return probability * (1 - probability);
  }
};

// |p − y|, quadratic within kWidth of the target
struct AbsoluteLoss {
  static constexpr double kWidth = 0.1;

  template <typename scalar_t>
  HOST_DEVICE static scalar_t value(scalar_t score, scalar_t target) {
    const scalar_t width = static_cast<scalar_t>(kWidth), distance = std::abs(score - target);
    return distance < width ? distance * distance / (2 * width) : distance - width / 2;
  }
  template <typename scalar_t>
  HOST_DEVICE static scalar_t derivative(scalar_t score, scalar_t target) {
    const scalar_t width = static_cast<scalar_t>(kWidth), difference = score - target;
    if (difference >= width) return 1;
    return difference <= -width ? scalar_t{-1} : difference / width;
  }
};

// A weighted sum of losses, what queries are judged by.
struct OuterLoss {
  double squared, logistic, absolute;

  template <typename scalar_t>
  HOST_DEVICE scalar_t value(scalar_t score, scalar_t target) const {
    scalar_t sum = 0;
    if (squared != 0) sum += static_cast<scalar_t>(squared) * SquaredLoss::value(score, target);
    if (logistic != 0) sum += static_cast<scalar_t>(logistic) * LogisticLoss::value(score, target);
    if (absolute != 0) sum += static_cast<scalar_t>(absolute) * AbsoluteLoss::value(score, target);
    return sum;
  }
  template <typename scalar_t>
  HOST_DEVICE scalar_t derivative(scalar_t score, scalar_t target) const {
    scalar_t sum = 0;
    if (squared != 0)
      sum += static_cast<scalar_t>(squared) * SquaredLoss::derivative(score, target);
    if (logistic != 0)
      sum += static_cast<scalar_t>(logistic) * LogisticLoss::derivative(score, target);
    if (absolute != 0)
      sum += static_cast<scalar_t>(absolute) * AbsoluteLoss::derivative(score, target);
    return sum;
  }
};

}  // namespace metarec_fast
