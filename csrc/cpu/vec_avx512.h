// Sixteen float32 lanes of AVX-512 (F, BW, DQ, VL). Include inside the target region of one translation unit.
#pragma once

#include <immintrin.h>

#include "elements.h"

namespace longattn::cpu {
namespace {

struct Avx512 {
  using Vec = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 right-hand vectors and 1 broadcast of 32 registers

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* x) { return _mm512_loadu_ps(x); }
  static Vec load(const BFloat16* x) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
  static Vec load(const Float16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
  // The first eight lanes; the others are zero and not read.
  static Vec load_eight(const float* x) { return _mm512_maskz_loadu_ps(0xff, x); }
  static Vec load_eight(const BFloat16* x) { return widen(eight(x)); }
  static Vec load_eight(const Float16* x) { return _mm512_cvtph_ps(eight(x)); }
  static void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
  static void store(BFloat16* to, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x)); }
  static void store(Float16* to, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half(x)); }
  static void store_eight(float* to, Vec x) { _mm512_mask_storeu_ps(to, 0xff, x); }
  static void store_eight(BFloat16* to, Vec x) { store_low(to, narrow(x)); }
  static void store_eight(Float16* to, Vec x) { store_low(to, half(x)); }

  // Around the caches, whole lines; `to` begins one.
  static void stream(float* to, Vec a, Vec b) {
    _mm512_stream_ps(to, a);
    _mm512_stream_ps(to + kLanes, b);
  }
  static void stream(BFloat16* to, Vec a, Vec b) {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a)), narrow(b), 1);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  }
  static void end_stream() { _mm_sfence(); }

  // Lanes even, odd, even, ...
  static Vec alternate(float even, float odd) { return _mm512_mask_mov_ps(set1(even), 0xaaaa, set1(odd)); }
  // Eight numbers, each in two neighbouring lanes.
  static Vec twice(const float* x) {
    const __m512i order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(x)));
  }
  static Vec swap_pairs(Vec a) { return _mm512_permute_ps(a, 0xb1); }

  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec abs(Vec a) { return _mm512_abs_ps(a); }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a); }
  static float largest(Vec a) { return _mm512_reduce_max_ps(a); }

  // Lanes [begin, end), which may lie outside 0 .. 16.
  static Mask lanes(int begin, int end) {
    const unsigned low = begin <= 0 ? 0xffffu : begin >= 16 ? 0u : 0xffffu << begin;
    const unsigned high = end >= 16 ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1;
    return static_cast<Mask>(low & high);
  }
  // Lanes whose ints at begin <= x < those at end.
  static Mask holds(const int* begin, const int* end, int x) {
    const __m512i value = _mm512_set1_epi32(x);
    const Mask from = _mm512_cmple_epi32_mask(_mm512_loadu_si512(begin), value);
    return _mm512_mask_cmpgt_epi32_mask(from, _mm512_loadu_si512(end), value);
  }
  static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Vec select(Mask mask, Vec a, Vec b) { return _mm512_mask_mov_ps(b, mask, a); }
  static Vec keep(Mask mask, Vec a) { return _mm512_maskz_mov_ps(mask, a); }

  // 2^x for x <= 0, relative error below 1.5e-7; 0 for -inf.
  static Vec exp2(Vec x) {
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec p = set1(0.0018775765784084797f);
    p = fma(p, f, set1(0.008989340625703335f));
    p = fma(p, f, set1(0.05582631751894951f));
    p = fma(p, f, set1(0.24015361070632935f));
    p = fma(p, f, set1(0.6931530833244324f));
    p = fma(p, f, set1(0.9999999403953552f));
    return _mm512_scalef_ps(p, x);
  }

  // Lane i is the sum of the lanes of r[i].
  static Vec sums(const Vec (&r)[16]) {
    Vec u[8], v[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      u[i] = add(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = add(low_pairs(u[2 * i], u[2 * i + 1]), high_pairs(u[2 * i], u[2 * i + 1]));
    const Vec a = add(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
    const Vec b = add(_mm512_shuffle_f32x4(v[2], v[3], 0x88), _mm512_shuffle_f32x4(v[2], v[3], 0xdd));
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }

  // Transpose 16 x 16.
  static void transpose(Vec (&r)[16]) {
    Vec u[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      u[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      u[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = low_pairs(u[4 * i], u[4 * i + 2]);
      r[4 * i + 1] = high_pairs(u[4 * i], u[4 * i + 2]);
      r[4 * i + 2] = low_pairs(u[4 * i + 1], u[4 * i + 3]);
      r[4 * i + 3] = high_pairs(u[4 * i + 1], u[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      u[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      u[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      u[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      u[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_f32x4(u[i], u[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(u[i], u[i + 8], 0xdd);
    }
  }

 private:
  static Vec low_pairs(Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Vec high_pairs(Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Vec widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  // Round to nearest, ties to even; a NaN stays one.
  static __m256i narrow(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_srli_epi32(rounded, 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
  }
  static __m256i half(Vec x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256i eight(const void* x) {
    return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(x)));
  }
  static void store_low(void* to, __m256i x) { _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(x)); }
};

}  // namespace
}  // namespace longattn::cpu
