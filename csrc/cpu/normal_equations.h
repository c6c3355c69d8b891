// The normal equations of the squared loss:  M = Xᵀ W X,  v = Xᵀ W (y − p_0).
#pragma once

#include "task.h"

namespace metarec_fast::cpu {

// M and v of the normal form; rows and columns lie like fast vectors.
template <typename scalar_t>
ALWAYS_INLINE void normal_equations(const Task<scalar_t>& task, Arena<scalar_t>& arena,
                                    scalar_t* matrix, scalar_t* vector) {
  const Rows<scalar_t>& rows = task.rows;
  const int64_t R = task.size, width = rows.width, stride = task.layout.stride;
  scalar_t* weighted = arena.take(R * width);
  scalar_t* residuals = arena.take(R);
  scalar_t* column = arena.take(stride);
  score_rows(rows, task.base, task.start, residuals);
  for (int64_t r = 0; r < R; ++r) {
    residuals[r] = task.weights[r] * (task.targets[r] - residuals[r]);
    for (int64_t i = 0; i < width; i += kLanes<scalar_t>)
      store(weighted + r * width + i) = task.weights[r] * load(rows[r] + i);
  }
  for (int64_t r = R; r < padded<scalar_t>(R); ++r) residuals[r] = 0;
  combine<scalar_t>(residuals, rows, nullptr, vector);
  multiply<scalar_t>({weighted, 1, width}, width, rows, R, width, matrix, stride);
  // The column of the bias, before its own factor.
  combine<scalar_t>(task.weights, rows, nullptr, column);
  for (int64_t d = 0; d < width; ++d) {
    store(matrix + d * stride + width) = Vector<scalar_t>{};
    matrix[d * stride + width] = rows.bias * column[d];
  }
  for (int64_t i = 0; i < stride; i += kLanes<scalar_t>)
    store(matrix + width * stride + i) = rows.bias * load(column + i);
}

}  // namespace metarec_fast::cpu
