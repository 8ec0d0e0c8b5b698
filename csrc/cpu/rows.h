// Rows of tensors, and how the result of a row of queries is stored.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention.h"
#include "softmax.h"

namespace longattn::cpu {
namespace {

template <typename T>
inline T* row_of(const Tensor4& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(const_cast<void*>(x.data)) + batch * x.batch + head * x.head + token * x.token;
}

// Divides the sums of a row by its denominator, to which the sink logit is added, and stores out and the log-sum-exp.
template <class V, typename T>
inline void store_result(const AttentionParams& p, int batch, int head, int query, RowState state, const float* sums) {
  float shrink = 1.0f;
  if (p.sink_logits) {
    const float logit = p.sink_logits[head] * kLog2E;
    const float largest = larger(state.largest, logit);
    if (largest != -INFINITY) {
      shrink = std::exp2(state.largest - largest);
      state = {largest, state.sum * shrink + std::exp2(logit - largest)};
    }
  }
  const auto factor = V::set1(state.sum > 0.0f ? shrink / state.sum : state.sum);
  T* out = row_of<T>(p.out, batch, head, query);
  int d = 0;
  for (; d + V::kLanes <= p.head_dim; d += V::kLanes) V::store(out + d, V::mul(factor, V::load(sums + d)));
  if (d < p.head_dim) V::store_eight(out + d, V::mul(factor, V::load(sums + d)));
  p.lse[(int64_t{batch} * p.heads + head) * p.rows.num_queries + query] =
      state.largest == -INFINITY ? -INFINITY : (state.largest + std::log2(state.sum)) * kLn2;
}

}  // namespace
}  // namespace longattn::cpu
