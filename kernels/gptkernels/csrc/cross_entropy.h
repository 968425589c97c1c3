// Cross-entropy of a row of logits and its gradient, in three passes over a row that stays in the second-level cache.
#pragma once

#include "csrc/common.h"

namespace gptkernels {

// Returns the targets as contiguous int64. Throws if one is neither a class nor ignore_index.
inline Tensor checked_targets(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const Tensor given = converted(target, ScalarType::Long);
  const int64_t *t = given.const_data_ptr<int64_t>(), count = given.numel();
  for (int64_t i = 0; i < count; ++i)
    if (t[i] != ignore_index)
      check<std::out_of_range>(t[i] >= 0 && t[i] < classes, "target: got ", t[i], "; accepted are 0 to ", classes - 1,
                               " and ignore_index, ", ignore_index);
  return given;
}

// Returns log(sum(exp(x + bias))) - (x + bias)[target]. If `gradient` is not null, also writes its gradient,
// row_weight * (softmax(x + bias) - onehot(target)); `gradient` may be x itself.
template <typename T>
float cross_entropy_row(const T* x, const float* bias, int64_t n, int64_t target, float row_weight, T* gradient) {
  const auto at = [&](int64_t j, auto lanes) ALWAYS_INLINE_LAMBDA {
    Vec v = load(x + j, lanes);
    return bias ? v + load(bias + j, lanes) : v;
  };
  Vec top[4] = {Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity)};
  sweep(n, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA { top[k] = larger(keep(at(j, lanes), lanes, -kInfinity), top[k]); });
  const float highest = max(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  Sum total;
  sweep(n, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    total.add(keep(exp(at(j, lanes) - Vec(highest)), lanes, 0.f), k);
  });
  const float sum = total.total(), chosen = static_cast<float>(x[target]) + (bias ? bias[target] : 0.f);
  // In double, because a small loss is the difference of two larger numbers.
  const double loss = std::log(static_cast<double>(sum)) + (static_cast<double>(highest) - chosen);
  if (gradient) {
    const Vec factor(row_weight / sum);
    const float at_target = row_weight * (std::exp(chosen - highest) / sum - 1.f);
    sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      store(gradient + j, exp(at(j, lanes) - Vec(highest)) * factor, lanes);
    });
    gradient[target] = static_cast<T>(at_target);
  }
  return static_cast<float>(loss);
}

// Losses of rows [0, rows) of logits and, if `gradient` is not null, their gradients. Ignored rows get 0 for both.
template <typename T>
void cross_entropy_rows(const T* x, int64_t stride, const float* bias, int64_t rows, int64_t n, const int64_t* target,
                        int64_t ignore_index, const float* row_weight, float* losses, T* gradient) {
  parallel_for(0, rows, std::max<int64_t>(1, 8192 / n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* to = gradient ? gradient + i * n : nullptr;
      if (target[i] == ignore_index) {
        losses[i] = 0.f;
        if (to) std::fill_n(to, n, T(0.f));
      } else {
        losses[i] = cross_entropy_row(x + i * stride, bias, n, target[i], row_weight ? row_weight[i] : 0.f, to);
      }
    }
  });
}

}  // namespace gptkernels
