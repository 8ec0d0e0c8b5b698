// Backward of banded attention on Hopper in one pass: tiles of keys against the tiles of queries that meet them, where
// dK and dV stay in registers and dQ is summed in memory, in an order that is always the same.
//
// As in the pass for dK and dV (window_attn_bwd_key_sm90.cuh) two warpgroups have 64 keys each and form S, dP, P and dS
// of 64 streamed rows of Q and dO. Here they also leave dS in shared memory, where a third warpgroup multiplies it with
// the keys' K: 5 products a pair of tiles rather than 7, and the exponentials once. Its dQ of 64 rows goes, as floats
// in an order of its own, through one of two stages to the sums in memory. One thread has the stages copied or added
// there when it is their turn (window_attn_bwd_turns.h), and raises the flag of the next turn. Who has the last turn
// adds the sums to its own part instead and stores dQ.
//
// A tile waits only for tiles that are dealt before it, so that the earliest one that is not done always goes on.
// Shared memory: as HopperShared, then dS [2][2 warpgroups], one tile of dQ that leaves, stages of sums [2], turns [2],
// barriers.
#pragma once

#include "window_attn_bwd_key_sm90.cuh"
#include "window_attn_bwd_turns.h"

namespace longattn::cuda {

template <typename Type_, int kD_, int kStages_>
struct SingleTraits : HopperTraits<Type_, kD_, 2, kStages_, 2, 2> {
  static constexpr int kThreads = 512;  // 2 warpgroups that form weights, the one for dQ, the one that copies
  static constexpr int kProducerRegisters = 64, kQueryRegisters = 96, kConsumerRegisters = 176;
  static constexpr bool kInOrder = true;
  static_assert(128 * (kProducerRegisters + kQueryRegisters + 2 * kConsumerRegisters) <= 65536);
  static_assert(kD_ == 64, "dQ is one product wide");
};

struct SingleParams : HopperBackwardParams {
  simt::TensorMap query_out;
  float* sums;      // [B, sets of packed heads, query_tiles, 64 * 64], in no order but a warpgroup's own
  int* flags;       // [B, sets of packed heads, query_tiles], zeros: the mark of the last turn
  int query_tiles;  // of a set
};

template <class Traits>
struct SingleShared : HopperShared<Traits, KeyPlan<Traits>> {
  using Base = HopperShared<Traits, KeyPlan<Traits>>;
  using Base::base, Base::Base, Base::memory;
  static constexpr int kConsumers = Traits::kConsumers, kSumBytes = 64 * 64 * static_cast<int>(sizeof(float));
  static constexpr int kWeights = (Base::kBytes + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = Traits::kGroupRows * Traits::kRowBytes;
  static constexpr int kLeaving = kWeights + 2 * kConsumers * kWeightBytes;
  static constexpr int kSums = kLeaving + Traits::kRowTile;
  static constexpr int kTurns = kSums + 2 * kSumBytes;
  static constexpr int kOwnBarriers = kTurns + 2 * static_cast<int>((sizeof(KeyTurns) + 7) / 8 * 8);
  static constexpr int kWeightsFull = 0, kWeightsFree = 2, kSumsFull = 4, kSumsFree = 6, kKeysRead = 8;
  static constexpr int kBytes = kOwnBarriers + 8 * 10;
  static_assert(kBytes <= 227 * 1024, "the most that a block may have");

  __device__ __forceinline__ uint32_t own_barrier(int first, uint32_t stage) const {
    return base + kOwnBarriers + 8 * (first + static_cast<int>(stage));
  }
  // dS of a warpgroup's 64 keys by 64 streamed rows, which are contiguous. Bytes from the start.
  __device__ __forceinline__ static int weights(uint32_t stage, int group) {
    return kWeights + (static_cast<int>(stage) * kConsumers + group) * kWeightBytes;
  }
  __device__ __forceinline__ static int sums(uint32_t stage) { return kSums + static_cast<int>(stage) * kSumBytes; }
  __device__ __forceinline__ KeyTurns& turns(uint32_t stage) const {
    return *reinterpret_cast<KeyTurns*>(memory + kTurns + stage * ((sizeof(KeyTurns) + 7) / 8 * 8));
  }
  __device__ __forceinline__ void init_barriers() const {
    Base::init_barriers(4 + 1);  // the warps for dQ, and who adds
    for (uint32_t i = 0; i < 2; ++i) {
      simt::mbarrier_init(own_barrier(kWeightsFull, i), 4 * kConsumers);
      simt::mbarrier_init(own_barrier(kWeightsFree, i), 4);
      simt::mbarrier_init(own_barrier(kSumsFull, i), 4);
      simt::mbarrier_init(own_barrier(kSumsFree, i), 1);
      simt::mbarrier_init(own_barrier(kKeysRead, i), 4);
    }
    simt::mbarrier_fence_init();
  }
};

// Late keys come first. Blocks beside each other have neighbouring keys, which meet the same queries at nearly the same
// time: Q, dO and the sums are then still in L2.
template <class Traits>
__device__ __forceinline__ HopperPlace place_turn(const HopperParams& p, int tile, int set) {
  HopperPlace place = place_keys<Traits>(p, tile, set);
  place.first_row = (p.tiles_of_heads - 1) * Traits::kRows - place.first_row;
  return place;
}

// The place of a tile of queries' sums and flag.
__device__ __forceinline__ int64_t place_of_sums(const SingleParams& p, const HopperPlace& place, int query_tile) {
  const int sets = p.attention.heads >> p.packed_bits, set = place.streamed_head >> p.packed_bits;
  return (static_cast<int64_t>(place.batch) * sets + set) * p.query_tiles + query_tile;
}

// The warp that plans, up to two plans ahead.
template <class Traits>
__device__ __forceinline__ void plan_turns(const SingleParams& p, const SingleShared<Traits>& shared) {
  using Shared = SingleShared<Traits>;
  const int lane = threadIdx.x % 32;
  visit_plans<KeyPlan<Traits>>(p, [&](int wave, int part, int turn) {
    const Ring<2> plans = place_in_ring<2>(turn);
    KeyPlan<Traits>& plan = shared.plan(plans.stage);
    KeyTurns& turns = shared.turns(plans.stage);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFree + plans.stage), plans.parity ^ 1);
    if (lane == 0) plan.place = place_turn<Traits>(p, tile_of_wave<KeyPlan<Traits>>(wave), part);
    __syncwarp();
    const HopperPlace& place = plan.place;
    const auto band = [&] { return row_band(p.attention, place.batch, place.streamed_head); };
    const int bits = 6 - p.packed_bits, tile = place.first_row / Traits::kRows;
    if (lane < 3) {
      const Range met =
          query_tiles_of_tile(band(), tile + lane - 1, p.tiles_of_heads, Traits::kRows, bits, p.query_tiles);
      (lane == 0 ? turns.earlier : lane == 1 ? turns.own : turns.later) = met;
    }
#pragma unroll 1
    for (int i = lane; i < Traits::kRows; i += 32)
      plan.seen_by[i] = band().queries(smaller(place.first_row + i, p.attention.rows.num_keys)).band;
    __syncwarp();
    if (lane == 0) {
      turns.tile = tile;
      plan.span = {turns.own.begin << bits, turns.own.end << bits};
      plan.step_bits = bits;
    }
    __syncwarp();
    if (lane < Traits::kConsumers) {
      plan_keys_of_group(plan, lane, true);
      Range& run = plan.groups[lane].runs[1];  // documents in no order may ask for more than is walked
      run = {smaller(larger(run.begin, 0), plan.count()), smaller(run.end, plan.count())};
      if (run.empty()) run = {0, 0};
    }
    __syncwarp();
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFull + plans.stage));
  });
}

