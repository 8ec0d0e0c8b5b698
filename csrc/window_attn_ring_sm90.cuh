// What the kernels for compute capability 9.0 share: blocks that stay on their multiprocessor and take tiles of rows in
// turn, the slots and rings that tiles are copied into ahead, and how a warpgroup walks them.
//
// A warpgroup that computes has 64 rows, of one tensor or of two, in a slot of its own, or of all where kRowGroups
// is 1. Tiles of kColumns columns of two tensors are streamed to all of them through rings of kStages. One warp plans
// tiles, two ahead; one thread has tiles copied as the plans say. Both run ahead of the warpgroups that compute: the
// next tile's plan, rows and first columns arrive during this one's end. Shared memory: rows
// [kSlots][kRowGroups][kRowTensors] and columns [2][kStages], in panels of 64 rows and of kColumns; statistics of
// columns; two plans; barriers.
#pragma once

#include "simt90.h"
#include "window_attn_logits.cuh"

namespace longattn::cuda {

template <typename Type_, int kD_, int kConsumers_, int kStages_, int kSlots_, int kRowTensors_, int kColumns_ = 64,
          int kRowGroups_ = kConsumers_>
struct HopperTraits {
  using Type = Type_;
  static constexpr int kD = kD_, kConsumers = kConsumers_, kStages = kStages_, kSlots = kSlots_;
  static constexpr int kRowTensors = kRowTensors_;
  static constexpr int kColumns = kColumns_, kRowGroups = kRowGroups_;
  static constexpr int kGroupRows = 64, kRows = kGroupRows * kRowGroups;
  static_assert(kColumns == 32 || kColumns == 64);
  static_assert(kRowGroups == kConsumers || kRowGroups == 1);
  static constexpr int kThreads = 128 * kConsumers + 128;
  static constexpr bool kInOrder = false;
  // Registers are given up to those that compute: what launch bounds leave a thread is 168 or 128.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = kConsumers == 2 ? 224 : 152;
  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536 / kThreads / 8 * 8 * kThreads);
  static constexpr int kRowBytes = kD % 64 == 0 ? 128 : 64, kPanelChannels = kRowBytes / 2;
  // Of 64 rows, and of a tile's columns.
  static constexpr int kPanels = kD / kPanelChannels, kRowPanel = kGroupRows * kRowBytes,
                       kRowTile = kPanels * kRowPanel;
  static constexpr int kColumnPanel = kColumns * kRowBytes, kColumnTile = kPanels * kColumnPanel;
  static_assert(kD % kPanelChannels == 0 && kColumnPanel % 1024 == 0);
  using Operand = simt::Operand<kRowBytes>;
};

struct HopperParams {
  simt::TensorMap rows[2], streamed[2], out[2];
  AttentionParams attention;
  int packed_bits;                     // log2 of the heads that share a tile of queries
  int tiles_of_heads, tiles_in_total;  // tiles of rows: of one set of packed heads (or key head), and of all
  int parts;                           // plans of a tile of keys
};

// What a plan says of copies: where rows come from, and the columns of its tiles.
struct HopperPlace {
  int batch, row_head, first_row, streamed_head;  // heads: the first of packed ones
};

// The tiles of columns that a warpgroup visits.
struct HopperVisits {
  Range runs[2];   // in order; {0, 0} where there is none
  Range interior;  // of those, the ones that need no mask
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

// Plan::kColumnStats says whether a warp brings the RowStats of streamed columns, beside the second tensor's tiles.
template <class Traits, class Plan_>
struct HopperShared {
  using Plan = Plan_;
  static constexpr int kConsumers = Traits::kConsumers, kStages = Traits::kStages;
  static constexpr int kRowSlots = Traits::kSlots * Traits::kRowGroups;
  static constexpr int kStreamed = kRowSlots * Traits::kRowTensors * Traits::kRowTile;
  static constexpr int kStats = kStreamed + 2 * kStages * Traits::kColumnTile;
  static constexpr int kStatsBytes = Traits::kColumns * static_cast<int>(sizeof(RowStats));  // of a stage
  static constexpr int kPlans = kStats + (Plan::kColumnStats ? kStages * kStatsBytes : 0);
  static constexpr int kBarriers = kPlans + 2 * static_cast<int>(sizeof(Plan));
  // Barriers that say "filled", and behind those of a kind the ones that say "free again".
  static constexpr int kRowsFull = 0, kRowsFree = kRowSlots;
  static constexpr int kStreamFull = 2 * kRowSlots, kStreamFree = kStreamFull + kStages;  // the second tensor's behind
  static constexpr int kPlanFull = kStreamFull + 4 * kStages, kPlanFree = kPlanFull + 2;
  static constexpr int kAside = kPlanFree + 2;  // for copies that are not passed on as they come
  static constexpr int kBytes = kBarriers + 8 * (kAside + 1);
  static_assert(kBytes <= 227 * 1024, "the most that a block may have");

