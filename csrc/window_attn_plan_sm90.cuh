// Of the kernels for Hopper: tiles of rows, what each visits, and the copies that bring it.
//
// A tile is 64 * kConsumers rows: queries, or queries by heads that share keys (2^packed_bits of them, neighbours, so
// that K and V are read once for all). One warp plans tiles (what each position sees, which key tiles that makes, which
// of them each warpgroup visits) up to two ahead; one thread has K and V copied into a ring of kStages and Q into a
// slot a warpgroup. Both run ahead of the warpgroups that compute: the next tile's plan, Q and first keys arrive during
// this one's end. Shared memory: Q [kQueryStages][kConsumers]; K and V [kStages] each, all in panels of 64 rows; two
// plans; barriers.
#pragma once

#include "simt90.h"
#include "window_attn_logits.cuh"
#include "window_attn_sm90.h"

namespace longattn::cuda {

template <typename Type_, int kD_, int kConsumers_, int kStages_, int kQueryStages_>
struct HopperTraits {
  using Type = Type_;
  static constexpr int kD = kD_, kConsumers = kConsumers_, kStages = kStages_, kQueryStages = kQueryStages_;
  static constexpr int kGroupRows = 64, kBlockN = 64, kRows = kGroupRows * kConsumers;
  static constexpr int kThreads = 128 * kConsumers + 128;
  // Registers are given up to those that compute: what launch bounds leave a thread is 168 or 128.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = kConsumers == 2 ? 224 : 152;
  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536 / kThreads / 8 * 8 * kThreads);
  static constexpr int kRowBytes = kD % 64 == 0 ? 128 : 64, kPanelChannels = kRowBytes / 2;
  static constexpr int kPanels = kD / kPanelChannels, kPanelBytes = 64 * kRowBytes;
  static constexpr int kTileBytes = kPanels * kPanelBytes;  // of 64 rows of anything
  static_assert(kD % kPanelChannels == 0 && kPanelBytes % 1024 == 0);
};

// A tile of rows: where it lies, the key tiles that it visits, and what its positions see.
template <int kConsumers>
struct alignas(16) HopperPlan {
  int batch, head, kv_head, first_query;  // head: the first of the packed ones
  KeyTiles tiles;
  int written;  // keys that surely exist
  struct Group {
    Range runs[2];   // of key tiles that a warpgroup visits, in order; {0, 0} where there is none
    Range interior;  // of those, the ones that all of its rows see whole
  } groups[kConsumers];
  VisibleKeys visible[64 * kConsumers];
};

struct HopperParams {
  simt::TensorMap query, key, value, out;
  AttentionParams attention;
  int packed_bits;                     // log2 of the heads that share a tile
  int tiles_of_heads, tiles_in_total;  // tiles of rows: of one set of packed heads, and of all
};

// A place in a ring, and the parity of its current round.
template <int kStages>
struct Ring {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
  // Where it was `steps` before, of at most kStages.
  __device__ __forceinline__ Ring back(uint32_t steps) const {
    return stage >= steps ? Ring{stage - steps, parity} : Ring{stage + kStages - steps, parity ^ 1};
  }
};

// The place of the turn-th step in a ring of one or two.
template <int kStages>
__device__ __forceinline__ Ring<kStages> place_in_ring(int turn) {
  static_assert(kStages == 1 || kStages == 2);
  return {static_cast<uint32_t>(turn % kStages), static_cast<uint32_t>(turn / kStages % 2)};
}

template <class Traits>
struct HopperShared {
  using Plan = HopperPlan<Traits::kConsumers>;
  static constexpr int kConsumers = Traits::kConsumers, kStages = Traits::kStages, kSlots = Traits::kQueryStages;
  static constexpr int kKeys = kSlots * kConsumers * Traits::kTileBytes, kValues = kKeys + kStages * Traits::kTileBytes;
  static constexpr int kPlans = kValues + kStages * Traits::kTileBytes;
  static constexpr int kBarriers = kPlans + 2 * static_cast<int>(sizeof(Plan));
  // A barrier that says "filled", and behind those of its kind one that says "free again".
  static constexpr int kQueryFull = 0, kQueryFree = kQueryFull + kSlots * kConsumers;
  static constexpr int kKeyFull = kQueryFree + kSlots * kConsumers, kKeyFree = kKeyFull + kStages;
  static constexpr int kValueFull = kKeyFree + kStages, kValueFree = kValueFull + kStages;
  static constexpr int kPlanFull = kValueFree + kStages, kPlanFree = kPlanFull + 2;
  static constexpr int kAside = kPlanFree + 2;  // for copies that are not passed on as they come
  static constexpr int kBytes = kBarriers + 8 * (kAside + 1);
  static_assert(kBytes <= 227 * 1024, "the most that a block may have");

