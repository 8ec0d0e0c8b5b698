// What both passes of the backward for compute capability 9.0 share: a warpgroup's 64 rows against tiles of 64 columns.
//
// Rows are queries (Q, dO) and columns keys (K, V) in the pass for dQ; rows are keys (K, V) and columns queries (Q, dO)
// in the pass for dK and dV. The product of the first of each gives the logits, from which the weights P follow by the
// saved log-sum-exp, that of the second dP, and dS = P (dP - delta). The sums are dS times the first streamed tensor
// (dQ, dK) and P times the second (dV); a warpgroup has the one, the other or both. dS and P go from registers into the
// products. While a warpgroup forms them, the products of the others run: a tile takes four times as long to multiply
// as in the forward, or three, and as many exponentials, so that two of them keep the tensor cores busy. Registers:
// kSums * kD / 2 + kColumns a thread, as the weights take the place of what they are formed from.
#pragma once

#include "window_attn_ring_sm90.cuh"

namespace longattn::cuda {

struct HopperBackwardParams : HopperParams {
  const RowStats* stats;   // [B, heads, num_queries]
  const float* sink_sums;  // as BackwardParams has them
  int sink_keys, sink_chunks;
};

// kOfLogits: the sum of dS times the first streamed tensor; kOfValues: that of P times the second.
template <class Traits, class Plan, bool kOfLogits, bool kOfValues>
struct HopperGradients : HopperConsumer<Traits, Plan, HopperBackwardParams> {
  using Base = HopperConsumer<Traits, Plan, HopperBackwardParams>;
  using Base::Base, Base::p, Base::shared, Base::logits, Base::ring, Base::wave;
  using Base::release, Base::slot, Base::wait_for;
  using typename Base::Operand, typename Base::Shared;
  static constexpr int kSums = kOfLogits + kOfValues, kWidth = Traits::kColumns / 2;

  float sum[kSums][Traits::kD / 2];
  float s[kWidth], dp[kWidth];
  HopperWeights<Traits> weights[kSums];  // dS, then P

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int which = 0; which < kSums; ++which)
#pragma unroll
      for (float& x : sum[which]) x = 0.0f;
  }

  // Forms the weights from s and dp. stats(block, half, i) gives the RowStats of element i of this lane's two in a
  // block of 8 columns and one of its two rows.
  template <typename Stats>
  __device__ __forceinline__ void differentiate(const Stats& stats) {
    if (logits.kind == Logits::kCapped) {
#pragma unroll
      for (float& x : s) x = logits.capped(x);
      form_weights<true>(stats);
      return;
    }
    if (logits.kind == Logits::kScaled) {
#pragma unroll
      for (float& x : s) x = logits.scaled(x);
    }
    form_weights<false>(stats);
  }

  // Clears what row `half` of this lane does not see: bits(half, word) holds its sight of the 32 columns of a word. No
  // NaN of a column that nobody sees remains.
  template <typename Bits>
  __device__ __forceinline__ void mask(const Bits& bits) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int word = 0; word < Traits::kColumns / 32; ++word) {
        const uint32_t seen = bits(half, word) >> 2 * (threadIdx.x % 4);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t pair = (seen >> 8 * n & 1 ? 0xffffu : 0u) | (seen >> 8 * n & 2 ? 0xffff0000u : 0u);
          const int block = 4 * word + n;
#pragma unroll
          for (int which = 0; which < kSums; ++which) weights[which][block / 2][block % 2 * 2 + half] &= pair;
        }
      }
  }

  // Walks the plan's tiles. stats(stage) gives what `differentiate` asks for, bits(begin) what `mask` does.
  template <typename Stats, typename Bits>
  __device__ __forceinline__ void walk(const Plan& plan, const Stats& stats, const Bits& bits) {
    const Operand first(shared.base + Shared::rows(slot(wave), 0)), second(shared.base + Shared::rows(slot(wave), 1));
    this->visit_runs(plan, [&](int& t, int end) {
#pragma unroll 1
      for (; t < end; ++t) {
        multiply_rows(first, second);
        differentiate(stats(ring.stage));
        if (!this->is_interior(plan, t)) mask(bits(plan.begin(t)));
        add_products();
        ring.advance();
        this->release_last_output();
      }
    });
  }

 protected:
  // The streamed tensor that this warpgroup needs no more once s and dp are there, -1 for none.
  static constexpr int kPassedOnEarly = !kOfLogits ? 0 : kOfValues || Plan::kColumnStats ? -1 : 1;

  __device__ __forceinline__ void multiply_rows(Operand first, Operand second) {
    wait_for(0, ring);
    simt::wgmma_fence();
    multiply_columns<Traits>(s, first, this->columns(0, ring));
    if constexpr (kOfLogits) {
      wait_for(1, ring);
      simt::wgmma_fence();
      multiply_columns<Traits>(dp, second, this->columns(1, ring));
    }
    simt::wgmma_commit();
    if constexpr (kOfLogits)
      simt::wgmma_wait<0>(s, dp);
    else
      simt::wgmma_wait<0>(s);
    if constexpr (kPassedOnEarly >= 0) release(kPassedOnEarly, ring);
    if constexpr (!kOfLogits) wait_for(1, ring);  // the columns' statistics are behind it
  }
  __device__ __forceinline__ void add_products() {
    simt::wgmma_fence();
#pragma unroll
    for (int which = 0; which < kSums; ++which)
      multiply_weights<Traits>(sum[which], weights[which], this->weighted(kOfLogits ? which : 1, ring));
    simt::wgmma_commit();
    simt::wgmma_wait<0>(sum[0], sum[kSums - 1]);
    __syncwarp();  // all lanes have read the columns' statistics
    if constexpr (kPassedOnEarly != 0) release(0, ring);
    if constexpr (kPassedOnEarly != 1) release(1, ring);
  }

  template <bool kCapped, typename Stats>
  __device__ __forceinline__ void form_weights(const Stats& stats) {
#pragma unroll
    for (int block = 0; block < Traits::kColumns / 8; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float p_of[2], ds[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const RowStats own = stats(block, half, i);
          const float x = s[4 * block + 2 * half + i], slope = kCapped ? 1.0f - x * x : 1.0f;
          p_of[i] = simt::exp2_fast(x * logits.factor - own.lse2);
          if constexpr (kOfLogits) ds[i] = p_of[i] * (dp[4 * block + 2 * half + i] - own.delta) * slope;
        }
        const int n = block / 2, at = block % 2 * 2 + half;
        if constexpr (kOfLogits) weights[0][n][at] = Traits::Type::pack(ds[0], ds[1]);
        if constexpr (kOfValues) weights[kSums - 1][n][at] = Traits::Type::pack(p_of[0], p_of[1]);
      }
  }
};

}  // namespace longattn::cuda