  unsigned char* memory;
  uint32_t base;

  __device__ __forceinline__ explicit HopperShared(unsigned char* memory)
      : memory(memory), base(simt::smem_address(memory)) {}
  __device__ __forceinline__ Plan& plan(int i) const { return reinterpret_cast<Plan*>(memory + kPlans)[i]; }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t full(int which, uint32_t stage) const {
    return barrier(kStreamFull + which * 2 * kStages + static_cast<int>(stage));
  }
  __device__ __forceinline__ uint32_t free(int which, uint32_t stage) const {
    return barrier(kStreamFree + which * 2 * kStages + static_cast<int>(stage));
  }
  // Bytes from the start.
  __device__ __forceinline__ static int rows(int slot, int which) {
    return (slot * Traits::kRowTensors + which) * Traits::kRowTile;
  }
  __device__ __forceinline__ static int streamed(int which, uint32_t stage) {
    return kStreamed + (which * kStages + static_cast<int>(stage)) * Traits::kColumnTile;
  }
  __device__ __forceinline__ RowStats* stats(uint32_t stage) const {
    return reinterpret_cast<RowStats*>(memory + kStats + static_cast<int>(stage) * kStatsBytes);
  }

  // By one thread, before all others go on. `more_readers` arrive where a plan is free again, beside those known here.
  __device__ __forceinline__ void init_barriers(int more_readers = 0) const {
    const auto init = [&](int first, int count, int filled, int freed) {
      for (int i = 0; i < count; ++i) {
        simt::mbarrier_init(barrier(first + i), filled);
        simt::mbarrier_init(barrier(first + count + i), freed);
      }
    };
    constexpr int kStatsWarps = Plan::kColumnStats ? 1 : 0;
    init(kRowsFull, kRowSlots, 1, kConsumers / Traits::kRowGroups);
    init(kStreamFull, kStages, 1, 4 * kConsumers);
    init(kStreamFull + 2 * kStages, kStages, 1 + kStatsWarps, 4 * kConsumers);
    init(kPlanFull, 2, 1, 4 * kConsumers + 1 + kStatsWarps + more_readers);
    simt::mbarrier_init(barrier(kAside), 1);
    simt::mbarrier_fence_init();
  }
};

// The wave-th tile of this block. Every other wave runs backwards, so that a block whose first tile is long gets a
// shorter one next, but where tiles wait for those before them (Plan::kInOrder).
template <class Plan>
__device__ __forceinline__ int tile_of_wave(int wave) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return wave * blocks + (!Plan::kInOrder && wave % 2 ? blocks - 1 - block : block);
}

// Calls visit(wave, part, turn) for every plan of this block's tiles, in order.
template <class Plan, typename Visit>
__device__ __forceinline__ void visit_plans(const HopperParams& p, const Visit& visit) {
#pragma unroll 1
  for (int wave = 0, turn = 0; tile_of_wave<Plan>(wave) < p.tiles_in_total; ++wave)
#pragma unroll 1
    for (int part = 0; part < Plan::parts(p); ++part, ++turn) visit(wave, part, turn);
}

// Has the panels of a tile copied.
template <class Traits, int kPanel>
__device__ __forceinline__ void load_panels(uint32_t to, const simt::TensorMap& map, uint32_t barrier, int head,
                                            int token, int batch) {
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel)
    simt::load_box(to + panel * kPanel, map, barrier, {panel * Traits::kPanelChannels, head, token, batch});
}

// Zeros from column `first` of a tile on: slots of a cache that were never written may hold NaNs, which no weight of
// zero would hide.
template <class Traits>
__device__ __forceinline__ void clear_columns(unsigned char* tile, int first) {
#pragma unroll 1
  for (int panel = 0; panel < Traits::kPanels; ++panel)
#pragma unroll 1
    for (int at = first * Traits::kRowBytes; at < Traits::kColumnPanel; at += 16)
      simt::store_shared(tile + panel * Traits::kColumnPanel + at, simt::Chunk{});
}

// The thread that has tiles copied, in the order in which they are used.
template <class Traits, class Plan>
struct HopperCopies {
  using Shared = HopperShared<Traits, Plan>;
  const HopperParams& p;
  const Shared& shared;
  Ring<Traits::kStages> ring;
  uint32_t aside_parity = 0;

