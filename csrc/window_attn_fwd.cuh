// Forward of banded attention on tensor cores of sm_80 and later: FlashAttention-2's online softmax (Dao, 2023,
// arXiv:2307.08691) over the key tiles of the band.
//
// A block takes kBlockM queries of one head, 4 warps of kRowBlocks * 16 rows each, and walks the key tiles that band.h
// gives for them. K and V stream through a ring: with two slots K of the next tile is on its way during softmax and P
// V, and V during Q K^T; with three, where shared memory has room, each has a whole tile's time. Each warp leaves out
// tiles that none of its own rows sees, and masks only those that some of them see in part, by bits. Shared memory: Q
// [kBlockM, kD], reused to stage the output; the ring, kSlots of [kBlockN, kD]; what each row sees [kBlockM].
#pragma once

#include "window_attn_softmax.cuh"

namespace longattn::cuda {

// Which tile a block computes, and the key tiles it walks; in shared memory, as registers are scarce.
struct BlockPlan {
  int batch, head, kv_head, first_query;
  HeadRows key, value;
  KeyTiles tiles;
};

// kBlocks is how many blocks of a multiprocessor must find registers, kSlots how many tiles the ring holds.
template <typename Type_, int kD_, int kBlockN_, int kRowBlocks_, int kBlocks_, int kSlots_>
struct ForwardTraits {
  using Type = Type_;
  static constexpr int kD = kD_, kBlockN = kBlockN_, kRowBlocks = kRowBlocks_, kBlocks = kBlocks_;
  static constexpr int kSlots = kSlots_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowBlocks, kBlockM = kWarps * kWarpRows;
  static constexpr int kKeyBytes = kBlockN * kD * 2, kQueryBytes = kBlockM * kD * 2;
  static constexpr int kVisibleBytes = kBlockM * static_cast<int>(sizeof(VisibleKeys));
  static constexpr int kSharedBytes =
      kQueryBytes + kSlots * kKeyBytes + kVisibleBytes + static_cast<int>(sizeof(BlockPlan));
  static_assert(kBlockN % 32 == 0, "edge masks are words of 32 keys");
  static_assert(kSlots == 2 || kSlots == 3);
  static_assert(kSharedBytes <= 99 * 1024, "the least that a device of these families has");
};

// Where tiles lie in the ring, in bytes: K, V, K, V take its slots in turn. Two slots are the same in every step.
template <class Traits>
struct RingSlots {
  static constexpr uint32_t kEnd = Traits::kSlots * Traits::kKeyBytes;
  uint32_t first = 0;

  __device__ __forceinline__ uint32_t key() const { return Traits::kSlots == 2 ? 0 : first; }
  __device__ __forceinline__ uint32_t value() const { return after(key()); }
  __device__ __forceinline__ uint32_t free() const { return after(value()); }  // of three: for K of the next tile
  __device__ __forceinline__ void advance() { first = free(); }
  __device__ __forceinline__ static uint32_t after(uint32_t slot) {
    return slot + Traits::kKeyBytes == kEnd ? 0 : slot + Traits::kKeyBytes;
  }
};

// Heads that share keys are neighbours, and late queries, whose causal rows are the longest, come first.
template <int kBlockM>
__device__ __forceinline__ BlockPlan block_plan(const AttentionParams& p) {
  const int ratio = p.heads / p.kv_heads, tiles = (p.rows.num_queries + kBlockM - 1) / kBlockM;
  const int tile_of_group = static_cast<int>(blockIdx.x) / ratio, group = tile_of_group / tiles;
  const int kv_head = group % p.kv_heads, head = kv_head * ratio + static_cast<int>(blockIdx.x) % ratio;
  return {group / p.kv_heads, head, kv_head, (tiles - 1 - tile_of_group % tiles) * kBlockM, {}, {}, {}};
}

// The tile of one warp.
template <class Traits>
struct ForwardWarp : SoftmaxWarp<typename Traits::Type, Traits::kD, Traits::kBlockN, Traits::kRowBlocks> {
  static constexpr int kD = Traits::kD, kRowBlocks = Traits::kRowBlocks;
  using Type = typename Traits::Type;
  using Base = SoftmaxWarp<Type, kD, Traits::kBlockN, kRowBlocks>;
  using Base::Base, Base::maximum, Base::sum, Base::out;

