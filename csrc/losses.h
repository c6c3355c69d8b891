// The losses by which tasks adapt and by which their queries are judged.
//
//   squared   (p − y)²                     logistic  log(1 + eᵖ) − y p, y in [0, 1]
//   absolute  |p − y|, quadratic within kAbsoluteWidth of the target
//   bpr       log(1 + e^(p⁻ − p⁺)), the mean over an entry's negatives (Rendle et al. 2009)
//   softmax   −log of the share of an entry's own item in Σ e^(p − log q) over it and its negatives
#pragma once

namespace metarec_fast {

enum class Loss { kSquared, kLogistic, kBpr, kSoftmax };

// Whether a loss compares an entry's item with its negatives.
constexpr bool is_pairwise(Loss loss) { return loss == Loss::kBpr || loss == Loss::kSoftmax; }

constexpr double kAbsoluteWidth = 0.1;

// A weighted sum of losses, what queries are judged by.
struct OuterLoss {
  double squared, logistic, absolute, bpr, softmax;

  bool pointwise() const { return squared != 0 || logistic != 0 || absolute != 0; }
  bool pairwise() const { return bpr != 0 || softmax != 0; }
};

}  // namespace metarec_fast
