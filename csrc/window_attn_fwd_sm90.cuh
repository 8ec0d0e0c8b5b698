// Forward of banded attention on Hopper's warpgroup products, after FlashAttention-3 (Shah et al., 2024,
// arXiv:2407.08608): a warp that copies, warpgroups that compute, and Q K^T of the next key tile in flight while the
// softmax of this one runs.
//
// Tiles of queries are planned by window_attn_plan_sm90.cuh and copied by window_attn_ring_sm90.cuh. A warpgroup leaves
// out the key tiles that none of its own 64 rows sees, and masks only those at its edges, by bits. A finished tile's
// output is staged in the slot of its Q. Registers: O, S and the weights (kD / 2 + 32
// + 16 a thread).
#pragma once

#include "window_attn_plan_sm90.cuh"

namespace longattn::cuda {

// The rows of one warpgroup: sums in registers as wgmma leaves them, this lane's two rows being `half` 0 and 1.
template <class Traits>
struct HopperRows {
  static constexpr int kD = Traits::kD, kWidth = Traits::kColumns / 2;
  using Type = typename Traits::Type;
  float out[kD / 2], s[kWidth];
  HopperWeights<Traits> weights;
  float maximum[2], sum[2], shrink[2];
  bool risen;

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[half] = -INFINITY;
      sum[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] = 0.0f;
  }

  // `visible` holds what the rows see, at the position of a row: (row >> bits).
  __device__ __forceinline__ void mask(const VisibleKeys* visible, int row, int bits, int first_key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const VisibleKeys seen = visible[(row + 8 * half) >> bits];
#pragma unroll
      for (int word = 0; word < Traits::kColumns / 32; ++word) {
        const uint32_t seen_bits = seen.bits(first_key + 32 * word) >> 2 * (threadIdx.x % 4);
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (!(seen_bits >> (8 * n + i) & 1)) s[4 * (4 * word + n) + 2 * half + i] = -INFINITY;
      }
    }
  }

  // s becomes exp(s - maximum); `shrink` is what all that was summed before has yet to be multiplied by.
  __device__ __forceinline__ void exponentiate(float factor) {
    risen = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = maximum[half];
#pragma unroll
      for (int n = 0; n < Traits::kColumns / 8; ++n)
        top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
      top = fmaxf(top, simt::shfl_xor(top, 1));
      top = fmaxf(top, simt::shfl_xor(top, 2));
      const float base = top == -INFINITY ? 0.0f : top * factor;
      shrink[half] = simt::exp2_fast(maximum[half] * factor - base);
      risen |= top > maximum[half];
      maximum[half] = top;
      sum[half] *= shrink[half];
#pragma unroll
      for (int n = 0; n < Traits::kColumns / 8; ++n)
#pragma unroll
        for (int i = 4 * n + 2 * half; i < 4 * n + 2 * half + 2; ++i) {
          s[i] = simt::exp2_fast(s[i] * factor - base);
          sum[half] += s[i];
        }
    }
  }

  // Once the products with the last weights are done: brings O to the new maximum and takes over the new weights.
  __device__ __forceinline__ void take_weights() {
    if (simt::any_lane(risen)) {
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) out[i] *= shrink[i / 2 % 2];
    }
#pragma unroll
    for (int n = 0; n < Traits::kColumns / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[n][i] = Type::pack(s[8 * n + 4 * (i / 2) + 2 * (i % 2)], s[8 * n + 4 * (i / 2) + 2 * (i % 2) + 1]);
  }

  // Divides by the denominator, which the sink logit (base 2, -inf for none) joins, and writes the row to its panels;
  // returns the log-sum-exp.
  __device__ __forceinline__ float finish(int half, unsigned char* tile, int row, float factor, float sink) {
    float total = sum[half];
    total += simt::shfl_xor(total, 1);
    total += simt::shfl_xor(total, 2);
    const float own = maximum[half] * factor, top = fmaxf(own, sink), base = top == -INFINITY ? 0.0f : top;
    const float weight = simt::exp2_fast(own - base);
    total = total * weight + simt::exp2_fast(sink - base);
    const float scale = total == 0.0f ? 0.0f : weight / total;
    stage_row<Traits>(tile, out, half, row, scale);
    return total == 0.0f ? -INFINITY : (base + log2f(total)) * kLn2;
  }
};

