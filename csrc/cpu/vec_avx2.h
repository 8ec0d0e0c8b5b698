// Eight float32 lanes of AVX2 with FMA and F16C. Include inside the target region of one translation unit.
#pragma once

#include <immintrin.h>

#include "elements.h"

namespace longattn::cpu {
namespace {

struct Avx2 {
  using Vec = __m256;
  using Mask = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 right-hand vectors and 1 broadcast of 16 registers

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* x) { return _mm256_loadu_ps(x); }
  static Vec load(const BFloat16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(x)), 16));
  }
  static Vec load(const Float16* x) { return _mm256_cvtph_ps(eight(x)); }
  template <typename T>
  static Vec load_eight(const T* x) {
    return load(x);
  }
  static void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
  static void store(BFloat16* to, Vec x) { store_low(to, narrow(x)); }
  static void store(Float16* to, Vec x) {
    store_low(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <typename T>
  static void store_eight(T* to, Vec x) {
    store(to, x);
  }

  // Around the caches; `to` is aligned to what is written.
  static void stream(float* to, Vec a, Vec b) {
    _mm256_stream_ps(to, a);
    _mm256_stream_ps(to + kLanes, b);
  }
  static void stream(BFloat16* to, Vec a, Vec b) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_set_m128i(narrow(b), narrow(a)));
  }
  static void end_stream() { _mm_sfence(); }

  // Lanes even, odd, even, ...
  static Vec alternate(float even, float odd) { return _mm256_blend_ps(set1(even), set1(odd), 0xaa); }
  // Four numbers, each in two neighbouring lanes.
  static Vec twice(const float* x) {
    const __m256i order = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), order);
  }
  static Vec swap_pairs(Vec a) { return _mm256_permute_ps(a, 0xb1); }

  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static float sum(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float largest(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  // Lanes [begin, end), which may lie outside 0 .. 8.
  static Mask lanes(int begin, int end) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
    return _mm256_castsi256_ps(_mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane)));
  }
  // Lanes whose ints at begin <= x < those at end.
  static Mask holds(const int* begin, const int* end, int x) {
    const __m256i value = _mm256_set1_epi32(x);
    const __m256i before = _mm256_cmpgt_epi32(ints(begin), value);
    return _mm256_castsi256_ps(_mm256_andnot_si256(before, _mm256_cmpgt_epi32(ints(end), value)));
  }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Vec select(Mask mask, Vec a, Vec b) { return _mm256_blendv_ps(b, a, mask); }
  static Vec keep(Mask mask, Vec a) { return _mm256_and_ps(mask, a); }

  // 2^x for x <= 0, relative error below 1.5e-7; 0 below the normal numbers.
  static Vec exp2(Vec x) {
    const Vec lowest = set1(-126.0f);
    const Vec t = max(lowest, x);  // NaN where x is
    const Vec n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec f = sub(t, n);
    Vec p = set1(0.001327647129073739f);
    p = fma(p, f, set1(0.009675540961325169f));
    p = fma(p, f, set1(0.05550713092088699f));
    p = fma(p, f, set1(0.24022120237350464f));
    p = fma(p, f, set1(0.6931469440460205f));
    p = fma(p, f, set1(1.0000001192092896f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const Vec power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, lowest, _CMP_LT_OQ), power);
  }

  // Lane i is the sum of the lanes of r[i].
  static Vec sums(const Vec (&r)[8]) {
    Vec u[4], v[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      u[i] = add(_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      v[i] = add(_mm256_shuffle_ps(u[2 * i], u[2 * i + 1], 0x44), _mm256_shuffle_ps(u[2 * i], u[2 * i + 1], 0xee));
    return add(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31));
  }

  // Transpose 8 x 8.
  static void transpose(Vec (&r)[8]) {
    Vec u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      u[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      u[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(u[4 * i], u[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(u[4 * i], u[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(u[4 * i + 1], u[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(u[4 * i + 1], u[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      u[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      u[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = u[i];
  }

 private:
  static __m128i eight(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  static __m256i ints(const int* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
  static void store_low(void* to, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(to), x); }
  // Round to nearest, ties to even; a NaN stays one.
  static __m128i narrow(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    return _mm256_castsi256_si128(packed);
  }
};

}  // namespace
}  // namespace longattn::cpu
