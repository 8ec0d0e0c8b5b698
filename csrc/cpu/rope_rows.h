// Rotation of rows that lie evenly in memory, by vectors of V. Include inside the target region of one translation
// unit.
//
// Multiplications and additions are not fused, so that every instruction set rounds alike. What comes next is asked for
// while a row is rotated; results that no cache would keep are written around it, which saves reading them first.
#pragma once

#include "rope.h"
#include "rope_pairs.h"

namespace longattn::cpu {
namespace {

template <class V, typename T>
struct RotateRows {
  using Vec = typename V::Vec;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kLine = 64;  // bytes

  static void half_split(const RopeRows& rows) { rows.stream ? run<false, true>(rows) : run<false, false>(rows); }
  static void interleaved(const RopeRows& rows) { rows.stream ? run<true, true>(rows) : run<true, false>(rows); }

 private:
  template <bool kInterleaved, bool kStream>
  static void run(const RopeRows& rows) {
    const T *x = static_cast<const T*>(rows.x), *next = static_cast<const T*>(rows.next);
    T* out = static_cast<T*>(rows.out);
    const float *cos = rows.cos, *sin = rows.sin;
    const int bytes = 2 * static_cast<int>(rows.half * sizeof(T));
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int at = 0; at < bytes; at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(next) + at, 0, 2);
      if constexpr (kInterleaved)
        pairs<kStream>(x, out, cos, sin, rows.half, rows.sign);
      else
        halves<kStream>(x, out, cos, sin, rows.half, rows.sign);
      x += rows.x_stride;
      next += rows.x_stride;
      out += rows.out_stride;
      cos += rows.cos_stride;
      sin += rows.sin_stride;
    }
    if constexpr (kStream) V::end_stream();
  }

  template <bool kStream>
  static void halves(const T* x, T* out, const float* cos, const float* sin, int64_t half, float sign) {
    const Vec signs = V::set1(sign);
    const auto rotate = [&](int64_t i, Vec& first, Vec& second) {
      const Vec a = V::load(x + i), b = V::load(x + half + i);
      const Vec c = V::load(cos + i), s = V::mul(signs, V::load(sin + i));
      first = V::sub(V::mul(a, c), V::mul(b, s));
      second = V::add(V::mul(b, c), V::mul(a, s));
    };
    int64_t i = 0;
    Vec first[2], second[2];
    if constexpr (kStream)
      for (; i + 2 * kLanes <= half; i += 2 * kLanes) {
        rotate(i, first[0], second[0]);
        rotate(i + kLanes, first[1], second[1]);
        V::stream(out + i, first[0], first[1]);
        V::stream(out + half + i, second[0], second[1]);
      }
    for (; i + kLanes <= half; i += kLanes) {
      rotate(i, first[0], second[0]);
      V::store(out + i, first[0]);
      V::store(out + half + i, second[0]);
    }
    if (i < half) rotate_pairs<1>(x + i, x + half + i, out + i, out + half + i, cos + i, sin + i, half - i, sign);
  }

  template <bool kStream>
  static void pairs(const T* x, T* out, const float* cos, const float* sin, int64_t half, float sign) {
    constexpr int kPairs = kLanes / 2;
    const Vec signs = V::alternate(-sign, sign);
    const auto rotate = [&](int64_t i) {
      const Vec a = V::load(x + 2 * i), s = V::mul(signs, V::twice(sin + i));
      return V::add(V::mul(a, V::twice(cos + i)), V::mul(V::swap_pairs(a), s));
    };
    int64_t i = 0;
    if constexpr (kStream)
      for (; i + 2 * kPairs <= half; i += 2 * kPairs) V::stream(out + 2 * i, rotate(i), rotate(i + kPairs));
    for (; i + kPairs <= half; i += kPairs) V::store(out + 2 * i, rotate(i));
    if (i < half)
      rotate_pairs<2>(x + 2 * i, x + 2 * i + 1, out + 2 * i, out + 2 * i + 1, cos + i, sin + i, half - i, sign);
  }
};

template <class V>
const RopeKernels* rope_kernels_of() {
  static const RopeKernels kernels{{&RotateRows<V, float>::half_split, &RotateRows<V, float>::interleaved},
                                   {&RotateRows<V, BFloat16>::half_split, &RotateRows<V, BFloat16>::interleaved},
                                   true};
  return &kernels;
}

}  // namespace
}  // namespace longattn::cpu