// A warpgroup that has keys.
template <class Traits>
struct SingleGradients : KeyGradients<Traits, true, true> {
  using Plan = KeyPlan<Traits>;
  using Base = KeyGradients<Traits, true, true>;
  using Shared = SingleShared<Traits>;
  using Base::group, Base::lane, Base::p, Base::ring, Base::row, Base::slot, Base::sum, Base::wave, Base::weights;

  const Shared& shared;
  Ring<2> stage;  // of dS

  __device__ __forceinline__ SingleGradients(const SingleParams& p, const Shared& shared)
      : Base(p, shared), shared(shared) {}

  // Stores dS where it is multiplied with K once all warps have.
  __device__ __forceinline__ void leave_weights() const {
    const int line = lane % 8, matrix = lane / 8;
    const uint32_t to = shared.base + Shared::weights(stage.stage, group) +
                        (threadIdx.x % 128 / 32 * 16 + matrix % 2 * 8 + line) * Traits::kRowBytes;
#pragma unroll
    for (int n = 0; n < Traits::kColumns / 16; ++n)
      simt::stmatrix_x4(to + ((2 * n + matrix / 2) ^ line) * 16, weights[0][n]);
  }
  __device__ __forceinline__ void pass_weights_on() {
    __syncwarp();
    if (lane == 0) simt::mbarrier_arrive(shared.own_barrier(Shared::kWeightsFull, stage.stage));
    stage.advance();
  }
  __device__ __forceinline__ void wait_for_room() const {
    simt::mbarrier_wait(shared.own_barrier(Shared::kWeightsFree, stage.stage), stage.parity ^ 1);
  }

