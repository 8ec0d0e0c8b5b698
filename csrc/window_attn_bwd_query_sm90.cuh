// Backward of banded attention on Hopper, the pass for dQ: tiles of queries as the forward plans them, against their
// key tiles.
//
// dQ = scale * sum over keys of dS K: rows are Q and dO, streamed are K and V, and dQ is staged over Q. See
// window_attn_bwd_tile_sm90.cuh.
#pragma once

#include "window_attn_bwd_tile_sm90.cuh"
#include "window_attn_plan_sm90.cuh"

namespace longattn::cuda {

template <class Traits>
using QueryGradientPlan = QueryPlan<Traits::kConsumers, 0>;  // K is what weights are multiplied with

template <class Traits>
struct QueryGradients : HopperGradients<Traits, QueryGradientPlan<Traits>, true, false> {
  using Plan = QueryGradientPlan<Traits>;
  using Base = HopperGradients<Traits, Plan, true, false>;
  using Base::Base, Base::p, Base::group, Base::row, Base::shared;
  RowStats own[2];  // of this lane's rows

  __device__ __forceinline__ void load_stats(const HopperPlace& place) {
    const int heads = p.attention.heads, queries = p.attention.rows.num_queries;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed_row = group * Traits::kGroupRows + row() + 8 * half;
      const int head = place.row_head + (packed_row & ((1 << p.packed_bits) - 1));
      const int query =
          smaller(place.first_row + (packed_row >> p.packed_bits), queries - 1);  // nothing is stored past it
      own[half] = p.stats[(static_cast<int64_t>(place.batch) * heads + head) * queries + query];
    }
  }

  __device__ __forceinline__ void run() {
    const auto start = [&](const Plan& plan) {
      load_stats(plan.place);
      this->start();
    };
    const auto walk = [&](const Plan& plan) {
      const VisibleKeys* visible = plan.visible + Plan::first_position(p, group);
      const auto stats = [&](uint32_t) { return [&](int, int half, int) { return own[half]; }; };
      const auto bits = [&](int begin) {
        return [=, this](int half, int word) {
          return visible[(row() + 8 * half) >> p.packed_bits].bits(begin + 32 * word);
        };
      };
      Base::walk(plan, stats, bits);
    };
    const auto end = [&](const Plan& plan) {
      this->template write<0, 0>(plan.place, [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          stage_row<Traits>(shared.memory + Base::Shared::rows(this->slot(this->wave), 0), this->sum[0], half,
                            row() + 8 * half, p.attention.scale);
      });
    };
    Base::run(start, walk, end);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    window_attn_bwd_query_sm90([[maybe_unused]] const __grid_constant__ HopperBackwardParams p) {
#ifdef SIMT_SM90A
  SIMT_SHARED_1024(memory);
  const HopperShared<Traits, QueryGradientPlan<Traits>> shared(memory);
  run_hopper_block<Traits>(
      p, shared, [&] { plan_queries<Traits>(p, shared); }, [] {}, [&] { QueryGradients<Traits>(p, shared).run(); });
#else
  simt::trap();
#endif
}

}  // namespace longattn::cuda