  unsigned char* memory;
  uint32_t base;

  __device__ __forceinline__ explicit HopperShared(unsigned char* memory)
      : memory(memory), base(simt::smem_address(memory)) {}
  __device__ __forceinline__ Plan& plan(int i) const { return reinterpret_cast<Plan*>(memory + kPlans)[i]; }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t key(int stage) const { return base + kKeys + stage * Traits::kTileBytes; }
  __device__ __forceinline__ uint32_t value(int stage) const { return base + kValues + stage * Traits::kTileBytes; }

  // By one thread, before all others go on.
  __device__ __forceinline__ void init_barriers() const {
    const auto init = [&](int first, int count, int filled, int freed) {
      for (int i = 0; i < count; ++i) {
        simt::mbarrier_init(barrier(first + i), filled);
        simt::mbarrier_init(barrier(first + count + i), freed);
      }
    };
    init(kQueryFull, kSlots * kConsumers, 1, 1);
    init(kKeyFull, kStages, 1, 4 * kConsumers);
    init(kValueFull, kStages, 1, 4 * kConsumers);
    init(kPlanFull, 2, 1, 4 * kConsumers + 1);
    simt::mbarrier_init(barrier(kAside), 1);
    simt::mbarrier_fence_init();
  }
};

// The wave-th tile of this block. Every other wave runs backwards, so that a block whose first tile is long gets a
// shorter one next.
__device__ __forceinline__ int tile_of_wave(int wave) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return wave * blocks + (wave % 2 ? blocks - 1 - block : block);
}

// Sets of heads that share keys are neighbours, and late queries, whose causal rows are the longest, come first.
template <class Traits>
__device__ __forceinline__ void place_tile(HopperPlan<Traits::kConsumers>& plan, const HopperParams& p, int tile) {
  const int ratio = p.attention.heads / p.attention.kv_heads, sets = ratio >> p.packed_bits;
  const int set = tile % sets, tile_of_key_head = tile / sets, row_head = tile_of_key_head / p.tiles_of_heads;
  plan.kv_head = row_head % p.attention.kv_heads;
  plan.batch = row_head / p.attention.kv_heads;
  plan.head = plan.kv_head * ratio + (set << p.packed_bits);
  plan.first_query = (p.tiles_of_heads - 1 - tile_of_key_head % p.tiles_of_heads) * (Traits::kRows >> p.packed_bits);
}

// Has the panels of a tile of 64 rows copied.
template <class Traits>
__device__ __forceinline__ void load_panels(uint32_t to, const simt::TensorMap& map, uint32_t barrier, int head,
                                            int token, int batch) {
  simt::mbarrier_arrive_expect(barrier, Traits::kTileBytes);
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel)
    simt::load_box(to + panel * Traits::kPanelBytes, map, barrier,
                   {panel * Traits::kPanelChannels, head, token, batch});
}

// Keys that surely exist: all but slots of a cache that are not written yet, and copies fill up what lies past the
// last.
__device__ __forceinline__ int written_keys(const Rows& rows, const RowBand& band) {
  if (!rows.kv_end) return static_cast<int>(kMostIndex);
  return static_cast<int>(larger<int64_t>(0, smaller<int64_t>(band.stop - rows.key_start, rows.num_keys)));
}

// Zeros from row `first` of a tile of 64 on: slots of a cache that were never written may hold NaNs, which no weight of
// zero would hide.
template <class Traits>
__device__ __forceinline__ void clear_rows(unsigned char* tile, int first) {
#pragma unroll 1
  for (int panel = 0; panel < Traits::kPanels; ++panel)
#pragma unroll 1
    for (int at = first * Traits::kRowBytes; at < Traits::kPanelBytes; at += 16)
      *reinterpret_cast<simt::Chunk*>(tile + panel * Traits::kPanelBytes + at) = simt::Chunk{};
}

