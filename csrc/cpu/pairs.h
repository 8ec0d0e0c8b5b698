// Matrix products of bfloat16 operands that accumulate in float32: how operands are packed, and AVX-512's dot product.
//
// As fma.h, but the processor multiplies two neighbours in depth at once, so that right-hand operands hold pairs of
// rows side by side: a panel is [depth / 2][kPanel][2]. A left-hand operand is bfloat16 row by row; one that is formed
// transposed is stored as such pairs too.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "fma.h"
#include "vec_avx512.h"

namespace longattn::cpu {
namespace {

// AVX-512 with conversions to bfloat16 in hardware, and exponentials as exact as bfloat16 weights need.
struct Avx512Bf16 : Avx512 {
  using Avx512::store;
  static void store(BFloat16* to, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  // Lanes of even and odd side by side.
  static void store_pairs(BFloat16* to, Vec even, Vec odd) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
  }
  // 2^x for x <= 0, relative error below 3e-6; 0 for -inf.
  static Vec exp2(Vec x) {
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec p = set1(0.013534166850149632f);
    p = fma(p, f, set1(0.052011460065841675f));
    p = fma(p, f, set1(0.2414427548646927f));
    p = fma(p, f, set1(0.6930038332939148f));
    p = fma(p, f, set1(1.0000026226043701f));
    return _mm512_scalef_ps(p, x);
  }
};

// What both kinds of bfloat16 products share: kRows_ rows at a time, columns and depths multiples of kStep_.
template <int kRows_, int kStep_>
struct Pairs {
  using V = Avx512Bf16;
  using Vec = V::Vec;
  using Operand = BFloat16;
  static constexpr int kRows = kRows_;
  static constexpr int kStep = kStep_;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPanel = 2 * kLanes;
  static constexpr int kGroup = 2;  // neighbours in depth that lie together
  static constexpr bool kNarrow = true;

  static int64_t panel_size(int64_t depth) { return depth * kPanel; }
  static int64_t panels(int64_t cols) { return (cols + kPanel - 1) / kPanel; }
  static int64_t depth_of(int64_t dim) { return (dim + 31) / 32 * 32; }
  static int64_t row_offset(int64_t row) { return row * kPanel; }  // of an even row
  static BFloat16* weights(float*, BFloat16* own) { return own; }

  static Vec load_part(const BFloat16* x, int count) { return count >= kLanes ? V::load(x) : V::load_eight(x); }

  // kRows rows of A from memory: a[row * kLd + d], absent rows and channels zero; the factor is -1, 0 or 1.
  template <int64_t kLd>
  static void load_rows(const BFloat16* x, int64_t stride, int count, int dim, float factor, BFloat16* a) {
    const __m512i keep = _mm512_set1_epi16(factor == 0 ? 0 : -1);
    const __m512i sign = _mm512_set1_epi16(factor < 0 ? static_cast<int16_t>(0x8000) : 0);
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < dim; d += 32) {
        const __m512i bits = r < count ? load_channels(x + r * stride + d, dim - d) : _mm512_setzero_si512();
        _mm512_storeu_si512(a + r * kLd + d, _mm512_and_si512(_mm512_xor_si512(bits, sign), keep));
      }
  }

  // B[d, row] = x[row, d]: panels of rows, for products over the channels.
  static void pack_transposed(const BFloat16* x, int64_t stride, int count, int dim, BFloat16* to) {
    for (int64_t begin = 0; begin < panels(count) * kPanel; begin += kLanes) {
      BFloat16* panel = to + begin / kPanel * panel_size(depth_of(dim)) + begin % kPanel * 2;
      for (int d = 0; d < dim; d += 32) {
        Vec block[kLanes];  // pairs of channels, as float lanes
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          block[r] =
              begin + r < count ? _mm512_castsi512_ps(load_channels(x + (begin + r) * stride + d, dim - d)) : V::zero();
        V::transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          _mm512_storeu_ps(reinterpret_cast<float*>(panel + (d + 2 * r) * kPanel), block[r]);
      }
    }
  }

