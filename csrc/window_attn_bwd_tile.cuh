// What both passes of the backward share: a warp's rows against a streamed tile of columns.
//
// Rows are queries (Q, dO) and columns keys (K, V) in the pass for dQ; rows are keys (K, V) and columns queries (Q, dO)
// in the pass for dK and dV. Either way the first pair's product gives the logits, from which the weights P follow by
// the saved log-sum-exp, the second pair's product gives dP, dS = P (dP - delta), and gradients of the rows are
// products of P or dS with a streamed tile. Seven products in place of five, but no accumulator in global memory, no
// atomics, no order to wait for, and GQA heads summed in registers.
#pragma once

#include "window_attn_logits.cuh"
#include "window_attn_tile.cuh"

namespace longattn::cuda {

// kRoles is 2 where the registers of a warp do not hold two gradients: then one warp forms the first of its rows and
// another the second.
template <typename Type_, int kD_, int kColumns_, int kRowBlocks_, int kRoles_, int kStages_>
struct BackwardTraits {
  using Type = Type_;
  static constexpr int kD = kD_, kColumns = kColumns_, kRowBlocks = kRowBlocks_, kRoles = kRoles_, kStages = kStages_;
  static constexpr int kRowWarps = 4, kWarps = kRowWarps * kRoles, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowBlocks, kRows = kRowWarps * kWarpRows;
  static constexpr int kRowTileBytes = kRows * kD * 2, kColumnTileBytes = kColumns * kD * 2;
  static constexpr int kStageBytes = 2 * kColumnTileBytes;
  static constexpr int kTileBytes = 2 * kRowTileBytes + kStages * kStageBytes;
  static_assert(kColumns % 32 == 0, "edge masks are words of 32 columns");
  static_assert(kRows % kWarps == 0 && kStages <= 2);
};

template <class Traits>
struct BackwardWarp {
  static constexpr int kD = Traits::kD, kColumns = Traits::kColumns, kRowBlocks = Traits::kRowBlocks;
  using Type = typename Traits::Type;
  using Gradient = float[kRowBlocks][kD / 8][4];

  float s[kRowBlocks][kColumns / 8][4];   // logits, then P
  float dp[kRowBlocks][kColumns / 8][4];  // dP, then dS
  FragmentAddress<kD> rows, columns;
  uint32_t to_streamed;  // from a fragment of the warp's rows to that of the same place in the first streamed tile

  __device__ __forceinline__ BackwardWarp(unsigned char* shared, int warp, int lane)
      : rows(simt::smem_address(shared), warp % Traits::kRowWarps * Traits::kWarpRows + lane % 16, lane / 16),
        columns(simt::smem_address(shared) + 2 * Traits::kRowTileBytes, lane % 8 + lane / 16 * 8, lane / 8 % 2),
        to_streamed(2 * Traits::kRowTileBytes -
                    warp % Traits::kRowWarps * Traits::kWarpRows * TileLayout<kD>::kRowBytes) {}

  __device__ static __forceinline__ void clear(Gradient& gradient) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int d = 0; d < kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) gradient[r][d][i] = 0.0f;
  }

  // The weights of a stage's tiles, and the gradients of the logits where kGradient; `stats` gives the RowStats of
  // (row block, half, pair of columns, which of the pair).
  template <bool kGradient, typename Stats>
  __device__ __forceinline__ void form_weights(int stage, const Logits& logits, const Stats& stats) {
    product(s, 0, stage * Traits::kStageBytes);
    if (kGradient) product(dp, Traits::kRowTileBytes, stage * Traits::kStageBytes + Traits::kColumnTileBytes);
    if (logits.kind == Logits::kCapped)
      differentiate<kGradient, true>(logits, stats);
    else
      differentiate<kGradient, false>(logits, stats);
  }

  // `bits` gives what row `row` of the warp sees of the 32 columns from a word on.
  template <bool kGradient, typename Bits>
  __device__ __forceinline__ void mask(const Bits& bits, int lane) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int word = 0; word < kColumns / 32; ++word) {
          const uint32_t seen = bits(16 * r + 8 * half + lane / 4, word) >> 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!(seen >> (8 * n + i) & 1)) {
                s[r][4 * word + n][2 * half + i] = 0.0f;
                if (kGradient) dp[r][4 * word + n][2 * half + i] = 0.0f;
              }
        }
  }

  // gradient += weights (rows, columns) times streamed tile `which` of a stage.
  __device__ __forceinline__ void accumulate(Gradient& gradient, const float (&weights)[kRowBlocks][kColumns / 8][4],
                                             int stage, int which) const {
    const uint32_t offset = to_streamed + stage * Traits::kStageBytes + which * Traits::kColumnTileBytes;
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[r][i] = Type::pack(weights[r][2 * n + i / 2][2 * (i % 2)], weights[r][2 * n + i / 2][2 * (i % 2) + 1]);
#pragma unroll
      for (int c = 0; c < kD / 16; ++c) {
        uint32_t b[4];
        simt::ldmatrix_x4_trans(b, rows.at(c, 16 * n) + offset);
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) {
          simt::mma_add(Type, gradient[r][2 * c], a[r], b[0], b[1]);
          simt::mma_add(Type, gradient[r][2 * c + 1], a[r], b[2], b[3]);
        }
      }
    }
  }

  // Writes scale * gradient as 16-bit rows into one of the rows' tiles, which nothing reads any more.
  __device__ __forceinline__ void stage_rows(unsigned char* tile, const Gradient& gradient, float scale, int warp,
                                             int lane) const {
    const int first_row = warp % Traits::kRowWarps * Traits::kWarpRows;
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
          const int row = first_row + 16 * r + 8 * half + lane / 4;
          const uint32_t offset = TileLayout<kD>::offset(row, d) + lane % 4 * 4;
          *reinterpret_cast<uint32_t*>(tile + offset) =
              Type::pack(gradient[r][d][2 * half] * scale, gradient[r][d][2 * half + 1] * scale);
        }
  }

 private:
  template <bool kGradient, bool kCapped, typename Stats>
  __device__ __forceinline__ void differentiate(const Logits& logits, const Stats& stats) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const RowStats row = stats(r, i / 2, n, i % 2);
          float x = s[r][n][i], slope = 1.0f;
          if (kCapped) {
            x = logits.capped(x);
            slope = 1.0f - x * x;
          } else if (logits.kind == Logits::kScaled) {
            x = logits.scaled(x);
          }
          const float weight = simt::exp2_fast(x * logits.factor - row.lse2);
          s[r][n][i] = weight;
          if (kGradient) dp[r][n][i] = weight * (dp[r][n][i] - row.delta) * slope;
        }
  }

  __device__ __forceinline__ void product(float (&sum)[kRowBlocks][kColumns / 8][4], int row_offset,
                                          int column_offset) const {
    FragmentAddress<kD> streamed = columns;
    streamed.base += column_offset;
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) simt::ldmatrix_x4(a[r], rows.at(c, 16 * r) + row_offset);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        simt::ldmatrix_x4(b, streamed.at(c, 16 * n));
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) {
          if (c == 0) {
            simt::mma_set(Type, sum[r][2 * n], a[r], b[0], b[1]);
            simt::mma_set(Type, sum[r][2 * n + 1], a[r], b[2], b[3]);
          } else {
            simt::mma_add(Type, sum[r][2 * n], a[r], b[0], b[1]);
            simt::mma_add(Type, sum[r][2 * n + 1], a[r], b[2], b[3]);
          }
        }
      }
    }
  }
};

}  // namespace longattn::cuda