  __device__ __forceinline__ HopperCopies(const HopperParams& p, const Shared& shared) : p(p), shared(shared) {}

  // One tile of columns. Of the tensor that weights are multiplied with, what is not written is cleared before the tile
  // is passed on.
  __device__ __forceinline__ void load_streamed(const Plan& plan, int which, int begin) {
    simt::mbarrier_wait(shared.free(which, ring.stage), ring.parity ^ 1);
    const uint32_t full = shared.full(which, ring.stage), aside = shared.barrier(Shared::kAside);
    const int offset = Shared::streamed(which, ring.stage);
    const bool whole = which != Plan::kCleared || begin + Traits::kColumns <= plan.written();
    simt::mbarrier_arrive_expect(whole ? full : aside, Traits::kColumnTile);
    load_panels<Traits, Traits::kColumnPanel>(shared.base + offset, p.streamed[which], whole ? full : aside,
                                              plan.place.streamed_head, begin, plan.place.batch);
    if (whole) return;
    simt::mbarrier_wait(aside, aside_parity);
    aside_parity ^= 1;
    clear_columns<Traits>(shared.memory + offset, larger(plan.written() - begin, 0));
    simt::fence_async_proxy();
    simt::mbarrier_arrive(full);
  }

  __device__ __forceinline__ void load_rows(const HopperPlace& place, int wave) {
    const Ring<Traits::kSlots> slots = place_in_ring<Traits::kSlots>(wave);
#pragma unroll 1
    for (int group = 0; group < Traits::kRowGroups; ++group) {
      const int slot = static_cast<int>(slots.stage) * Traits::kRowGroups + group;
      const uint32_t full = shared.barrier(Shared::kRowsFull + slot);
      const int token = place.first_row + (group * Traits::kGroupRows >> Plan::row_bits(p));
      simt::mbarrier_wait(shared.barrier(Shared::kRowsFree + slot), slots.parity ^ 1);
      simt::mbarrier_arrive_expect(full, Traits::kRowTensors * Traits::kRowTile);
#pragma unroll
      for (int which = 0; which < Traits::kRowTensors; ++which)
        load_panels<Traits, Traits::kRowPanel>(shared.base + Shared::rows(slot, which), p.rows[which], full,
                                               place.row_head, token, place.batch);
    }
  }

  __device__ __forceinline__ void run() {
    for (const simt::TensorMap* map : {&p.rows[0], &p.streamed[0], &p.streamed[1], &p.out[0]}) simt::prefetch_map(*map);
    visit_plans<Plan>(p, [&](int wave, int part, int turn) {
      const Ring<2> plans = place_in_ring<2>(turn);
      simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
      const Plan& plan = shared.plan(plans.stage);
      const int count = plan.count();
#pragma unroll 1
      for (int t = 0; t < larger(count, 1); ++t) {  // rows come behind the first tile, for which they are needed
        if (t < count) load_streamed(plan, 0, plan.begin(t));
        if (t == 0 && part == 0) load_rows(plan.place, wave);
        if (t == count) break;
        load_streamed(plan, 1, plan.begin(t));
        ring.advance();
      }
      simt::mbarrier_arrive(shared.barrier(Shared::kPlanFree + plans.stage));
    });
  }
};

// Issues sum = rows columns^T, of 64 x kColumns.
template <class Traits>
__device__ __forceinline__ void multiply_columns(float (&sum)[Traits::kColumns / 2], typename Traits::Operand rows,
                                                 typename Traits::Operand columns) {
  using Type = typename Traits::Type;
#pragma unroll
  for (int c = 0; c < Traits::kD / 16; ++c) {
    constexpr int kSteps = Traits::kPanelChannels / 16;
    const int panel = c / kSteps, bytes = c % kSteps * 32;
    const uint64_t left = rows.at(panel * Traits::kRowPanel + bytes);
    const uint64_t right = columns.at(panel * Traits::kColumnPanel + bytes);
    if (c == 0)
      simt::wgmma_ss<Type, false>(sum, left, right);
    else
      simt::wgmma_ss<Type, true>(sum, left, right);
  }
}

// 64 x kColumns weights as products take them from registers: of lane 4 g + t, rows g + 8 (i % 2) and columns
// 16 n + 8 (i / 2) + 2 t, + 1.
template <class Traits>
using HopperWeights = uint32_t[Traits::kColumns / 16][4];