  // B[row, d] = x[row, d]: panels of channels, `panel` elements each, for products over the rows; rows up to `depth`
  // are zero.
  static void pack_rows(const BFloat16* x, int64_t stride, int count, int depth, int dim, int64_t panel, BFloat16* to) {
    for (int row = 0; row < depth; row += 2)
      for (int64_t d = 0; d < panels(dim) * kPanel; d += kLanes) {
        const BFloat16* at = x + row * stride + d;
        const int channels = static_cast<int>(dim - d);
        const __m512i even = row < count && channels > 0 ? wide(at, channels) : _mm512_setzero_si512();
        const __m512i odd = row + 1 < count && channels > 0 ? wide(at + stride, channels) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + d / kPanel * panel + row * kPanel + d % kPanel * 2,
                            _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
  }

 private:
  // Up to 32 channels, the others zero; `count` is a multiple of 8.
  static __m512i load_channels(const BFloat16* x, int count) {
    return count >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16((1u << count) - 1, x);
  }
  static __m512i wide(const BFloat16* x, int count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(count >= 16 ? 0xffff : 0xff, x));
  }
};

// Products by AVX-512's vdpbf16ps.
struct Dot : Pairs<12, 16> {
  static constexpr int kDepthStep = 2;
  static constexpr int kKeyBlock = 8 * kRows;
  static constexpr int kPiece = 576;
  static constexpr int kQueryPiece = 240;
  static constexpr bool kTransposedQueryGrads = false;

  struct Session {};

  static int64_t peak(int64_t rounds) {
    Vec sums[2 * kRows];
    const __m512bh a = _mm512_cvtne2ps_pbh(V::set1(0.5f), V::set1(0.25f)),
                   b = _mm512_cvtne2ps_pbh(V::zero(), V::zero());
#pragma GCC unroll 24
    for (int i = 0; i < 2 * kRows; ++i) sums[i] = V::set1(static_cast<float>(rounds + i));  // or some are the same
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
      for (int i = 0; i < 2 * kRows; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
    return Fma<Avx512>::keep(sums, rounds * 2 * kRows * 4 * kLanes);
  }

  // C[kRows, begin .. end), columns counted from the first panel's; A[r, k] = a[r * kRow + k / 2 * kDepth + k % 2].
  template <int64_t kRow, int64_t kDepth, bool kAdd>
  static LONGATTN_FORCE_INLINE void product(const BFloat16* a, const BFloat16* b, int64_t panel, int begin, int end,
                                            int64_t depth, float* c, int64_t ldc) {
    int col = begin;
    if (col % kPanel != 0 && col < end) {
      tile<1, kRow, kDepth, kAdd>(a, b + col / kPanel * panel + 2 * kLanes, depth, c, ldc);
      col += kLanes;
    }
    for (; col + kPanel <= end; col += kPanel)
      tile<2, kRow, kDepth, kAdd>(a, b + col / kPanel * panel, depth, c + (col - begin), ldc);
    if (col < end) tile<1, kRow, kDepth, kAdd>(a, b + col / kPanel * panel, depth, c + (col - begin), ldc);
  }

 private:
  template <int kVecs, int64_t kRow, int64_t kDepth, bool kAdd>
  static LONGATTN_FORCE_INLINE void tile(const BFloat16* a, const BFloat16* b, int64_t depth, float* __restrict__ c,
                                         int64_t ldc) {
    Vec sum[kRows][kVecs];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[r][v] = kAdd ? V::load(c + r * ldc + v * kLanes) : V::zero();
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh right[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) right[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * 2 * kLanes));
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        int pair;
        __builtin_memcpy(&pair, a + r * kRow, sizeof(pair));
        const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
      }
      a += kDepth;
      b += 2 * kPanel;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) V::store(c + r * ldc + v * kLanes, sum[r][v]);
  }
};

}  // namespace
}  // namespace longattn::cpu
