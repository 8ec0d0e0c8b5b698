// Forward of banded attention on Hopper's warpgroup products, after FlashAttention-3 (Shah et al., 2024,
// arXiv:2407.08608): a warp that copies, warpgroups that compute, and Q K^T of the next key tile in flight while the
// softmax of this one runs.
//
// A block stays on its multiprocessor and takes tiles of 64 * kConsumers rows in turn. Rows are queries, or queries by
// heads that share keys (`packed` of them, neighbours in a tile, so that K and V are read once for all). A warp of the
// last warpgroup plans a tile (what each position sees, which key tiles that makes), then has K and V copied into a
// ring of kStages and Q into a slot a warpgroup. It runs ahead: the next tile's plan, Q and first keys arrive during
// this one's end. A warpgroup leaves out the key tiles that none of its own 64 rows sees, and masks only those at its
// edges, by bits. Shared memory: Q [kQueryStages][kConsumers], where a finished tile's output is staged too; K and V
// [kStages] each, all in panels of 64 rows; two plans; barriers. Registers: O, S and the weights (kD / 2 + 32 + 16 a
// thread).
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
  struct Group {
    Range runs[2];   // of key tiles that a warpgroup visits, in order
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
};

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
  static __device__ __forceinline__ int query_offset(int slot, int group) {
    return (slot * kConsumers + group) * Traits::kTileBytes;
  }

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
    init(kPlanFull, 2, 1, 4 * kConsumers);
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
template <int kConsumers>
__device__ __forceinline__ void plan_group(HopperPlan<kConsumers>& plan, int group, const VisibleKeys& first,
                                           const VisibleKeys& last) {
  Range sinks = plan.tiles.touched_by(first.sinks);
  Range band = plan.tiles.touched_by({first.band.begin, larger(first.band.begin, last.band.end)});
  if (!sinks.empty() && band.empty()) {
    band = sinks;
    sinks.end = sinks.begin;
  } else if (!sinks.empty() && sinks.end >= band.begin) {
    band.begin = sinks.begin;
    sinks.end = sinks.begin;
  }
  plan.groups[group] = {{sinks, band}, plan.tiles.within({last.band.begin, first.band.end})};
}

// The warp that plans and copies; all lanes plan, the first has copies made.
template <class Traits>
__device__ __forceinline__ void produce(const HopperParams& p, const HopperShared<Traits>& shared) {
  using Shared = HopperShared<Traits>;
  const int lane = threadIdx.x % 32, positions = Traits::kRows >> p.packed_bits;
  Ring<2> plans;
  Ring<Traits::kStages> ring;
  Ring<Traits::kQueryStages> slots;
  uint32_t aside_parity = 0;
  if (lane == 0)
    for (const simt::TensorMap* map : {&p.query, &p.key, &p.value, &p.out}) simt::prefetch_map(*map);
#pragma unroll 1
  for (int wave = 0, tile; (tile = tile_of_wave(wave)) < p.tiles_in_total; ++wave) {
    HopperPlan<Traits::kConsumers>& plan = shared.plan(plans.stage);
    simt::mbarrier_wait(shared.barrier(Shared::kPlanFree + plans.stage), plans.parity ^ 1);
    if (lane == 0) place_tile<Traits>(plan, p, tile);
    __syncwarp();
    const RowBand band = row_band(p.attention, plan.batch, plan.head);
    const int real = smaller(p.attention.rows.num_queries - plan.first_query, positions);
#pragma unroll 1
    for (int i = lane; i < positions; i += 32) plan.visible[i] = band.keys(plan.first_query + smaller(i, real - 1));
    __syncwarp();
    if (lane == 0) {
      plan.tiles =
          RowBand::tiles_of(plan.visible[0], plan.visible[real - 1], p.attention.rows.sinks > 0, Traits::kBlockN);
#pragma unroll 1
      for (int group = 0; group < Traits::kConsumers; ++group) {
        const int first = group * Traits::kGroupRows >> p.packed_bits;
        const int end = smaller((group + 1) * Traits::kGroupRows >> p.packed_bits, real);
        if (first < end)
          plan_group(plan, group, plan.visible[first], plan.visible[end - 1]);
        else
          plan.groups[group] = {};
      }
      simt::mbarrier_arrive(shared.barrier(Shared::kPlanFull + plans.stage));
      const int count = plan.tiles.count(), batch = plan.batch;
      const int written = written_keys(p.attention.rows, band);
#pragma unroll 1
      for (int t = 0; t < larger(count, 1); ++t) {
        const bool exists = t < count;  // else Q alone
        const int begin = exists ? plan.tiles.begin(t) : 0;
        if (exists) {
          simt::mbarrier_wait(shared.barrier(Shared::kKeyFree + ring.stage), ring.parity ^ 1);
          load_panels<Traits>(shared.key(ring.stage), p.key, shared.barrier(Shared::kKeyFull + ring.stage),
                              plan.kv_head, begin, batch);
        }
        if (t == 0) {
#pragma unroll 1
          for (int group = 0; group < Traits::kConsumers; ++group) {
            const int slot = slots.stage * Traits::kConsumers + group;
            simt::mbarrier_wait(shared.barrier(Shared::kQueryFree + slot), slots.parity ^ 1);
            load_panels<Traits>(shared.base + slot * Traits::kTileBytes, p.query,
                                shared.barrier(Shared::kQueryFull + slot), plan.head,
                                plan.first_query + (group * Traits::kGroupRows >> p.packed_bits), batch);
          }
        }
        if (!exists) break;
        simt::mbarrier_wait(shared.barrier(Shared::kValueFree + ring.stage), ring.parity ^ 1);
        const uint32_t full = shared.barrier(Shared::kValueFull + ring.stage);
        if (written >= begin + Traits::kBlockN) {
          load_panels<Traits>(shared.value(ring.stage), p.value, full, plan.kv_head, begin, batch);
        } else {
          load_panels<Traits>(shared.value(ring.stage), p.value, shared.barrier(Shared::kAside), plan.kv_head, begin,
                              batch);
          simt::mbarrier_wait(shared.barrier(Shared::kAside), aside_parity);
          aside_parity ^= 1;
          clear_rows<Traits>(shared.memory + Shared::kValues + ring.stage * Traits::kTileBytes,
                             larger(written - begin, 0));
          simt::fence_async_proxy();
          simt::mbarrier_arrive(full);
        }
        ring.advance();
      }
    }
    plans.advance();
    slots.advance();
  }
}

