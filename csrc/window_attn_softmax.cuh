// The online softmax of one warp over tiles of keys, in registers: shared by the forward and by decoding.
//
// FlashAttention-2 (Dao, 2023, arXiv:2307.08691). Registers: O and S in fp32 (kRowBlocks * (kD + kKeys) / 2 a thread);
// P goes from S to the A operand directly.
#pragma once

#include <cmath>

#include "window_attn_logits.cuh"
#include "window_attn_tile.cuh"

namespace longattn::cuda {

// kRowBlocks * 16 rows of queries against kKeys keys of a tile.
template <typename Type, int kD, int kKeys, int kRowBlocks>
struct SoftmaxWarp {
  static_assert(kKeys == 16 || kKeys % 32 == 0, "edge masks are words of 32 keys");

  float out[kRowBlocks][kD / 8][4];
  float maximum[kRowBlocks][2], sum[kRowBlocks][2];  // of this lane's rows; sum of its own columns only
  float s[kRowBlocks][kKeys / 8][4];
  FragmentAddress<kD> query, key;
  uint32_t to_value;  // from a fragment of the warp's rows of Q to that of its keys in V

  // The warp's first row of Q, and its first key in K and V.
  __device__ __forceinline__ SoftmaxWarp(unsigned char* q, int row, unsigned char* k, unsigned char* v, int first_key,
                                         int lane)
      : query(simt::smem_address(q), row + lane % 16, lane / 16),
        key(simt::smem_address(k), first_key + lane % 8 + lane / 16 * 8, lane / 8 % 2),
        to_value(static_cast<uint32_t>(v - q) + (first_key - row) * TileLayout<kD>::kRowBytes) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[r][i] = -INFINITY;
        sum[r][i] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[r][d][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply_keys(uint32_t tile_offset = 0) {
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) simt::ldmatrix_x4(a[r], query.at(c, 16 * r));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        simt::ldmatrix_x4(b, key.at(c, 16 * n) + tile_offset);
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) {
          if (c == 0) {
            simt::mma_set(Type, s[r][2 * n], a[r], b[0], b[1]);
            simt::mma_set(Type, s[r][2 * n + 1], a[r], b[2], b[3]);
          } else {
            simt::mma_add(Type, s[r][2 * n], a[r], b[0], b[1]);
            simt::mma_add(Type, s[r][2 * n + 1], a[r], b[2], b[3]);
          }
        }
      }
    }
  }

  template <bool kCapped>
  __device__ __forceinline__ void form_logits(const Logits& logits) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[r][n][i] = kCapped ? logits.capped(s[r][n][i]) : logits.scaled(s[r][n][i]);
  }

  // `visible` holds what the warp's rows see.
  __device__ __forceinline__ void mask(const VisibleKeys* visible, int first_key, int lane) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const VisibleKeys seen = visible[16 * r + 8 * half + lane / 4];
#pragma unroll
        for (int word = 0; word < (kKeys + 31) / 32; ++word) {
          const uint32_t bits = seen.bits(first_key + 32 * word) >> 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < smaller(4, kKeys / 8); ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!(bits >> (8 * n + i) & 1)) s[r][4 * word + n][2 * half + i] = -INFINITY;
        }
      }
  }

  // s becomes exp(s - maximum), and all that was summed before is scaled to the new maximum.
  __device__ __forceinline__ void exponentiate(float factor) {
    float shrink[kRowBlocks][2];
    bool risen = false;
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = maximum[r][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
        top = fmaxf(top, simt::shfl_xor(top, 1));
        top = fmaxf(top, simt::shfl_xor(top, 2));
        const float base = top == -INFINITY ? 0.0f : top * factor;
        shrink[r][half] = simt::exp2_fast(maximum[r][half] * factor - base);
        risen |= top > maximum[r][half];
        maximum[r][half] = top;
        sum[r][half] *= shrink[r][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[r][n][i] = simt::exp2_fast(s[r][n][i] * factor - base);
            sum[r][half] += s[r][n][i];
          }
      }
    if (!simt::any_lane(risen)) return;
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int d = 0; d < kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[r][d][i] *= shrink[r][i / 2];
  }

  __device__ __forceinline__ void multiply_values(uint32_t tile_offset = 0) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[r][i] = Type::pack(s[r][2 * n + i / 2][2 * (i % 2)], s[r][2 * n + i / 2][2 * (i % 2) + 1]);
#pragma unroll
      for (int c = 0; c < kD / 16; ++c) {
        uint32_t b[4];
        simt::ldmatrix_x4_trans(b, query.at(c, 16 * n) + to_value + tile_offset);
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) {
          simt::mma_add(Type, out[r][2 * c], a[r], b[0], b[1]);
          simt::mma_add(Type, out[r][2 * c + 1], a[r], b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace longattn::cuda