  // Divides by the denominator, which the sink logit (base 2, -inf for none) joins; stages the rows for store_rows.
  __device__ __forceinline__ void finish(unsigned char* tile, int tile_row, int lane, float factor, float sink,
                                         float* lse, int rows) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[r][half];
        total += simt::shfl_xor(total, 1);
        total += simt::shfl_xor(total, 2);
        const float own = maximum[r][half] * factor, top = fmaxf(own, sink), base = top == -INFINITY ? 0.0f : top;
        const float weight = simt::exp2_fast(own - base);
        total = total * weight + simt::exp2_fast(sink - base);
        const float scale = total == 0.0f ? 0.0f : weight / total;
        const int row = 16 * r + 8 * half + lane / 4;
        if (lane % 4 == 0 && row < rows) lse[row] = total == 0.0f ? -INFINITY : (base + log2f(total)) * kLn2;
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
          const uint32_t offset = TileLayout<kD>::offset(tile_row + row, d) + lane % 4 * 4;
          *reinterpret_cast<uint32_t*>(tile + offset) =
              Type::pack(out[r][d][2 * half] * scale, out[r][d][2 * half + 1] * scale);
        }
      }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    window_attn_fwd(const __grid_constant__ AttentionParams p) {
  constexpr int kD = Traits::kD, kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kThreads = Traits::kThreads,
                kSlots = Traits::kSlots;
  SIMT_SHARED(shared);
  unsigned char *query_tile = shared, *ring = query_tile + Traits::kQueryBytes;
  VisibleKeys* visible = reinterpret_cast<VisibleKeys*>(ring + Traits::kSlots * Traits::kKeyBytes);
  BlockPlan& plan = *reinterpret_cast<BlockPlan*>(visible + kBlockM);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warp_row = warp * Traits::kWarpRows;
  const int num_queries = p.rows.num_queries;
  BlockPlan place = block_plan<kBlockM>(p);
  const int rows = smaller(num_queries - place.first_query, kBlockM);
  const RowBand band = row_band(p, place.batch, place.head);
  for (int r = thread; r < kBlockM; r += kThreads) visible[r] = band.keys(place.first_query + smaller(r, rows - 1));
  __syncthreads();
  place.tiles = RowBand::tiles_of(visible[0], visible[rows - 1], p.rows.sinks > 0, kBlockN);
  const int seen_end = visible[rows - 1].band.end;  // slots of a cache from here on may never have been written
  place.key = head_rows(p.key, place.batch, place.kv_head, seen_end, p.head_dim, p.aligned);
  place.value = head_rows(p.value, place.batch, place.kv_head, seen_end, p.head_dim, p.aligned);
  if (thread == 0) plan = place;
  const int count = place.tiles.count();
  if (count > 0) {
    const HeadRows query = head_rows(p.query, place.batch, place.head, num_queries, p.head_dim, p.aligned);
    load_tile<kD, kBlockM, kThreads>(query_tile, query, place.first_query);
    load_tile<kD, kBlockN, kThreads>(ring, place.key, place.tiles.begin(0));
    simt::cp_async_commit();
    if (kSlots == 3) {
      load_tile<kD, kBlockN, kThreads>(ring + Traits::kKeyBytes, place.value, place.tiles.begin(0));
      simt::cp_async_commit();
    }
  }
  const bool real = warp_row < rows;  // else the whole warp only loads
  const WarpKeys keys{visible[warp_row], visible[warp_row + Traits::kWarpRows - 1]};
  const Logits logits(p);
  ForwardWarp<Traits> state(query_tile, warp_row, ring, ring, 0, lane);
  __syncthreads();
  RingSlots<Traits> slots;
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    const int begin = plan.tiles.begin(t), end = begin + kBlockN;
    const bool seen = real && keys.seen(begin, end);
    simt::cp_async_wait<kSlots - 2>();
    __syncthreads();  // K of this tile is there, V of the last is done with
    if (kSlots == 2)
      load_tile<kD, kBlockN, kThreads>(ring + slots.value(), plan.value, begin);
    else if (t + 1 < count)
      load_tile<kD, kBlockN, kThreads>(ring + slots.free(), plan.key, plan.tiles.begin(t + 1));
    simt::cp_async_commit();
    if (seen) state.multiply_keys(slots.key());
    simt::cp_async_wait<kSlots - 2>();
    __syncthreads();  // V is there, K is done with
    if (t + 1 < count)
      load_tile<kD, kBlockN, kThreads>(ring + slots.key(), kSlots == 2 ? plan.key : plan.value,
                                       plan.tiles.begin(t + 1));
    simt::cp_async_commit();
    if (seen) {
      if (logits.kind == Logits::kCapped) state.template form_logits<true>(logits);
      if (logits.kind == Logits::kScaled) state.template form_logits<false>(logits);
      if (!keys.interior(begin, end)) state.mask(visible + warp_row, begin, lane);
      state.exponentiate(logits.factor);
      state.multiply_values(slots.value());
    }
    slots.advance();
  }
  simt::cp_async_wait<0>();
  if (!real) return;

  const int first = plan.first_query + warp_row;
  const float sink = p.sink_logits ? p.sink_logits[plan.head] * kLog2E : -INFINITY;
  float* lse = p.lse + (static_cast<int64_t>(plan.batch) * p.heads + plan.head) * num_queries + first;
  __syncwarp();  // all lanes have read their rows of Q, which are written over
  state.finish(query_tile, warp_row, lane, logits.factor, sink, lse, num_queries - first);
  __syncwarp();
  uint16_t* out = static_cast<uint16_t*>(p.out.data) + plan.batch * p.out.batch_stride + plan.head * p.out.head_stride;
  store_rows<kD, Traits::kWarpRows>(query_tile, warp_row, p.out, out, first, num_queries, p.head_dim, p.aligned);
}

template <class Traits>
cudaError_t launch_forward(const AttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.rows.num_queries + Traits::kBlockM - 1) / Traits::kBlockM;
  const int64_t blocks = tiles * p.heads * p.batch;
  if (blocks > kMostIndex) return cudaErrorInvalidValue;
  return SIMT_LAUNCH(window_attn_fwd<Traits>, dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads),
                     Traits::kSharedBytes, stream, p);
}

}  // namespace longattn::cuda
