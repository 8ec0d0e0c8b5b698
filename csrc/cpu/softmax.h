// Element by element on rows of logits: the soft cap, and the online softmax.
//
// Logits are kept in units of log 2, so that weights are powers of two: with m the largest logit of a row so far,
// weight = 2^(logit - m) (Milakov & Gimelshein, 2018, arXiv:1805.02867).
#pragma once

#include <cmath>
#include <cstdint>

#include "../band.h"

namespace longattn::cpu {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// tanh, relative error below 3e-7: an odd polynomial below 0.625, 1 - 2 / (e^2|x| + 1) above.
template <class V>
inline typename V::Vec tanh(typename V::Vec x) {
  using Vec = typename V::Vec;
  const Vec square = V::mul(x, x), size = V::abs(x);
  Vec p = V::set1(-0.00566003518179059f);
  p = V::fma(p, square, V::set1(0.02059103734791279f));
  p = V::fma(p, square, V::set1(-0.05372108891606331f));
  p = V::fma(p, square, V::set1(0.13331127166748047f));
  p = V::fma(p, square, V::set1(-0.3333325982093811f));
  p = V::fma(V::mul(p, square), x, x);
  const Vec decay = V::exp2(V::mul(size, V::set1(-2.0f * kLog2E)));  // e^-2|x|
  const Vec far = V::div(V::sub(V::set1(1.0f), decay), V::add(V::set1(1.0f), decay));
  const Vec signed_far = V::select(V::less(x, V::zero()), V::sub(V::zero(), far), far);
  return V::select(V::less(size, V::set1(0.625f)), p, signed_far);
}

// How products become logits in units of log 2: a factor, or cap tanh(inner product) under a soft cap.
struct LogitScale {
  float factor;      // of the product, or of the capped value
  float inner, cap;  // cap 0: none

  // The sign of the scale goes into the queries, so that the factor is never negative.
  LogitScale(float scale, float softcap) {
    const float size = scale < 0 ? -scale : scale;
    factor = softcap != 0 ? softcap * kLog2E : (size != 0 ? size * kLog2E : 1.0f);
    inner = softcap != 0 ? (size != 0 ? size / softcap : 1.0f) : 0.0f;
    cap = softcap;
  }
  static float query_factor(float scale) { return scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f; }
};

// Online softmax of one row, in log-2 units.
struct RowState {
  float largest = -INFINITY;
  float sum = 0.0f;  // of the weights
};

// Turns products s[rows, cols) into weights, zero where a row sees nothing; `weights` may be s. Row r sees the columns
// seen[r], within [0, cols); `cols` is a multiple of V::kLanes. shrink[r] is the factor by which what was summed before
// shrinks. All rows take the same loops, since counts that change from row to row cost more in mispredicted branches
// than the columns that they save: only the columns that some row does not see are compared with its ends.
template <class V, typename W>
struct SoftmaxRows {
  using Vec = typename V::Vec;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kMostRows = 32;
  // A fused multiply-add leaves the rounding error of the largest logit in every exponent, half a unit at this size and
  // enough to overflow at 2^31: from here on products are rounded as the largest was, so that no exponent exceeds 0.
  static constexpr float kExact = 16777216.0f;

  float* s;
  W* weights;
  int64_t ld;
  int rows, cols;
  const Range* seen;
  const LogitScale& scale;

  void operator()(RowState* states, float* shrink) const {
    float largest[kMostRows];
    const Range inner = seen_by_all();
    for (int r = 0; r < rows; ++r) {
      largest[r] = states[r].largest;
      if (seen[r].empty()) continue;
      if (scale.cap != 0.0f) cap(s + r * ld);
      largest[r] = larger(largest[r], largest_of(s + r * ld, seen[r], inner) * scale.factor);
    }
    for (int r = 0; r < rows; ++r) {
      shrink[r] = 1.0f;
      if (seen[r].empty() || largest[r] == -INFINITY) {  // or logits of -inf alone, or NaN, which no maximum keeps
        if (!seen[r].empty() && has_nan(s + r * ld)) states[r] = {0.0f, NAN};
        for (int c = 0; c < cols; c += kLanes) V::store(weights + r * ld + c, V::zero());
        continue;
      }
      if (states[r].largest != largest[r])
        shrink[r] = states[r].largest == -INFINITY ? 0.0f : std::exp2(states[r].largest - largest[r]);
      float factor = scale.factor;
      if (largest[r] > kExact || largest[r] < -kExact) {
        scale_row(s + r * ld);
        factor = 1.0f;
      }
      states[r] = {largest[r], states[r].sum * shrink[r] + weigh(s + r * ld, weights + r * ld, factor, largest[r])};
    }
  }

 private:
  // Whole vectors of columns that every row sees which sees any.
  Range seen_by_all() const {
    Range inner{0, cols};
    for (int r = 0; r < rows; ++r)
      if (!seen[r].empty()) inner = {larger(inner.begin, seen[r].begin), smaller(inner.end, seen[r].end)};
    inner.begin = (inner.begin + kLanes - 1) / kLanes * kLanes;
    return {inner.begin, larger(inner.begin, inner.end / kLanes * kLanes)};
  }

  bool has_nan(const float* row) const {
    for (int c = 0; c < cols; ++c)
      if (row[c] != row[c]) return true;
    return false;
  }

  void cap(float* row) const {
    const Vec inner = V::set1(scale.inner);
    for (int c = 0; c < cols; c += kLanes) V::store(row + c, tanh<V>(V::mul(V::load(row + c), inner)));
  }

  // Products that the row does not see become -inf.
  float largest_of(float* row, const Range& sees, const Range& inner) const {
    const Vec none = V::set1(-INFINITY);
    Vec top[4] = {none, none, none, none};
    for (int c = 0; c < cols; c += kLanes) {
      if (c == inner.begin) {
        for (; c + 4 * kLanes <= inner.end; c += 4 * kLanes)
          for (int i = 0; i < 4; ++i) top[i] = V::max(top[i], V::load(row + c + i * kLanes));
        for (; c < inner.end; c += kLanes) top[0] = V::max(top[0], V::load(row + c));
        if (c >= cols) break;
      }
      const Vec x = V::select(V::lanes(sees.begin - c, sees.end - c), V::load(row + c), none);
      V::store(row + c, x);
      top[1] = V::max(top[1], x);
    }
    return V::largest(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
  }

  void scale_row(float* row) const {
    const Vec factor = V::set1(scale.factor);
    for (int c = 0; c < cols; c += kLanes) V::store(row + c, V::mul(V::load(row + c), factor));
  }

  // Stores the weights of a row and returns their sum.
  float weigh(const float* row, W* to, float scale_left, float largest) const {
    const Vec factor = V::set1(scale_left), shift = V::set1(-largest);
    Vec sums[2] = {V::zero(), V::zero()};
    int c = 0;
    for (; c + 2 * kLanes <= cols; c += 2 * kLanes)
      for (int i = 0; i < 2; ++i) {
        const Vec weight = V::exp2(V::fma(V::load(row + c + i * kLanes), factor, shift));
        sums[i] = V::add(sums[i], weight);
        V::store(to + c + i * kLanes, weight);
      }
    if (c < cols) {
      const Vec weight = V::exp2(V::fma(V::load(row + c), factor, shift));
      sums[0] = V::add(sums[0], weight);
      V::store(to + c, weight);
    }
    return V::sum(V::add(sums[0], sums[1]));
  }
};

}  // namespace
}  // namespace longattn::cpu
