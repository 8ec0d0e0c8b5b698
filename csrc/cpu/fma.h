// Matrix products of float32 operands by fused multiply-adds, and how operands are packed for them.
//
// C[rows, cols] = A[rows, depth] B[depth, cols] with kRows rows of A at a time. B lies in panels of kPanel columns, all
// rows of a panel one behind the other, so that the inner loop reads memory in order: two vectors of B and kRows
// broadcasts of A feed 2 kRows multiply-adds. Edges of B are zero, so that no loop has a scalar tail.
#pragma once

#include <cstdint>

#include "isa.h"

namespace longattn::cpu {
namespace {

template <class V_>
struct Fma {
  using V = V_;
  using Vec = typename V::Vec;
  using Operand = float;
  static constexpr int kRows = V::kTileRows;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kPanel = 2 * kLanes;
  static constexpr int kStep = kLanes;         // columns, and depths that come from columns, are multiples of this
  static constexpr int kKeyBlock = 8 * kRows;  // keys of a block of the backward
  static constexpr int kPiece = 576;           // most columns of a piece of logits
  static constexpr int kQueryPiece = 240;
  static constexpr int kGroup = 1;        // neighbours in depth that lie together
  static constexpr int kDepthStep = 1;    // depths are multiples of this
  static constexpr bool kNarrow = false;  // operands are narrower than float32, and apart from the logits
  static constexpr bool kTransposedQueryGrads = false;

  // Elements of a panel whose depth is `depth`.
  static int64_t panel_size(int64_t depth) { return depth * kPanel; }
  static int64_t panels(int64_t cols) { return (cols + kPanel - 1) / kPanel; }
  static int64_t depth_of(int64_t dim) { return dim; }

  template <typename T>
  static LONGATTN_FORCE_INLINE Vec load_part(const T* x, int count) {
    return count >= kLanes ? V::load(x) : V::load_eight(x);
  }

  // kRows rows of A from memory: a[row * kLd + d], absent rows zero, times `factor`.
  template <int64_t kLd, typename T>
  static void load_rows(const T* x, int64_t stride, int count, int dim, float factor, float* a) {
    const Vec f = V::set1(factor);
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < dim; d += kLanes)
        V::store(a + r * kLd + d, r < count ? V::mul(f, load_part(x + r * stride + d, dim - d)) : V::zero());
  }

  // B[d, row] = x[row, d]: panels of rows, for products over the channels.
  template <typename T>
  static void pack_transposed(const T* x, int64_t stride, int count, int dim, float* to) {
    for (int64_t begin = 0; begin < panels(count) * kPanel; begin += kLanes) {
      float* panel = to + begin / kPanel * panel_size(dim) + begin % kPanel;
      for (int d = 0; d < dim; d += kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          block[r] = begin + r < count ? load_part(x + (begin + r) * stride + d, dim - d) : V::zero();
        V::transpose(block);
        const int depth = dim - d < kLanes ? dim - d : kLanes;
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          if (r < depth) V::store(panel + (d + r) * kPanel, block[r]);
      }
    }
  }

  // B[row, d] = x[row, d]: panels of channels, `panel` elements each, for products over the rows; rows up to `depth`
  // are zero.
  template <typename T>
  static void pack_rows(const T* x, int64_t stride, int count, int depth, int dim, int64_t panel, float* to) {
    for (int row = 0; row < depth; ++row)
      for (int64_t d = 0; d < panels(dim) * kPanel; d += kLanes) {
        float* at = to + d / kPanel * panel + row * kPanel + d % kPanel;
        V::store(at, row < count && d < dim ? load_part(x + row * stride + d, dim - d) : V::zero());
      }
  }

  // C[kRows, begin .. end), columns counted from the first panel's; A[r, k] = a[r * kRow + k * kDepth].
  template <int64_t kRow, int64_t kDepth, bool kAdd>
  static LONGATTN_FORCE_INLINE void product(const float* a, const float* b, int64_t panel, int begin, int end,
                                            int64_t depth, float* c, int64_t ldc) {
    int col = begin;
    if (col % kPanel != 0 && col < end) {
      tile<1, kRow, kDepth, kAdd>(a, b + col / kPanel * panel + kLanes, depth, c, ldc);
      col += kLanes;
    }
    for (; col + kPanel <= end; col += kPanel)
      tile<2, kRow, kDepth, kAdd>(a, b + col / kPanel * panel, depth, c + (col - begin), ldc);
    if (col < end) tile<1, kRow, kDepth, kAdd>(a, b + col / kPanel * panel, depth, c + (col - begin), ldc);
  }

  // Where row `row` of rows packed by pack_rows begins within their panel.
  static int64_t row_offset(int64_t row) { return row * kPanel; }
  // The weights, where they take the logits' own memory.
  static float* weights(float* logits, float*) { return logits; }

  struct Session {};  // what a thread sets up before its first product

  static int64_t peak(int64_t rounds) {
    Vec sums[2 * kRows];
    const Vec a = V::set1(0.5f), b = V::set1(1.0f);
#pragma GCC unroll 24
    for (int i = 0; i < 2 * kRows; ++i) sums[i] = V::set1(static_cast<float>(rounds + i));  // or some are the same
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
      for (int i = 0; i < 2 * kRows; ++i) sums[i] = V::fma(sums[i], a, b);
    return keep(sums, rounds * 2 * kRows * 2 * kLanes);
  }

  // The count, and a reason for the compiler to form the sums.
  static int64_t keep(Vec (&sums)[2 * kRows], int64_t count) {
    Vec total = sums[0];
#pragma GCC unroll 24
    for (int i = 1; i < 2 * kRows; ++i) total = V::add(total, sums[i]);
    volatile float kept = V::sum(total);
    static_cast<void>(kept);
    return count;
  }

 private:
  template <int kVecs, int64_t kRow, int64_t kDepth, bool kAdd>
  static LONGATTN_FORCE_INLINE void tile(const float* __restrict__ a, const float* __restrict__ b, int64_t depth,
                                         float* __restrict__ c, int64_t ldc) {
    Vec sum[kRows][kVecs];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[r][v] = kAdd ? V::load(c + r * ldc + v * kLanes) : V::zero();
    for (int64_t k = 0; k < depth; ++k) {
      Vec right[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) right[v] = V::load(b + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Vec left = V::set1(a[r * kRow]);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) sum[r][v] = V::fma(left, right[v], sum[r][v]);
      }
      a += kDepth;
      b += kPanel;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) V::store(c + r * ldc + v * kLanes, sum[r][v]);
  }
};

}  // namespace
}  // namespace longattn::cpu