  // A tile that none of these keys meets. Room is waited for all the same: no barrier may get two rounds ahead.
  __device__ __forceinline__ void skip_both() {
    this->skip();
    wait_for_room();
    pass_weights_on();
  }

  __device__ __forceinline__ void add_products() {
    simt::wgmma_fence();
#pragma unroll
    for (int which = 0; which < 2; ++which)
      multiply_weights<Traits>(sum[which], weights[which], this->weighted(which, ring));
    simt::wgmma_commit();
    simt::fence_async_proxy();
    pass_weights_on();
    simt::wgmma_wait<0>(sum[0], sum[1]);
    __syncwarp();  // all lanes have read the columns' statistics
    this->release(0, ring);
    this->release(1, ring);
    ring.advance();
  }

  __device__ __forceinline__ void walk(const Plan& plan) {
    using Operand = typename Traits::Operand;
    const Operand keys(shared.base + Shared::rows(slot(wave), 0)), values(shared.base + Shared::rows(slot(wave), 1));
    const Range run = plan.groups[group].runs[1];
    const int begin = simt::uniform(run.begin), end = simt::uniform(run.end), count = simt::uniform(plan.count());
    int t = 0;
#pragma unroll 1
    for (; t < begin; ++t) skip_both();
#pragma unroll 1
    for (; t < end; ++t) {
      this->multiply_rows(keys, values);
      this->differentiate(this->stats_of(ring.stage));
      if (!this->is_interior(plan, t)) this->mask(this->bits_of(plan, plan.begin(t)));
      wait_for_room();
      leave_weights();
      add_products();
      this->release_last_output();
    }
#pragma unroll 1
    for (; t < count; ++t) skip_both();
  }

  __device__ __forceinline__ void run() {
    const auto end = [&](const Plan& plan) {
      const Ring<2> read = place_in_ring<2>(wave);
      simt::mbarrier_wait(shared.own_barrier(Shared::kKeysRead, read.stage), read.parity);  // K is written over
      this->template store<false>(plan);
    };
    HopperConsumer<Traits, Plan, HopperBackwardParams>::run([&](const Plan&) { this->start(); },
                                                            [&](const Plan& plan) { walk(plan); }, end);
  }
};

// The warpgroup that forms dQ.
template <class Traits>
struct SingleQueries {
  using Plan = KeyPlan<Traits>;
  using Operand = typename Traits::Operand;
  using Shared = SingleShared<Traits>;
  static constexpr int kBarrier = 1 + Traits::kConsumers;

  const SingleParams& p;
  const Shared& shared;
  Ring<2> weights, stage;
  bool leaves = false;  // the last dQ may still be read where it is staged
  float sum[Traits::kD / 2];

