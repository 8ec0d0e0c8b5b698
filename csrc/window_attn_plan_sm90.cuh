// Plans of tiles whose rows are queries, or queries by heads that share keys (2^packed_bits of them, neighbours, so
// that K and V are read once for all), for the forward and for dQ: what each position sees, which key tiles that makes,
// which of them each warpgroup visits.
#pragma once

#include "window_attn_ring_sm90.cuh"

namespace longattn::cuda {

// kCleared_: the streamed tensor (0: K, 1: V) that weights are multiplied with.
template <int kConsumers, int kCleared_>
struct alignas(16) QueryPlan {
  static constexpr int kCleared = kCleared_;
  static constexpr bool kColumnStats = false, kInOrder = false;

  HopperPlace place;
  KeyTiles tiles;
  int keys_written;  // that surely exist
  HopperVisits groups[kConsumers];
  VisibleKeys visible[64 * kConsumers];

  __device__ __forceinline__ static int parts(const HopperParams&) { return 1; }
  __device__ __forceinline__ static int row_bits(const HopperParams& p) { return p.packed_bits; }
  __device__ __forceinline__ int count() const { return tiles.count(); }
  __device__ __forceinline__ int begin(int t) const { return tiles.begin(t); }
  __device__ __forceinline__ int written() const { return keys_written; }
  // The first position of a warpgroup, of the tile's.
  __device__ __forceinline__ static int first_position(const HopperParams& p, int group) {
    return group * 64 >> p.packed_bits;
  }
  __device__ __forceinline__ bool has_rows(const HopperParams& p, int group) const {
    return first_position(p, group) < p.attention.rows.num_queries - place.first_row;
  }
};

// Sets of heads that share keys are neighbours, and late queries, whose causal rows are the longest, come first.
template <class Traits>
__device__ __forceinline__ HopperPlace place_queries(const HopperParams& p, int tile) {
  const int ratio = p.attention.heads / p.attention.kv_heads, sets = ratio >> p.packed_bits;
  const int set = tile % sets, tile_of_key_head = tile / sets, row_head = tile_of_key_head / p.tiles_of_heads;
  const int kv_head = row_head % p.attention.kv_heads;
  return {row_head / p.attention.kv_heads, kv_head * ratio + (set << p.packed_bits),
          (p.tiles_of_heads - 1 - tile_of_key_head % p.tiles_of_heads) * (Traits::kRows >> p.packed_bits), kv_head};
}

// Keys that surely exist: all but slots of a cache that are not written yet, and copies fill up what lies past the
// last.
__device__ __forceinline__ int written_keys(const Rows& rows, const RowBand& band) {
  if (!rows.kv_end) return static_cast<int>(kMostIndex);
  return static_cast<int>(larger<int64_t>(0, smaller<int64_t>(band.stop - rows.key_start, rows.num_keys)));
}

// The key tiles of a warpgroup, from what its first and last row see: those that hold sinks, then those of the band.
// `there` is how many positions the tile has.
template <class Plan>
__device__ __forceinline__ void plan_group(Plan& plan, const HopperParams& p, const KeyTiles& tiles, int group,
                                           int there) {
  const int from = Plan::first_position(p, group), to = smaller(Plan::first_position(p, group + 1), there);
  if (to <= from) {
    plan.groups[group] = {};
    return;
  }
  const VisibleKeys first = plan.visible[from], last = plan.visible[to - 1];
  Range sinks = tiles.touched_by(first.sinks);
  Range band = tiles.touched_by({first.band.begin, larger(first.band.begin, last.band.end)});
  if (sinks.empty()) sinks = {0, 0};
  if (band.empty()) band = {0, 0};
  if (!sinks.empty() && !band.empty() && sinks.end >= band.begin) {  // one run
    band = {smaller(sinks.begin, band.begin), larger(sinks.end, band.end)};
    sinks = {0, 0};
  }
  plan.groups[group] = {{sinks, band}, tiles.within({last.band.begin, first.band.end})};
}

// The warp that plans, up to two tiles ahead.
template <class Traits, class Plan>
__device__ __forceinline__ void plan_queries(const HopperParams& p, const HopperShared<Traits, Plan>& shared) {
  using Shared = HopperShared<Traits, Plan>;
  static_assert(Traits::kRowGroups == Traits::kConsumers);
  const AttentionParams& attention = p.attention;
  const int lane = threadIdx.x % 32, positions = Traits::kRows >> p.packed_bits;
  visit_plans<Plan>(p, [&](int wave, int, int turn) {
    const Ring<2> plans = place_in_ring<2>(turn);
    Plan& plan = shared.plan(plans.stage);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFree + plans.stage), plans.parity ^ 1);
    if (lane == 0) plan.place = place_queries<Traits>(p, tile_of_wave<Plan>(wave));
    __syncwarp();
    const RowBand band = row_band(attention, plan.place.batch, plan.place.row_head);
    const int first = plan.place.first_row, there = smaller(attention.rows.num_queries - first, positions);
#pragma unroll 1
    for (int i = lane; i < positions; i += 32) plan.visible[i] = band.keys(first + smaller(i, there - 1));
    __syncwarp();
    const KeyTiles tiles =
        RowBand::tiles_of(plan.visible[0], plan.visible[there - 1], attention.rows.sinks > 0, Traits::kColumns);
    if (lane < Traits::kConsumers) plan_group(plan, p, tiles, lane, there);
    if (lane == 0) {
      plan.tiles = tiles;
      plan.keys_written = written_keys(attention.rows, band);
    }
    __syncwarp();
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFull + plans.stage));
  });
}

}  // namespace longattn::cuda