// The rows of one warpgroup: sums in registers as wgmma leaves them, this lane's two rows being `half` 0 and 1.
template <class Traits>
struct HopperRows {
  static constexpr int kD = Traits::kD, kWidth = Traits::kBlockN / 2;
  using Type = typename Traits::Type;

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
  __device__ __forceinline__ void multiply_keys(uint64_t query, uint64_t key) {
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      constexpr int kSteps = Traits::kPanelChannels / 16;
      const int units = (c / kSteps * Traits::kPanelBytes + c % kSteps * 32) / 16;
      if (c == 0)
        simt::wgmma_ss<Type, false>(s, query, key);
      else
        simt::wgmma_ss<Type, true>(s, query + units, key + units);
    }
    simt::wgmma_commit();
  }

  // Issues O += weights V.
  __device__ __forceinline__ void multiply_values(uint64_t value) {
#pragma unroll
    for (int n = 0; n < Traits::kBlockN / 16; ++n)
      simt::wgmma_rs<Type>(out, weights[n], value + n * 16 * Traits::kRowBytes / 16);
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
  static constexpr int kRowBytes = Traits::kRowBytes;

  const HopperParams& p;
  const Shared& shared;
  const int group, lane, row;  // row: the first of this lane, of its warpgroup's
  const Logits logits;
  Ring<Traits::kStages> ring;  // of the next key tile
  Ring<Traits::kQueryStages> slots;
  bool output_leaves = false;  // this warpgroup's last output may still be read from its slot
  HopperRows<Traits> rows;

  __device__ __forceinline__ HopperConsumer(const HopperParams& p, const Shared& shared)
      : p(p),
        shared(shared),
        group(simt::uniform(static_cast<int>(threadIdx.x) / 128)),
        lane(threadIdx.x % 32),
        row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4),
        logits(p.attention) {}

  __device__ __forceinline__ void wait_for(int kind, const Ring<Traits::kStages>& at) const {
    simt::mbarrier_wait(shared.barrier(kind + at.stage), at.parity);
  }
  __device__ __forceinline__ void release(int kind, const Ring<Traits::kStages>& at) const {
    if (lane == 0) simt::mbarrier_arrive(shared.barrier(kind + at.stage));
  }
  __device__ __forceinline__ bool is_first_thread() const { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ void issue_keys(uint64_t query) {
    wait_for(Shared::kKeyFull, ring);
    simt::wgmma_fence();
    rows.multiply_keys(query, simt::tile_descriptor<kRowBytes>(shared.key(ring.stage), 16));
  }
  __device__ __forceinline__ void issue_values(const Ring<Traits::kStages>& at) {
    wait_for(Shared::kValueFull, at);
    simt::wgmma_fence();
    rows.multiply_values(simt::tile_descriptor<kRowBytes>(shared.value(at.stage), Traits::kPanelBytes));
  }
  __device__ __forceinline__ void softmax(const Plan& plan, int first_position, int t) {
    if (logits.kind == Logits::kCapped) {
#pragma unroll
      for (float& x : rows.s) x = logits.capped(x);
    } else if (logits.kind == Logits::kScaled) {
#pragma unroll
      for (float& x : rows.s) x = logits.scaled(x);
    }
    if (!simt::uniform(plan.groups[group].interior.holds(t)))
      rows.mask(plan.visible + first_position, row, p.packed_bits, plan.tiles.begin(t));
    rows.exponentiate(logits.factor);
  }

  // A key tile that none of these rows sees: passed on once it is there, so that no barrier is two rounds ahead.
  __device__ __forceinline__ void skip() {
    wait_for(Shared::kKeyFull, ring);
    release(Shared::kKeyFree, ring);
    wait_for(Shared::kValueFull, ring);
    release(Shared::kValueFree, ring);
    ring.advance();
  }

  // The slot of the last output may be filled again.
  __device__ __forceinline__ void release_output() {
    if (!output_leaves) return;
    output_leaves = false;
    const int slot = (slots.stage ^ (Traits::kQueryStages - 1)) * Traits::kConsumers + group;
    if (is_first_thread()) {
      simt::store_wait_read();
      simt::mbarrier_arrive(shared.barrier(Shared::kQueryFree + slot));
    }
    __syncwarp();
  }

  // Once the values of the tile before are multiplied, and may be replaced.
  __device__ __forceinline__ void take_weights(bool multiplied, const Ring<Traits::kStages>& at) {
    simt::wgmma_wait<0>(rows.out);
    if (multiplied) release(Shared::kValueFree, at);
    rows.take_weights();
  }

  // Walks the key tiles.
  __device__ __forceinline__ void walk(const Plan& plan, int first_position) {
    const uint64_t query = simt::tile_descriptor<kRowBytes>(shared.base + Shared::query_offset(slots.stage, group), 16);
    int t = 0;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const int begin = simt::uniform(plan.groups[group].runs[i].begin);
      const int end = simt::uniform(plan.groups[group].runs[i].end);
      if (end <= begin) continue;
#pragma unroll 1
      for (; t < begin; ++t) skip();
      // The softmax ends where the loop turns, so that the compiler can't have it wait for the products of values.
      issue_keys(query);
      simt::wgmma_wait<0>(rows.s);
      release(Shared::kKeyFree, ring);
      softmax(plan, first_position, t);
      release_output();
      Ring<Traits::kStages> last = ring, before = ring;
      bool multiplied = false;  // values of the tile before the last, which `before` holds
#pragma unroll 1
      for (++t; t < end; ++t) {
        take_weights(multiplied, before);
        ring.advance();
        issue_keys(query);
        issue_values(last);
        simt::wgmma_wait<1>(rows.s);
        release(Shared::kKeyFree, ring);
        before = last;
        last = ring;
        multiplied = true;
        softmax(plan, first_position, t);
      }
      take_weights(multiplied, before);
      ring.advance();
      issue_values(last);
      simt::wgmma_wait<0>(rows.out);
      release(Shared::kValueFree, last);
    }
    const int count = simt::uniform(plan.tiles.count());
#pragma unroll 1
    for (; t < count; ++t) skip();
  }

  // Writes the log-sum-exp, stages O in the slot of Q and has it copied out.
  __device__ __forceinline__ void write(const Plan& plan) {
    const AttentionParams& attention = p.attention;
    const int offset = Shared::query_offset(slots.stage, group), first_row = group * Traits::kGroupRows;
    simt::sync_warpgroup(1 + group);  // all have multiplied Q, which is written over
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed_row = first_row + row + 8 * half;
      const int query = plan.first_query + (packed_row >> p.packed_bits);
      const int head = plan.head + (packed_row & ((1 << p.packed_bits) - 1));
      const float sink = attention.sink_logits ? attention.sink_logits[head] * kLog2E : -INFINITY;
      const float lse = rows.finish(half, shared.memory + offset, row + 8 * half, logits.factor, sink);
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
    const int positions = Traits::kRows >> p.packed_bits, first_position = group * Traits::kGroupRows >> p.packed_bits;
    Ring<2> plans;
#pragma unroll 1
    for (int wave = 0; tile_of_wave(wave) < p.tiles_in_total; ++wave) {
      simt::mbarrier_wait(shared.barrier(Shared::kPlanFull + plans.stage), plans.parity);
      const Plan& plan = shared.plan(plans.stage);
      const int there = smaller(p.attention.rows.num_queries - plan.first_query, positions);
      const bool real = simt::uniform(first_position < there);
      const int slot = slots.stage * Traits::kConsumers + group;
      rows.start();
      simt::mbarrier_wait(shared.barrier(Shared::kQueryFull + slot), slots.parity);
      walk(plan, first_position);
      release_output();
      if (real)
        write(plan);
      else if (is_first_thread())
        simt::mbarrier_arrive(shared.barrier(Shared::kQueryFree + slot));
      __syncwarp();
      if (lane == 0) simt::mbarrier_arrive(shared.barrier(Shared::kPlanFree + plans.stage));
      plans.advance();
      slots.advance();
      if constexpr (Traits::kQueryStages == 1) release_output();
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
    if (simt::uniform(static_cast<int>(threadIdx.x) / 32) == 4 * Traits::kConsumers) produce<Traits>(p, shared);
  } else {
    simt::grow_registers<Traits::kConsumerRegisters>();
    HopperConsumer<Traits>(p, shared).run();
  }
#endif
}

}  // namespace longattn::cuda
