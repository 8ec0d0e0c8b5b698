// Element by element on rows of logits: the soft cap, and the online softmax.
//
// Logits are kept in units of log 2, so that weights are powers of two: with m the largest logit of a row so far,
// weight = 2^(logit - m) (Milakov & Gimelshein, 2018, arXiv:1805.02867).
#pragma once

#include <cmath>
#include <cstdint>

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

// Turns the products s[0, cols) of one row, of which it sees [begin, end), into weights, zero where it sees nothing;
// `weights` may be s. Returns the factor by which what was summed before shrinks. `cols` is a multiple of V::kLanes.
template <class V, typename W>
inline float softmax_row(float* s, W* weights, int cols, int begin, int end, const LogitScale& scale, RowState* row) {
  using Vec = typename V::Vec;
  constexpr int kLanes = V::kLanes;
  begin = begin < 0 ? 0 : begin;
  end = end > cols ? cols : end;
  if (end <= begin) {
    for (int c = 0; c < cols; c += kLanes) V::store(weights + c, V::zero());
    return 1.0f;
  }
  const int first = begin / kLanes * kLanes, last = (end - 1) / kLanes * kLanes;
  if (scale.cap != 0.0f) {
    const Vec inner = V::set1(scale.inner);
    for (int c = first; c <= last; c += kLanes) V::store(s + c, tanh<V>(V::mul(V::load(s + c), inner)));
  }
  const Vec none = V::set1(-INFINITY);
  V::store(s + first, V::select(V::lanes(begin - first, end - first), V::load(s + first), none));
  V::store(s + last, V::select(V::lanes(begin - last, end - last), V::load(s + last), none));
  Vec top[4] = {none, none, none, none};
  int c = first;
  for (; c + 3 * kLanes <= last; c += 4 * kLanes)
    for (int i = 0; i < 4; ++i) top[i] = V::max(top[i], V::load(s + c + i * kLanes));
  for (; c <= last; c += kLanes) top[0] = V::max(top[0], V::load(s + c));
  const float found = V::largest(V::max(V::max(top[0], top[1]), V::max(top[2], top[3]))) * scale.factor;
  const float largest = found > row->largest ? found : row->largest;
  if (largest == -INFINITY) {  // logits of -inf alone
    for (c = 0; c < cols; c += kLanes) V::store(weights + c, V::zero());
    return 1.0f;
  }
  const Vec factor = V::set1(scale.factor), shift = V::set1(-largest);
  Vec sums[2] = {V::zero(), V::zero()};
  for (c = 0; c < first; c += kLanes) V::store(weights + c, V::zero());
  for (; c + kLanes <= last; c += 2 * kLanes)
    for (int i = 0; i < 2; ++i) {
      const Vec weight = V::exp2(V::fma(V::load(s + c + i * kLanes), factor, shift));
      sums[i] = V::add(sums[i], weight);
      V::store(weights + c + i * kLanes, weight);
    }
  for (; c <= last; c += kLanes) {
    const Vec weight = V::exp2(V::fma(V::load(s + c), factor, shift));
    sums[0] = V::add(sums[0], weight);
    V::store(weights + c, weight);
  }
  for (; c < cols; c += kLanes) V::store(weights + c, V::zero());
  const float shrink = row->largest == -INFINITY ? 0.0f : std::exp2(row->largest - largest);
  row->largest = largest;
  row->sum = row->sum * shrink + V::sum(V::add(sums[0], sums[1]));
  return shrink;
}

}  // namespace
}  // namespace longattn::cpu