// A warpgroup that computes.
template <class Traits, class Plan>
struct ForwardConsumer : HopperConsumer<Traits, Plan, HopperParams> {
  using Base = HopperConsumer<Traits, Plan, HopperParams>;
  using Base::Base, Base::p, Base::shared, Base::group, Base::lane, Base::logits, Base::ring, Base::wave;
  using Base::release, Base::row, Base::slot, Base::wait_for;
  using typename Base::Operand, typename Base::Shared;
  HopperRows<Traits> rows;

  __device__ __forceinline__ void issue_keys(Operand query) {
    wait_for(0, ring);
    simt::wgmma_fence();
    multiply_columns<Traits>(rows.s, query, this->columns(0, ring));
    simt::wgmma_commit();
  }
  __device__ __forceinline__ void issue_values(const Ring<Traits::kStages>& at) {
    wait_for(1, at);
    simt::wgmma_fence();
    multiply_weights<Traits>(rows.out, rows.weights, this->weighted(1, at));
    simt::wgmma_commit();
  }
  __device__ __forceinline__ void softmax(const Plan& plan, int t) {
    if (logits.kind == Logits::kCapped) {
#pragma unroll
      for (float& x : rows.s) x = logits.capped(x);
    } else if (logits.kind == Logits::kScaled) {
#pragma unroll
      for (float& x : rows.s) x = logits.scaled(x);
    }
    if (!this->is_interior(plan, t))
      rows.mask(plan.visible + Plan::first_position(p, group), row(), p.packed_bits, plan.begin(t));
    rows.exponentiate(logits.factor);
  }

  // Once the values of the tile before are multiplied, and may be replaced.
  __device__ __forceinline__ void take_weights(bool multiplied) {
    simt::wgmma_wait<0>(rows.out);
    if (multiplied) release(1, ring.back(2));
    rows.take_weights();
  }

  // Walks the key tiles.
  __device__ __forceinline__ void walk(const Plan& plan) {
    const Operand query(shared.base + Shared::rows(slot(wave), 0));
    this->visit_runs(plan, [&](int& t, int end) {
      // The softmax ends where the loop turns, so that the compiler can't have it wait for the products of values.
      issue_keys(query);
      simt::wgmma_wait<0>(rows.s);
      release(0, ring);
      softmax(plan, t);
      this->release_last_output();
      ring.advance();
      bool multiplied = false;  // values of the tile before the last
#pragma unroll 1
      for (++t; t < end; ++t) {
        take_weights(multiplied);
        issue_keys(query);
        issue_values(ring.back(1));
        simt::wgmma_wait<1>(rows.s);
        release(0, ring);
        ring.advance();
        multiplied = true;
        softmax(plan, t);
      }
      take_weights(multiplied);
      issue_values(ring.back(1));
      simt::wgmma_wait<0>(rows.out);
      release(1, ring.back(1));
    });
  }

  // Writes the log-sum-exp, stages O in the slot of Q and has it copied out.
  __device__ __forceinline__ void finish(const Plan& plan) {
    const AttentionParams& attention = p.attention;
    this->template write<0, 0>(plan.place, [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int packed_row = group * Traits::kGroupRows + row() + 8 * half;
        const int query = plan.place.first_row + (packed_row >> p.packed_bits);
        const int head = plan.place.row_head + (packed_row & ((1 << p.packed_bits) - 1));
        const float sink = attention.sink_logits ? attention.sink_logits[head] * kLog2E : -INFINITY;
        const float lse =
            rows.finish(half, shared.memory + Shared::rows(slot(wave), 0), row() + 8 * half, logits.factor, sink);
        const int64_t first =
            (static_cast<int64_t>(plan.place.batch) * attention.heads + head) * attention.rows.num_queries;
        if (lane % 4 == 0 && query < attention.rows.num_queries) attention.lse[first + query] = lse;
      }
    });
  }

  __device__ __forceinline__ void run() {
    Base::run([&](const Plan&) { rows.start(); }, [&](const Plan& plan) { walk(plan); },
              [&](const Plan& plan) { finish(plan); });
  }
};

template <class Traits>
using ForwardPlanned = QueryPlan<Traits::kConsumers, 1>;  // V is what weights are multiplied with

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    window_attn_fwd_sm90([[maybe_unused]] const __grid_constant__ HopperParams p) {
#ifdef SIMT_SM90A
  using Plan = ForwardPlanned<Traits>;
  SIMT_SHARED_1024(memory);
  const HopperShared<Traits, Plan> shared(memory);
  run_hopper_block<Traits>(
      p, shared, [&] { plan_queries<Traits>(p, shared); }, [] {},
      [&] { ForwardConsumer<Traits, Plan>(p, shared).run(); });
#else
  simt::trap();
#endif
}

}  // namespace longattn::cuda