// Issues sum += weights columns.
template <class Traits>
__device__ __forceinline__ void multiply_weights(float (&sum)[Traits::kD / 2], const HopperWeights<Traits>& weights,
                                                 typename Traits::Operand columns) {
#pragma unroll
  for (int n = 0; n < Traits::kColumns / 16; ++n)
    simt::wgmma_rs<typename Traits::Type>(sum, weights[n], columns.at(n * 16 * Traits::kRowBytes));
}

// Writes one of this lane's rows of a sum, scaled, to the panels of a tile of rows.
template <class Traits>
__device__ __forceinline__ void stage_row(unsigned char* tile, const float (&sum)[Traits::kD / 2], int half, int row,
                                          float scale) {
  constexpr int kChunks = Traits::kRowBytes / 16;
  const int mix = kChunks == 8 ? row & 7 : (row >> 1) & 3;
  unsigned char* to = tile + row * Traits::kRowBytes + threadIdx.x % 4 * 4;
#pragma unroll
  for (int d = 0; d < Traits::kD / 8; ++d)
    simt::store_shared(to + d / kChunks * Traits::kRowPanel + (d % kChunks ^ mix) * 16,
                       Traits::Type::pack(sum[4 * d + 2 * half] * scale, sum[4 * d + 2 * half + 1] * scale));
}

// A warpgroup that computes.
template <class Traits, class Plan, class Params>
struct HopperConsumer {
  using Shared = HopperShared<Traits, Plan>;
  using Operand = typename Traits::Operand;

  const Params& p;
  const Shared& shared;
  const int group, lane;
  const Logits logits;
  Ring<Traits::kStages> ring;  // of the next tile of columns
  int wave = 0;
  bool output_leaves = false;  // this warpgroup's last output may still be read from its slot

  __device__ __forceinline__ HopperConsumer(const Params& p, const Shared& shared)
      : p(p),
        shared(shared),
        group(simt::uniform(static_cast<int>(threadIdx.x) / 128)),
        lane(threadIdx.x % 32),
        logits(p.attention) {}

  __device__ __forceinline__ void wait_for(int which, const Ring<Traits::kStages>& at) const {
    simt::mbarrier_wait(shared.full(which, at.stage), at.parity);
  }
  __device__ __forceinline__ void release(int which, const Ring<Traits::kStages>& at) const {
    if (lane == 0) simt::mbarrier_arrive(shared.free(which, at.stage));
  }
  // A tile of columns as the right side of multiply_columns, or of multiply_weights.
  __device__ __forceinline__ Operand columns(int which, const Ring<Traits::kStages>& at) const {
    return Operand(shared.base + Shared::streamed(which, at.stage));
  }
  __device__ __forceinline__ Operand weighted(int which, const Ring<Traits::kStages>& at) const {
    return Operand(shared.base + Shared::streamed(which, at.stage), Traits::kColumnPanel);
  }
  // Which of the tile's 64 rows are this warpgroup's, and their slot, counted over all of them.
  __device__ __forceinline__ int row_group() const { return Traits::kRowGroups == 1 ? 0 : group; }
  __device__ __forceinline__ int slot(int of_wave) const {
    return static_cast<int>(place_in_ring<Traits::kSlots>(of_wave).stage) * Traits::kRowGroups + row_group();
  }
  // The first row of this lane, of its warpgroup's; formed anew where it is needed, as registers are scarce.
  __device__ __forceinline__ int row() const { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
  __device__ __forceinline__ bool is_first_thread() const { return threadIdx.x % 128 == 0; }

  // A tile that none of these rows visits: passed on once it is there, so that no barrier is two rounds ahead of a lane
  // that still looks at it.
  __device__ __forceinline__ void skip() {
    wait_for(0, ring);
    wait_for(1, ring);
    __syncwarp();
    release(0, ring);
    release(1, ring);
    ring.advance();
  }

  // Calls visit(t, end) for each run of tiles that these rows visit, which takes t to its end, and passes on those in
  // between.
  template <typename Visit>
  __device__ __forceinline__ void visit_runs(const Plan& plan, const Visit& visit) {
    int t = 0;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const Range run = plan.groups[row_group()].runs[i];
      const int begin = simt::uniform(run.begin), end = simt::uniform(run.end);
      if (t >= end) continue;
#pragma unroll 1
      for (; t < begin; ++t) skip();
      visit(t, end);
    }
    const int count = simt::uniform(plan.count());
#pragma unroll 1
    for (; t < count; ++t) skip();
  }
  // Whether a tile that is visited needs no mask.
  __device__ __forceinline__ bool is_interior(const Plan& plan, int t) const {
    return simt::uniform(plan.groups[row_group()].interior.holds(t));
  }

