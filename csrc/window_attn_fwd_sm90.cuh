// Forward of banded attention on Hopper's warpgroup products, after FlashAttention-3 (Shah et al., 2024,
// arXiv:2407.08608): a warp that copies, warpgroups that compute, and Q K^T of the next key tile in flight while the
// softmax of this one runs.
//
// A block stays on its multiprocessor and takes tiles of rows in turn, as window_attn_plan_sm90.cuh has them planned
// and copied. A warpgroup leaves out the key tiles that none of its own 64 rows sees, and masks only those at its
// edges, by bits. A finished tile's output is staged in the slot of its Q. Registers: O, S and the weights (kD / 2 + 32
// + 16 a thread).
#pragma once

#include "window_attn_plan_sm90.cuh"

namespace longattn::cuda {

// The rows of one warpgroup: sums in registers as wgmma leaves them, this lane's two rows being `half` 0 and 1.
template <class Traits>
struct HopperRows {
  static constexpr int kD = Traits::kD, kWidth = Traits::kBlockN / 2;
  using Type = typename Traits::Type;
  using Operand = simt::Operand<Traits::kRowBytes>;

  float out[kD / 2], s[kWidth];
  uint32_t weights[Traits::kBlockN / 16][4];
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

  // Issues S = Q K^T.
  __device__ __forceinline__ void multiply_keys(Operand query, Operand key) {
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      constexpr int kSteps = Traits::kPanelChannels / 16;
      const int bytes = c / kSteps * Traits::kPanelBytes + c % kSteps * 32;
      if (c == 0)
        simt::wgmma_ss<Type, false>(s, query.at(bytes), key.at(bytes));
      else
        simt::wgmma_ss<Type, true>(s, query.at(bytes), key.at(bytes));
    }
    simt::wgmma_commit();
  }

  // Issues O += weights V.
  __device__ __forceinline__ void multiply_values(Operand value) {
#pragma unroll
    for (int n = 0; n < Traits::kBlockN / 16; ++n)
      simt::wgmma_rs<Type>(out, weights[n], value.at(n * 16 * Traits::kRowBytes));
    simt::wgmma_commit();
  }

  // `visible` holds what the rows see, at the position of a row: (row >> bits).
  __device__ __forceinline__ void mask(const VisibleKeys* visible, int row, int bits, int first_key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const VisibleKeys seen = visible[(row + 8 * half) >> bits];
#pragma unroll
      for (int word = 0; word < Traits::kBlockN / 32; ++word) {
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
      for (int n = 0; n < Traits::kBlockN / 8; ++n)
        top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
      top = fmaxf(top, simt::shfl_xor(top, 1));
      top = fmaxf(top, simt::shfl_xor(top, 2));
      const float base = top == -INFINITY ? 0.0f : top * factor;
      shrink[half] = simt::exp2_fast(maximum[half] * factor - base);
      risen |= top > maximum[half];
      maximum[half] = top;
      sum[half] *= shrink[half];
#pragma unroll
      for (int n = 0; n < Traits::kBlockN / 8; ++n)
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
    for (int n = 0; n < Traits::kBlockN / 16; ++n)
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
    const float scale = total > 0.0f ? weight / total : 0.0f;
    constexpr int kChunks = Traits::kRowBytes / 16;
    const int mix = kChunks == 8 ? row & 7 : (row >> 1) & 3;
    unsigned char* to = tile + row * Traits::kRowBytes + threadIdx.x % 4 * 4;
#pragma unroll
    for (int d = 0; d < kD / 8; ++d)
      *reinterpret_cast<uint32_t*>(to + d / kChunks * Traits::kPanelBytes + (d % kChunks ^ mix) * 16) =
          Type::pack(out[4 * d + 2 * half] * scale, out[4 * d + 2 * half + 1] * scale);
    return total > 0.0f ? (base + log2f(total)) * kLn2 : -INFINITY;
  }
};

// A warpgroup that computes.
template <class Traits>
struct HopperConsumer {
  using Shared = HopperShared<Traits>;
  using Plan = HopperPlan<Traits::kConsumers>;
  using Operand = simt::Operand<Traits::kRowBytes>;

