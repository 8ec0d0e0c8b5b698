// Backward of banded attention on Hopper, the pass for dK and dV: tiles of keys of one key head against the tiles of
// queries that meet them, one set of packed heads after the other.
//
// dV = sum over queries of P dO, dK = scale * sum of dS Q: rows are K and V, streamed are Q and dO with their RowStats,
// which a warp of its own brings. dK and dV are staged over K and V. Where a thread can't hold both sums (head dims
// above 128), two warpgroups share 64 keys, one for dK and one for dV, and each forms S. A tile of columns holds 64 >>
// packed_bits queries of 2^packed_bits heads. See window_attn_bwd_tile_sm90.cuh, and window_attn_bwd_span.cuh for
// sinks, whose sums beyond the band are formed before and added here.
#pragma once

#include "window_attn_bwd_span.cuh"
#include "window_attn_bwd_tile_sm90.cuh"

namespace longattn::cuda {

// A tile of keys and the queries of one set of heads.
template <class Traits>
struct alignas(16) KeyPlan {
  static constexpr int kCleared = -1;
  static constexpr bool kColumnStats = true, kInOrder = Traits::kInOrder;
  static_assert(Traits::kColumns == 64);

  HopperPlace place;
  Range span;     // the queries to walk
  int step_bits;  // log2 of the queries of a tile of columns
  HopperVisits groups[Traits::kRowGroups];
  Range seen_by[Traits::kRows];  // the queries that see each key
  Range sums[Traits::kRows];     // where each key's sums lie, with the last set of heads

  __device__ __forceinline__ static int parts(const HopperParams& p) { return p.parts; }
  __device__ __forceinline__ static int row_bits(const HopperParams&) { return 0; }
  __device__ __forceinline__ int count() const { return (span.end - span.begin + (1 << step_bits) - 1) >> step_bits; }
  __device__ __forceinline__ int begin(int t) const { return span.begin + (t << step_bits); }
  __device__ __forceinline__ static int written() { return 0; }
  __device__ __forceinline__ bool has_rows(const HopperParams& p, int group) const {
    return group * Traits::kGroupRows < p.attention.rows.num_keys - place.first_row;
  }
  // The tiles that hold some of these queries, or none but these.
  __device__ __forceinline__ Range touched_by(const Range& queries) const {
    if (queries.empty()) return {0, 0};
    return {(queries.begin - span.begin) >> step_bits, (queries.end - span.begin + (1 << step_bits) - 1) >> step_bits};
  }
  __device__ __forceinline__ Range within(const Range& queries) const {
    if (queries.empty()) return {0, 0};
    const int from = (queries.begin - span.begin + (1 << step_bits) - 1) >> step_bits;
    return {from, larger(from, (queries.end - span.begin) >> step_bits)};
  }
};

// Early keys, which most queries see where these are causal, come first.
template <class Traits>
__device__ __forceinline__ HopperPlace place_keys(const HopperParams& p, int tile, int set) {
  const int group = tile / p.tiles_of_heads, kv_head = group % p.attention.kv_heads;
  const int first_head = kv_head * (p.attention.heads / p.attention.kv_heads);
  return {group / p.attention.kv_heads, kv_head, tile % p.tiles_of_heads * Traits::kRows,
          first_head + (set << p.packed_bits)};
}

// What a warpgroup visits. Where rows are not ordered, all that there is, masked.
template <class Traits>
__device__ __forceinline__ void plan_keys_of_group(KeyPlan<Traits>& plan, int group, bool ordered) {
  HopperVisits& visits = plan.groups[group];
  visits = {{{0, 0}, {0, larger(plan.count(), 0)}}, {0, 0}};
  if (!ordered) return;
  const Range first = plan.seen_by[group * Traits::kGroupRows];
  const Range last = plan.seen_by[(group + 1) * Traits::kGroupRows - 1];
  visits.runs[1] = plan.touched_by({first.begin, last.end});
  visits.interior = plan.within({last.begin, first.end});
}

// The warp that plans, up to two plans ahead.
template <class Traits>
__device__ __forceinline__ void plan_keys(const HopperBackwardParams& p,
                                          const HopperShared<Traits, KeyPlan<Traits>>& shared) {
  using Shared = HopperShared<Traits, KeyPlan<Traits>>;
  const int lane = threadIdx.x % 32;
  visit_plans<KeyPlan<Traits>>(p, [&](int wave, int part, int turn) {
    const Ring<2> plans = place_in_ring<2>(turn);
    KeyPlan<Traits>& plan = shared.plan(plans.stage);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFree + plans.stage), plans.parity ^ 1);
    if (lane == 0) plan.place = place_keys<Traits>(p, tile_of_wave<KeyPlan<Traits>>(wave), part);
    __syncwarp();
    // Formed anew for each key: kept for all of them, they would take more registers than there are.
    const HopperPlace& place = plan.place;
    const auto band = [&] { return row_band(p.attention, place.batch, place.streamed_head); };
    const auto keys = [&] {
      return KeyPassBand<Traits::kRows, false>(p.attention, {place.batch, place.row_head, place.first_row, 0});
    };
    if (lane == 0) {
      plan.span = keys().span(band());
      plan.step_bits = 6 - p.packed_bits;
    }
#pragma unroll 1
    for (int i = lane; i < Traits::kRows; i += 32) plan.seen_by[i] = keys().queries_of(band(), place.first_row + i);
    if (p.sink_chunks > 0 && part + 1 == p.parts) {
#pragma unroll 1
      for (int i = lane; i < Traits::kRows; i += 32) plan.sums[i] = keys().sums_of(place.first_row + i);
    }
    __syncwarp();
    if (lane < Traits::kRowGroups) plan_keys_of_group(plan, lane, keys().is_ordered());
    __syncwarp();
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFull + plans.stage));
  });
}