// The key tiles of a warpgroup, from what its first and last row see: those that hold sinks, then those of the band.
// `there` is how many positions the tile has.
template <class Traits>
__device__ __forceinline__ void plan_group(HopperPlan<Traits::kConsumers>& plan, const KeyTiles& tiles, int group,
                                           int there, int packed_bits) {
  const int from = group * Traits::kGroupRows >> packed_bits;
  const int to = smaller((group + 1) * Traits::kGroupRows >> packed_bits, there);
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
template <class Traits>
__device__ __forceinline__ void plan_tiles(const HopperParams& p, const HopperShared<Traits>& shared) {
  using Shared = HopperShared<Traits>;
  const AttentionParams& attention = p.attention;
  const int lane = threadIdx.x % 32, positions = Traits::kRows >> p.packed_bits;
#pragma unroll 1
  for (int wave = 0, tile; (tile = tile_of_wave(wave)) < p.tiles_in_total; ++wave) {
    const Ring<2> plans = place_in_ring<2>(wave);
    HopperPlan<Traits::kConsumers>& plan = shared.plan(plans.stage);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFree + plans.stage), plans.parity ^ 1);
    if (lane == 0) place_tile<Traits>(plan, p, tile);
    __syncwarp();
    const RowBand band = row_band(attention, plan.batch, plan.head);
    const int there = smaller(attention.rows.num_queries - plan.first_query, positions);
#pragma unroll 1
    for (int i = lane; i < positions; i += 32) plan.visible[i] = band.keys(plan.first_query + smaller(i, there - 1));
    __syncwarp();
    const KeyTiles tiles =
        RowBand::tiles_of(plan.visible[0], plan.visible[there - 1], attention.rows.sinks > 0, Traits::kBlockN);
    if (lane < Traits::kConsumers) plan_group<Traits>(plan, tiles, lane, there, p.packed_bits);
    if (lane == 0) {
      plan.tiles = tiles;
      plan.written = written_keys(attention.rows, band);
    }
    __syncwarp();
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFull + plans.stage));
  }
}

// V of one key tile. Where it reaches past what is written, it is cleared there before it is passed on.
template <class Traits>
__device__ __forceinline__ void load_values(const HopperParams& p, const HopperShared<Traits>& shared,
                                            const HopperPlan<Traits::kConsumers>& plan, int begin, uint32_t stage,
                                            uint32_t& aside_parity) {
  using Shared = HopperShared<Traits>;
  const uint32_t full = shared.barrier(Shared::kValueFull + stage), aside = shared.barrier(Shared::kAside);
  const bool written = begin + Traits::kBlockN <= plan.written;
  load_panels<Traits>(shared.value(stage), p.value, written ? full : aside, plan.kv_head, begin, plan.batch);
  if (written) return;
  simt::mbarrier_wait(aside, aside_parity);
  aside_parity ^= 1;
  clear_rows<Traits>(shared.memory + Shared::kValues + stage * Traits::kTileBytes, larger(plan.written - begin, 0));
  simt::fence_async_proxy();
  simt::mbarrier_arrive(full);
}

// The thread that has tiles copied, in the order in which they are used: K, once Q, V of each key tile.
template <class Traits>
__device__ __forceinline__ void copy_tiles(const HopperParams& p, const HopperShared<Traits>& shared) {
  using Shared = HopperShared<Traits>;
  for (const simt::TensorMap* map : {&p.query, &p.key, &p.value, &p.out}) simt::prefetch_map(*map);
  Ring<Traits::kStages> ring;
  uint32_t aside_parity = 0;
#pragma unroll 1
  for (int wave = 0; tile_of_wave(wave) < p.tiles_in_total; ++wave) {
    const Ring<2> plans = place_in_ring<2>(wave);
    const Ring<Traits::kQueryStages> slots = place_in_ring<Traits::kQueryStages>(wave);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
    const HopperPlan<Traits::kConsumers>& plan = shared.plan(plans.stage);
    const int count = plan.tiles.count();
#pragma unroll 1
    for (int t = 0; t < larger(count, 1); ++t) {
      const int begin = plan.tiles.begin(t);
      if (t < count) {
        simt::mbarrier_wait(shared.barrier(Shared::kKeyFree + ring.stage), ring.parity ^ 1);
        load_panels<Traits>(shared.key(ring.stage), p.key, shared.barrier(Shared::kKeyFull + ring.stage), plan.kv_head,
                            begin, plan.batch);
      }
#pragma unroll 1
      for (int group = 0; group < (t == 0 ? Traits::kConsumers : 0); ++group) {
        const int slot = slots.stage * Traits::kConsumers + group;
        simt::mbarrier_wait(shared.barrier(Shared::kQueryFree + slot), slots.parity ^ 1);
        load_panels<Traits>(shared.base + slot * Traits::kTileBytes, p.query, shared.barrier(Shared::kQueryFull + slot),
                            plan.head, plan.first_query + (group * Traits::kGroupRows >> p.packed_bits), plan.batch);
      }
      if (t < count) {
        simt::mbarrier_wait(shared.barrier(Shared::kValueFree + ring.stage), ring.parity ^ 1);
        load_values<Traits>(p, shared, plan, begin, ring.stage, aside_parity);
        ring.advance();
      }
    }
    simt::mbarrier_arrive(shared.barrier(Shared::kPlanFree + plans.stage));
  }
}

}  // namespace longattn::cuda