  __device__ __forceinline__ SingleQueries(const SingleParams& p, const Shared& shared) : p(p), shared(shared) {}

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) simt::mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ bool is_first_thread() const { return threadIdx.x % 128 == 0; }
  __device__ __forceinline__ static int slot(int wave, int group) {
    return static_cast<int>(place_in_ring<Traits::kSlots>(wave).stage) * Traits::kConsumers + group;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : sum) x = 0.0f;
  }

  // Adds dS K of the warpgroups [kFrom, kTo).
  template <int kFrom, int kTo>
  __device__ __forceinline__ void multiply(int wave) {
    simt::wgmma_fence();
#pragma unroll
    for (int group = kFrom; group < kTo; ++group) {
      const Operand left(shared.base + Shared::weights(weights.stage, group), Traits::kRowPanel);
      const Operand right(shared.base + Shared::rows(slot(wave, group), 0), Traits::kRowPanel);
#pragma unroll
      for (int n = 0; n < Traits::kGroupRows / 16; ++n)
        simt::wgmma_ss_across<typename Traits::Type>(sum, left.at(n * 16 * Traits::kRowBytes),
                                                     right.at(n * 16 * Traits::kRowBytes));
    }
    simt::wgmma_commit();
    simt::wgmma_wait<0>(sum);
  }

  __device__ __forceinline__ simt::Chunk chunk(int i) const {
    return {{simt::as_bits(sum[4 * i]), simt::as_bits(sum[4 * i + 1]), simt::as_bits(sum[4 * i + 2]),
             simt::as_bits(sum[4 * i + 3])}};
  }

  // Passes this part on to who adds it.
  __device__ __forceinline__ void pass_on() {
    simt::mbarrier_wait(shared.own_barrier(Shared::kSumsFree, stage.stage), stage.parity ^ 1);
    const uint32_t to = shared.base + Shared::sums(stage.stage) + threadIdx.x % 128 * 16;
#pragma unroll
    for (int i = 0; i < Traits::kD / 8; ++i) simt::store_shared_chunk(to + i * 128 * 16, chunk(i));
    simt::fence_async_proxy();
    arrive(shared.own_barrier(Shared::kSumsFull, stage.stage));
    stage.advance();
  }

  // Adds what the turns before have summed.
  __device__ __forceinline__ void add_sums(int64_t place, int mark) {
#ifndef LONGATTN_TURNS_UNORDERED
    simt::wait_for_flag(p.flags + place, mark);
#endif
    const float* from = p.sums + place * (Shared::kSumBytes / 4) + threadIdx.x % 128 * 4;
#pragma unroll
    for (int i = 0; i < Traits::kD / 8; ++i) {
      const simt::Chunk others = simt::load_sums(from + i * 128 * 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[4 * i + k] += simt::as_float(others.word[k]);
    }
  }

  __device__ __forceinline__ void store(const HopperPlace& place, int query_tile) {
    if (leaves && is_first_thread()) simt::store_wait_read();
    simt::sync_warpgroups<1>(kBarrier);  // there is room
    unsigned char* tile = shared.memory + Shared::kLeaving;
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) stage_row<Traits>(tile, sum, half, row + 8 * half, p.attention.scale);
    simt::fence_async_proxy();
    simt::sync_warpgroups<1>(kBarrier);  // all is staged
    leaves = true;
    if (!is_first_thread()) return;
    simt::store_box(shared.base + Shared::kLeaving, p.query_out,
                    {0, place.streamed_head, query_tile << (6 - p.packed_bits), place.batch});
    simt::store_commit();
  }

  __device__ __forceinline__ void store_zeros(const HopperPlace& place, const Range& query_tiles) {
    const int end = simt::uniform(query_tiles.end);
#pragma unroll 1
    for (int i = simt::uniform(query_tiles.begin); i < end; ++i) {
      clear();
      store(place, i);
    }
  }

  __device__ __forceinline__ void walk(const Plan& plan, const KeyTurns& turns, int wave) {
    const Range runs[2] = {plan.groups[0].runs[1], plan.groups[1].runs[1]};
    const int count = simt::uniform(plan.count());
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      const int met = simt::uniform(runs[0].holds(t) + 2 * runs[1].holds(t)), query_tile = turns.own.begin + t;
      clear();
      simt::mbarrier_wait(shared.own_barrier(Shared::kWeightsFull, weights.stage), weights.parity);
      if (met == 3)
        multiply<0, 2>(wave);
      else if (met == 1)
        multiply<0, 1>(wave);
      else if (met == 2)
        multiply<1, 2>(wave);
      arrive(shared.own_barrier(Shared::kWeightsFree, weights.stage));
      weights.advance();
      if (!simt::uniform(turns.is_last(query_tile))) {
        pass_on();
        continue;
      }
      if (!simt::uniform(turns.is_first(query_tile)))
        add_sums(place_of_sums(p, plan.place, query_tile), turns.mark_before());
      store(plan.place, query_tile);
    }
  }

  __device__ __forceinline__ void run() {
    visit_plans<Plan>(p, [&](int wave, int part, int turn) {
      const Ring<2> plans = place_in_ring<2>(turn), slots = place_in_ring<Traits::kSlots>(wave);
      simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
      const Plan& plan = shared.plan(plans.stage);
      const KeyTurns& turns = shared.turns(plans.stage);
      if (part == 0)
#pragma unroll 1
        for (int group = 0; group < Traits::kConsumers; ++group)
          if (simt::uniform(plan.has_rows(p, group)))  // else the slot is passed on without this warpgroup
            simt::mbarrier_wait(shared.barrier(Shared::kRowsFull + slot(wave, group)), slots.parity);
      store_zeros(plan.place, turns.unmet_before());
      walk(plan, turns, wave);
      store_zeros(plan.place, turns.unmet_behind());
      // Before the plan is free: a warpgroup without rows, which waits for no keys, then can't fall two waves behind.
      const uint32_t read = place_in_ring<2>(wave).stage;
      if (part + 1 == p.parts) arrive(shared.own_barrier(Shared::kKeysRead, read));
      arrive(shared.barrier(Shared::kPlanFree + plans.stage));
    });
    if (leaves && is_first_thread()) simt::store_wait_read();
  }
};