  __device__ __forceinline__ const Plan& wait_for_plan(int turn) const {
    const Ring<2> plans = place_in_ring<2>(turn);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
    return shared.plan(plans.stage);
  }
  __device__ __forceinline__ void release_plan(int turn) const {
    __syncwarp();
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFree + place_in_ring<2>(turn).stage));
  }

  __device__ __forceinline__ void wait_for_rows() const {
    simt::mbarrier_wait(shared.barrier(Shared::kRowsFull + slot(wave)), place_in_ring<Traits::kSlots>(wave).parity);
  }
  // The slot of the output of a wave may be filled again.
  __device__ __forceinline__ void release_output(int of_wave) {
    if (!output_leaves) return;
    output_leaves = false;
    if (is_first_thread()) {
      simt::store_wait_read();
      simt::mbarrier_arrive(shared.barrier(Shared::kRowsFree + slot(of_wave)));
    }
    __syncwarp();
  }
  // Where there are two slots, that of the wave before: once this wave's products are on their way.
  __device__ __forceinline__ void release_last_output() {
    if constexpr (Traits::kSlots > 1) release_output(wave - 1);
  }

  // Has stage() write outputs kFirst to kLast over this warpgroup's rows, and has them copied out.
  template <int kFirst, int kLast, typename Stage>
  __device__ __forceinline__ void write(const HopperPlace& place, const Stage& stage) {
    if constexpr (Traits::kRowGroups == Traits::kConsumers)
      simt::sync_warpgroups<1>(1 + group);  // all have multiplied the rows, which are written over
    else
      simt::sync_warpgroups<Traits::kConsumers>(1 + Traits::kConsumers);
    stage();
    simt::fence_async_proxy();
    simt::sync_warpgroups<1>(1 + group);  // the whole output is staged
    if (is_first_thread()) {
      const int token = place.first_row + (row_group() * Traits::kGroupRows >> Plan::row_bits(p));
#pragma unroll
      for (int which = kFirst; which <= kLast; ++which)
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel)
          simt::store_box(shared.base + Shared::rows(slot(wave), which) + panel * Traits::kRowPanel, p.out[which],
                          {panel * Traits::kPanelChannels, place.row_head, token, place.batch});
      simt::store_commit();
    }
    output_leaves = true;
  }
  // Instead, where none of this warpgroup's rows exists.
  __device__ __forceinline__ void pass_rows_on() const {
    // All have seen them come: else a slot filled twice would be waited for in vain.
    simt::sync_warpgroups<1>(1 + group);
    if (is_first_thread()) simt::mbarrier_arrive(shared.barrier(Shared::kRowsFree + slot(wave)));
  }

  // Calls start(plan) for a tile of rows that has come, walk(plan) for each of its plans and end(plan) for the last,
  // whose `real` says whether this warpgroup has rows.
  template <typename Start, typename Walk, typename End>
  __device__ __forceinline__ void run(const Start& start, const Walk& walk, const End& end) {
    visit_plans<Plan>(p, [&](int of_wave, int part, int turn) {
      wave = of_wave;
      const Plan& plan = wait_for_plan(turn);
      const bool real = simt::uniform(plan.has_rows(p, row_group()));
      if (part == 0) {
        start(plan);
        wait_for_rows();
      }
      walk(plan);
      if (part + 1 == Plan::parts(p)) {
        release_last_output();
        if (real)
          end(plan);
        else
          pass_rows_on();
      }
      release_plan(turn);
      if constexpr (Traits::kSlots == 1)
        if (part + 1 == Plan::parts(p)) release_output(wave);
    });
    if (output_leaves && is_first_thread()) simt::store_wait_read();
  }
};

// The parts of a kernel: `plan`, `stats` and `compute` are called by the warps that do so.
template <class Traits, class Plan, typename Planner, typename Stats, typename Compute>
__device__ __forceinline__ void run_hopper_block(const HopperParams& p, const HopperShared<Traits, Plan>& shared,
                                                 const Planner& plan, const Stats& stats, const Compute& compute) {
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (simt::uniform(static_cast<int>(threadIdx.x) / 128) == Traits::kConsumers) {
    simt::shrink_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 128 * Traits::kConsumers) HopperCopies<Traits, Plan>(p, shared).run();
    if (threadIdx.x / 32 == 4 * Traits::kConsumers + 1) plan();
    if (Plan::kColumnStats && threadIdx.x / 32 == 4 * Traits::kConsumers + 2) stats();
  } else {
    simt::grow_registers<Traits::kConsumerRegisters>();
    compute();
  }
}

}  // namespace longattn::cuda