// The warp that brings the RowStats of columns. Those of the next tile are on their way while it waits for room.
template <class Traits>
__device__ __forceinline__ void copy_stats(const HopperBackwardParams& p,
                                           const HopperShared<Traits, KeyPlan<Traits>>& shared) {
  using Shared = HopperShared<Traits, KeyPlan<Traits>>;
  const int lane = threadIdx.x % 32, heads = p.attention.heads, queries = p.attention.rows.num_queries;
  Ring<Traits::kStages> ring;
  visit_plans<KeyPlan<Traits>>(p, [&](int, int, int turn) {
    const Ring<2> plans = place_in_ring<2>(turn);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
    const KeyPlan<Traits>& plan = shared.plan(plans.stage);
    const int count = plan.count();
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      RowStats moved[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = lane + 32 * i, query = plan.begin(t) + (column >> p.packed_bits);
        const int head = plan.place.streamed_head + (column & ((1 << p.packed_bits) - 1));
        moved[i] = {0.0f, 0.0f};  // past the end, where Q and dO are zeros too and add nothing
        if (query < queries)
          moved[i] = p.stats[(static_cast<int64_t>(plan.place.batch) * heads + head) * queries + query];
      }
      simt::mbarrier_wait(shared.free(1, ring.stage), ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) shared.stats(ring.stage)[lane + 32 * i] = moved[i];
      __syncwarp();
      if (lane == 0) simt::mbarrier_arrive(shared.full(1, ring.stage));
      ring.advance();
    }
    __syncwarp();
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFree + plans.stage));
  });
}

// A warpgroup that sums dK, dV or both.
template <class Traits, bool kOfKeys, bool kOfValues>
struct KeyGradients : HopperGradients<Traits, KeyPlan<Traits>, kOfKeys, kOfValues> {
  using Plan = KeyPlan<Traits>;
  using Base = HopperGradients<Traits, Plan, kOfKeys, kOfValues>;
  using Base::Base, Base::p, Base::row, Base::row_group, Base::shared, Base::sum;
  static constexpr int kFirst = kOfKeys ? 0 : 1, kLast = kOfValues ? 1 : 0;  // outputs

  // Adds what sinks got from queries beyond the band.
  __device__ __forceinline__ void add_sink_sums(const Plan& plan, int half) {
    const auto [chunk, sink] = plan.sums[row_group() * Traits::kGroupRows + row() + 8 * half];
    if (chunk < 0) return;
    const int64_t set = static_cast<int64_t>(plan.place.batch) * p.attention.kv_heads + plan.place.row_head;
#pragma unroll
    for (int which = kFirst; which <= kLast; ++which) {
      const float* from =
          p.sink_sums + (((set * p.sink_chunks + chunk) * 2 + which) * p.sink_keys + sink) * p.attention.head_dim;
#pragma unroll
      for (int d = 0; d < Traits::kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int channel = 8 * d + 2 * static_cast<int>(threadIdx.x % 4) + i;
          if (channel < p.attention.head_dim) sum[which - kFirst][4 * d + 2 * half + i] += from[channel];
        }
    }
  }

  // What `differentiate` asks for, of the columns of a stage.
  __device__ __forceinline__ auto stats_of(uint32_t stage) const {
    const RowStats* of_columns = shared.stats(stage) + 2 * (threadIdx.x % 4);
    return [of_columns](int block, int, int i) { return of_columns[8 * block + i]; };
  }
  // What `mask` asks for, of the columns from `begin` on.
  __device__ __forceinline__ auto bits_of(const Plan& plan, int begin) const {
    const Range* seen_by = plan.seen_by + row_group() * Traits::kGroupRows + row();
    return [=, this](int half, int word) {
      const auto column = [&](int query) { return smaller(larger(query - begin, 0), 64) << p.packed_bits; };
      return Range{column(seen_by[8 * half].begin), column(seen_by[8 * half].end)}.bits(32 * word);
    };
  }
  template <bool kSinks>
  __device__ __forceinline__ void store(const Plan& plan) {
    this->template write<kFirst, kLast>(plan.place, [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kSinks && p.sink_chunks > 0) add_sink_sums(plan, half);
#pragma unroll
        for (int which = kFirst; which <= kLast; ++which)
          stage_row<Traits>(shared.memory + Base::Shared::rows(this->slot(this->wave), which), sum[which - kFirst],
                            half, row() + 8 * half, which == 0 ? p.attention.scale : 1.0f);
      }
    });
  }

  __device__ __forceinline__ void run() {
    const auto walk = [&](const Plan& plan) {
      Base::walk(
          plan, [&](uint32_t stage) { return stats_of(stage); }, [&](int begin) { return bits_of(plan, begin); });
    };
    Base::run([&](const Plan&) { this->start(); }, walk, [&](const Plan& plan) { store<true>(plan); });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    window_attn_bwd_key_sm90([[maybe_unused]] const __grid_constant__ HopperBackwardParams p) {
#ifdef SIMT_SM90A
  SIMT_SHARED_1024(memory);
  const HopperShared<Traits, KeyPlan<Traits>> shared(memory);
  run_hopper_block<Traits>(
      p, shared, [&] { plan_keys<Traits>(p, shared); }, [&] { copy_stats<Traits>(p, shared); },
      [&] {
        if constexpr (Traits::kRowGroups == Traits::kConsumers)
          KeyGradients<Traits, true, true>(p, shared).run();
        else if (simt::uniform(static_cast<int>(threadIdx.x) / 128) == 0)
          KeyGradients<Traits, true, false>(p, shared).run();
        else
          KeyGradients<Traits, false, true>(p, shared).run();
      });
#else
  simt::trap();
#endif
}

}  // namespace longattn::cuda