// The thread that has sums added in turn. The next addition is on its way before the last one is there, if both can be;
// before it waits for anything else, it passes on what it has added, so that others wait less.
template <class Traits>
struct SingleTurns {
  using Shared = SingleShared<Traits>;

  const SingleParams& p;
  const Shared& shared;
  Ring<2> stage;
  int* last_flag = nullptr;  // to be raised where what was added last is there
  int last_mark = 0;

  __device__ __forceinline__ SingleTurns(const SingleParams& p, const Shared& shared) : p(p), shared(shared) {}

  // Passes the last one on, but for the kPending newer ones.
  template <int kPending>
  __device__ __forceinline__ void settle() {
    if (!last_flag) return;
    simt::store_floats_wait<kPending>();
    simt::fence_async_proxy_global();
    simt::raise_flag(last_flag, last_mark);
    last_flag = nullptr;
    simt::mbarrier_arrive(shared.own_barrier(Shared::kSumsFree, stage.back(1).stage));
  }

  __device__ __forceinline__ void add(int64_t place, const KeyTurns& turns, bool first) {
    const uint32_t full = shared.own_barrier(Shared::kSumsFull, stage.stage);
    if (!simt::mbarrier_test(full, stage.parity)) settle<0>();
    simt::mbarrier_wait(full, stage.parity);
    float* to = p.sums + place * (Shared::kSumBytes / 4);
    const uint32_t from = shared.base + Shared::sums(stage.stage);
    if (first) {
      simt::store_floats<false>(to, from, Shared::kSumBytes);
    } else {
#ifndef LONGATTN_TURNS_UNORDERED  // wrong gradients, for benchmarks of what the order costs
      if (!simt::flag_is(p.flags + place, turns.mark_before())) {
        settle<0>();
        simt::wait_for_flag(p.flags + place, turns.mark_before());
      }
#endif
      simt::fence_async_proxy_global();
      simt::store_floats<true>(to, from, Shared::kSumBytes);
    }
    simt::store_floats_commit();
    settle<1>();
    last_flag = p.flags + place;
    last_mark = turns.mark();
    stage.advance();
  }

  __device__ __forceinline__ void run() {
    visit_plans<KeyPlan<Traits>>(p, [&](int, int, int turn) {
      const Ring<2> plans = place_in_ring<2>(turn);
      settle<0>();
      simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
      const KeyTurns& turns = shared.turns(plans.stage);
      const HopperPlace& place = shared.plan(plans.stage).place;
#pragma unroll 1
      for (int i = turns.own.begin; i < turns.own.end; ++i)
        if (!turns.is_last(i)) add(place_of_sums(p, place, i), turns, turns.is_first(i));
      simt::mbarrier_arrive(shared.barrier(Shared::kPlanFree + plans.stage));
    });
    settle<0>();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    window_attn_bwd_single_sm90([[maybe_unused]] const __grid_constant__ SingleParams p) {
#ifdef SIMT_SM90A
  SIMT_SHARED_1024(memory);
  const SingleShared<Traits> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  const int warpgroup = simt::uniform(static_cast<int>(threadIdx.x) / 128), warp = threadIdx.x / 32;
  if (warpgroup < Traits::kConsumers) {
    simt::grow_registers<Traits::kConsumerRegisters>();
    SingleGradients<Traits>(p, shared).run();
  } else if (warpgroup == Traits::kConsumers) {
    simt::shrink_registers<Traits::kQueryRegisters>();
    SingleQueries<Traits>(p, shared).run();
  } else {
    constexpr int kFirst = 4 * Traits::kConsumers + 4;
    simt::shrink_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 32 * kFirst) HopperCopies<Traits, KeyPlan<Traits>>(p, shared).run();
    if (warp == kFirst + 1) plan_turns<Traits>(p, shared);
    if (warp == kFirst + 2) copy_stats<Traits>(p, shared);
    if (threadIdx.x == 32 * (kFirst + 3)) SingleTurns<Traits>(p, shared).run();
  }
#else
  simt::trap();
#endif
}

}  // namespace longattn::cuda