  const HopperParams& p;
  const Shared& shared;
  const int group, lane;
  const Logits logits;
  Ring<Traits::kStages> ring;  // of the next key tile
  int wave = 0;
  bool output_leaves = false;  // this warpgroup's last output may still be read from its slot
  HopperRows<Traits> rows;

  __device__ __forceinline__ HopperConsumer(const HopperParams& p, const Shared& shared)
      : p(p),
        shared(shared),
        group(simt::uniform(static_cast<int>(threadIdx.x) / 128)),
        lane(threadIdx.x % 32),
        logits(p.attention) {}

  __device__ __forceinline__ void wait_for(int kind, const Ring<Traits::kStages>& at) const {
    simt::mbarrier_wait(shared.barrier(kind + at.stage), at.parity);
  }
  __device__ __forceinline__ void release(int kind, const Ring<Traits::kStages>& at) const {
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(kind + at.stage));
  }
  // The slot of this warpgroup's Q, counted over all of them.
  __device__ __forceinline__ int slot(int turn) const {
    return static_cast<int>(place_in_ring<Traits::kQueryStages>(turn).stage) * Traits::kConsumers + group;
  }
  // The first row of this lane, of its warpgroup's; formed anew where it is needed, as registers are scarce.
  __device__ __forceinline__ int row() const { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
  __device__ __forceinline__ int first_position() const { return group * Traits::kGroupRows >> p.packed_bits; }
  __device__ __forceinline__ bool is_first_thread() const { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ void issue_keys(Operand query) {
    wait_for(Shared::kKeyFull, ring);
    simt::wgmma_fence();
    rows.multiply_keys(query, Operand(shared.key(ring.stage)));
  }
  __device__ __forceinline__ void issue_values(const Ring<Traits::kStages>& at) {
    wait_for(Shared::kValueFull, at);
    simt::wgmma_fence();
    rows.multiply_values(Operand(shared.value(at.stage), Traits::kPanelBytes));
  }
  __device__ __forceinline__ void softmax(const Plan& plan, int t) {
    if (logits.kind == Logits::kCapped) {
#pragma unroll
      for (float& x : rows.s) x = logits.capped(x);
    } else if (logits.kind == Logits::kScaled) {
#pragma unroll
      for (float& x : rows.s) x = logits.scaled(x);
    }
    if (!simt::uniform(plan.groups[group].interior.holds(t)))
      rows.mask(plan.visible + first_position(), row(), p.packed_bits, plan.tiles.begin(t));
    rows.exponentiate(logits.factor);
  }

  // A key tile that none of these rows sees: passed on once it is there, so that no barrier is two rounds ahead of a
  // lane that still looks at it.
  __device__ __forceinline__ void skip() {
    wait_for(Shared::kKeyFull, ring);
    wait_for(Shared::kValueFull, ring);
    __syncwarp();
    release(Shared::kKeyFree, ring);
    release(Shared::kValueFree, ring);
    ring.advance();
  }

  // The slot of the output of a turn may be filled again.
  __device__ __forceinline__ void release_output(int turn) {
    if (!output_leaves) return;
    output_leaves = false;
    if (is_first_thread()) {
      simt::store_wait_read();
      simt::mbarrier_arrive(shared.barrier(Shared::kQueryFree + slot(turn)));
    }
    __syncwarp();
  }

  // Once the values of the tile before are multiplied, and may be replaced.
  __device__ __forceinline__ void take_weights(bool multiplied) {
    simt::wgmma_wait<0>(rows.out);
    if (multiplied) release(Shared::kValueFree, ring.back(2));
    rows.take_weights();
  }

  // Walks the key tiles.
  __device__ __forceinline__ void walk(const Plan& plan) {
    const Operand query(shared.base + slot(wave) * Traits::kTileBytes);
    int t = 0;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const Range run = plan.groups[group].runs[i];
      const int begin = simt::uniform(run.begin), end = simt::uniform(run.end);
      if (t >= end) continue;
#pragma unroll 1
      for (; t < begin; ++t) skip();
      // The softmax ends where the loop turns, so that the compiler can't have it wait for the products of values.
      issue_keys(query);
      simt::wgmma_wait<0>(rows.s);
      release(Shared::kKeyFree, ring);
      softmax(plan, t);
      if constexpr (Traits::kQueryStages > 1) release_output(wave - 1);
      ring.advance();
      bool multiplied = false;  // values of the tile before the last
#pragma unroll 1
      for (++t; t < end; ++t) {
        take_weights(multiplied);
        issue_keys(query);
        issue_values(ring.back(1));
        simt::wgmma_wait<1>(rows.s);
        release(Shared::kKeyFree, ring);
        ring.advance();
        multiplied = true;
        softmax(plan, t);
      }
      take_weights(multiplied);
      issue_values(ring.back(1));
      simt::wgmma_wait<0>(rows.out);
      release(Shared::kValueFree, ring.back(1));
    }
    const int count = simt::uniform(plan.tiles.count());
#pragma unroll 1
    for (; t < count; ++t) skip();
  }

  // Writes the log-sum-exp, stages O in the slot of Q and has it copied out.
  __device__ __forceinline__ void write(const Plan& plan) {
    const AttentionParams& attention = p.attention;
    const int offset = slot(wave) * Traits::kTileBytes, first_row = group * Traits::kGroupRows;
    simt::sync_warpgroup(1 + group);  // all have multiplied Q, which is written over
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed_row = first_row + row() + 8 * half;
      const int query = plan.first_query + (packed_row >> p.packed_bits);
      const int head = plan.head + (packed_row & ((1 << p.packed_bits) - 1));
      const float sink = attention.sink_logits ? attention.sink_logits[head] * kLog2E : -INFINITY;
      const float lse = rows.finish(half, shared.memory + offset, row() + 8 * half, logits.factor, sink);
      if (lane % 4 == 0 && query < attention.rows.num_queries)
        attention
            .lse[(static_cast<int64_t>(plan.batch) * attention.heads + head) * attention.rows.num_queries + query] =
            lse;
    }
    simt::fence_async_proxy();
    simt::sync_warpgroup(1 + group);  // the whole output is staged
    if (is_first_thread()) {
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel)
        simt::store_box(
            shared.base + offset + panel * Traits::kPanelBytes, p.out,
            {panel * Traits::kPanelChannels, plan.head, plan.first_query + (first_row >> p.packed_bits), plan.batch});
      simt::store_commit();
    }
    output_leaves = true;
  }

  __device__ __forceinline__ void run() {
    const int positions = Traits::kRows >> p.packed_bits;
#pragma unroll 1
    for (; tile_of_wave(wave) < p.tiles_in_total; ++wave) {
      const Ring<2> plans = place_in_ring<2>(wave);
      simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
      const Plan& plan = shared.plan(plans.stage);
      const int there = smaller(p.attention.rows.num_queries - plan.first_query, positions);
      const bool real = simt::uniform(first_position() < there);
      rows.start();
      simt::mbarrier_wait(shared.barrier(Shared::kQueryFull + slot(wave)),
                          place_in_ring<Traits::kQueryStages>(wave).parity);
      walk(plan);
      if constexpr (Traits::kQueryStages > 1) release_output(wave - 1);
      if (real) {
        write(plan);
      } else {
        simt::sync_warpgroup(1 + group);  // all have seen Q come: else a slot filled twice would be waited for in vain
        if (is_first_thread()) simt::mbarrier_arrive(shared.barrier(Shared::kQueryFree + slot(wave)));
      }
      __syncwarp();
      if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFree + place_in_ring<2>(wave).stage));
      if constexpr (Traits::kQueryStages == 1) release_output(wave);
    }
    if (output_leaves && is_first_thread()) simt::store_wait_read();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    window_attn_fwd_sm90([[maybe_unused]] const __grid_constant__ HopperParams p) {
#ifdef SIMT_SM90A
  SIMT_SHARED_1024(memory);
  const HopperShared<Traits> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (simt::uniform(static_cast<int>(threadIdx.x) / 128) == Traits::kConsumers) {
    simt::shrink_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 128 * Traits::kConsumers) copy_tiles<Traits>(p, shared);
    if (threadIdx.x / 32 == 4 * Traits::kConsumers + 1) plan_tiles<Traits>(p, shared);
  } else {
    simt::grow_registers<Traits::kConsumerRegisters>();
    HopperConsumer<Traits>(p, shared).run();
  }
#endif
}

}  // namespace longattn::cuda
