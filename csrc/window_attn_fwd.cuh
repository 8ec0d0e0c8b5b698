// Forward of banded attention on tensor cores of sm_80 and later: FlashAttention-2's online softmax (Dao, 2023,
// arXiv:2307.08691) over the key tiles of the band.
//
// A block takes kBlockM queries of one head, 4 warps of kRowBlocks * 16 rows each, and walks the key tiles that band.h
// gives for them: K of the next tile is on its way during softmax and P V, V during Q K^T. Each warp leaves out tiles
// that none of its own rows sees, and masks only those that some of them see in part, by bits.
// Shared memory: Q [kBlockM, kD], reused to stage the output; K and V [kBlockN, kD]; what each row sees [kBlockM].
// Registers: O and S in fp32 (kRowBlocks * (kD + kBlockN) / 2 a thread); P goes from S to the A operand directly.
#pragma once

#include <cmath>

#include "window_attn_logits.cuh"
#include "window_attn_tile.cuh"

namespace longattn::cuda {

// Which tile a block computes, and the key tiles it walks; in shared memory, as registers are scarce.
struct BlockPlan {
  int batch, head, kv_head, first_query;
  HeadRows key, value;
  KeyTiles tiles;
};

// kBlocks is how many blocks of a multiprocessor must find registers.
template <typename Type_, int kD_, int kBlockN_, int kRowBlocks_, int kBlocks_>
struct ForwardTraits {
  using Type = Type_;
  static constexpr int kD = kD_, kBlockN = kBlockN_, kRowBlocks = kRowBlocks_, kBlocks = kBlocks_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowBlocks, kBlockM = kWarps * kWarpRows;
  static constexpr int kKeyBytes = kBlockN * kD * 2, kQueryBytes = kBlockM * kD * 2;
  static constexpr int kVisibleBytes = kBlockM * static_cast<int>(sizeof(VisibleKeys));
  static constexpr int kSharedBytes = kQueryBytes + 2 * kKeyBytes + kVisibleBytes + static_cast<int>(sizeof(BlockPlan));
  static_assert(kBlockN % 32 == 0, "edge masks are words of 32 keys");
  static_assert(kSharedBytes <= 99 * 1024, "the least that a device of these families has");
};

// Heads that share keys are neighbours, and late queries, whose causal rows are the longest, come first.
template <int kBlockM>
__device__ __forceinline__ BlockPlan block_plan(const AttentionParams& p) {
  const int ratio = p.heads / p.kv_heads, tiles = (p.rows.num_queries + kBlockM - 1) / kBlockM;
  const int tile_of_group = static_cast<int>(blockIdx.x) / ratio, group = tile_of_group / tiles;
  const int kv_head = group % p.kv_heads, head = kv_head * ratio + static_cast<int>(blockIdx.x) % ratio;
  return {group / p.kv_heads, head, kv_head, (tiles - 1 - tile_of_group % tiles) * kBlockM, {}, {}, {}};
}

// The tile of one warp: sums in registers, addresses of its fragments.
template <class Traits>
struct ForwardWarp {
  static constexpr int kD = Traits::kD, kBlockN = Traits::kBlockN, kRowBlocks = Traits::kRowBlocks;
  using Type = typename Traits::Type;

  float out[kRowBlocks][kD / 8][4];
  float maximum[kRowBlocks][2], sum[kRowBlocks][2];  // of this lane's rows; sum of its own columns only
  float s[kRowBlocks][kBlockN / 8][4];
  FragmentAddress<kD> query, key;
  uint32_t to_value;  // from a fragment of the warp's rows of Q to that of the same place in V

  __device__ __forceinline__ ForwardWarp(unsigned char* q, unsigned char* k, unsigned char* v, int warp, int lane)
      : query(simt::smem_address(q), warp * Traits::kWarpRows + lane % 16, lane / 16),
        key(simt::smem_address(k), lane % 8 + lane / 16 * 8, lane / 8 % 2),
        to_value(static_cast<uint32_t>(v - q) - warp * Traits::kWarpRows * TileLayout<kD>::kRowBytes) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[r][i] = -INFINITY;
        sum[r][i] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[r][d][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply_keys() {
#pragma unroll
    for (int c = 0; c < kD / 16; ++c) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) simt::ldmatrix_x4(a[r], query.at(c, 16 * r));
#pragma unroll
      for (int n = 0; n < kBlockN / 16; ++n) {
        uint32_t b[4];
        simt::ldmatrix_x4(b, key.at(c, 16 * n));
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) {
          if (c == 0) {
            simt::mma_set(Type, s[r][2 * n], a[r], b[0], b[1]);
            simt::mma_set(Type, s[r][2 * n + 1], a[r], b[2], b[3]);
          } else {
            simt::mma_add(Type, s[r][2 * n], a[r], b[0], b[1]);
            simt::mma_add(Type, s[r][2 * n + 1], a[r], b[2], b[3]);
          }
        }
      }
    }
  }

  template <bool kCapped>
  __device__ __forceinline__ void form_logits(const Logits& logits) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[r][n][i] = kCapped ? logits.capped(s[r][n][i]) : logits.scaled(s[r][n][i]);
  }

  // `visible` holds what the warp's rows see.
  __device__ __forceinline__ void mask(const VisibleKeys* visible, int first_key, int lane) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const VisibleKeys seen = visible[16 * r + 8 * half + lane / 4];
#pragma unroll
        for (int word = 0; word < kBlockN / 32; ++word) {
          const uint32_t bits = seen.bits(first_key + 32 * word) >> 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!(bits >> (8 * n + i) & 1)) s[r][4 * word + n][2 * half + i] = -INFINITY;
        }
      }
  }

  // s becomes exp(s - maximum), and all that was summed before is scaled to the new maximum.
  __device__ __forceinline__ void exponentiate(float factor) {
    float shrink[kRowBlocks][2];
    bool risen = false;
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = maximum[r][half];
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) top = fmaxf(top, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
        top = fmaxf(top, simt::shfl_xor(top, 1));
        top = fmaxf(top, simt::shfl_xor(top, 2));
        const float base = top == -INFINITY ? 0.0f : top * factor;
        shrink[r][half] = simt::exp2_fast(maximum[r][half] * factor - base);
        risen |= top > maximum[r][half];
        maximum[r][half] = top;
        sum[r][half] *= shrink[r][half];
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[r][n][i] = simt::exp2_fast(s[r][n][i] * factor - base);
            sum[r][half] += s[r][n][i];
          }
      }
    if (!simt::any_lane(risen)) return;
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
      for (int d = 0; d < kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[r][d][i] *= shrink[r][i / 2];
  }

  __device__ __forceinline__ void multiply_values() {
#pragma unroll
    for (int n = 0; n < kBlockN / 16; ++n) {
      uint32_t a[kRowBlocks][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[r][i] = Type::pack(s[r][2 * n + i / 2][2 * (i % 2)], s[r][2 * n + i / 2][2 * (i % 2) + 1]);
#pragma unroll
      for (int c = 0; c < kD / 16; ++c) {
        uint32_t b[4];
        simt::ldmatrix_x4_trans(b, query.at(c, 16 * n) + to_value);
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r) {
          simt::mma_add(Type, out[r][2 * c], a[r], b[0], b[1]);
          simt::mma_add(Type, out[r][2 * c + 1], a[r], b[2], b[3]);
        }
      }
    }
  }

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
        const float scale = total > 0.0f ? weight / total : 0.0f;
        const int row = 16 * r + 8 * half + lane / 4;
        if (lane % 4 == 0 && row < rows) lse[row] = total > 0.0f ? (base + log2f(total)) * kLn2 : -INFINITY;
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
  constexpr int kD = Traits::kD, kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kThreads = Traits::kThreads;
  SIMT_SHARED(shared);
  unsigned char *query_tile = shared, *key_tile = query_tile + Traits::kQueryBytes;
  unsigned char* value_tile = key_tile + Traits::kKeyBytes;
  VisibleKeys* visible = reinterpret_cast<VisibleKeys*>(value_tile + Traits::kKeyBytes);
  BlockPlan& plan = *reinterpret_cast<BlockPlan*>(visible + kBlockM);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warp_row = warp * Traits::kWarpRows;
  const int num_queries = p.rows.num_queries, num_keys = p.rows.num_keys;
  BlockPlan place = block_plan<kBlockM>(p);
  const int rows = smaller(num_queries - place.first_query, kBlockM);
  const RowBand band = row_band(p, place.batch, place.head);
  for (int r = thread; r < kBlockM; r += kThreads) visible[r] = band.keys(place.first_query + smaller(r, rows - 1));
  __syncthreads();
  place.tiles = RowBand::tiles_of(visible[0], visible[rows - 1], p.rows.sinks > 0, kBlockN);
  place.key = head_rows(p.key, place.batch, place.kv_head, num_keys, p.head_dim, p.aligned);
  place.value = head_rows(p.value, place.batch, place.kv_head, num_keys, p.head_dim, p.aligned);
  if (thread == 0) plan = place;
  const int count = place.tiles.count();
  if (count > 0) {
    const HeadRows query = head_rows(p.query, place.batch, place.head, num_queries, p.head_dim, p.aligned);
    load_tile<kD, kBlockM, kThreads>(query_tile, query, place.first_query);
    load_tile<kD, kBlockN, kThreads>(key_tile, place.key, place.tiles.begin(0));
    simt::cp_async_commit();
  }
  const bool real = warp_row < rows;  // else the whole warp only loads
  const WarpKeys keys{visible[warp_row], visible[warp_row + Traits::kWarpRows - 1]};
  const Logits logits(p);
  ForwardWarp<Traits> state(query_tile, key_tile, value_tile, warp, lane);
  __syncthreads();
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    const int begin = plan.tiles.begin(t), end = begin + kBlockN;
    const bool seen = real && keys.seen(begin, end);
    simt::cp_async_wait<0>();
    __syncthreads();  // K of this tile is there, V of the last is done with
    load_tile<kD, kBlockN, kThreads>(value_tile, plan.value, begin);
    simt::cp_async_commit();
    if (seen) state.multiply_keys();
    simt::cp_async_wait<0>();
    __syncthreads();  // V is there, K is done with
    if (t + 1 < count) {
      load_tile<kD, kBlockN, kThreads>(key_tile, plan.key, plan.tiles.begin(t + 1));
      simt::cp_async_commit();
    }
    if (!seen) continue;
    if (logits.kind == Logits::kCapped) state.template form_logits<true>(logits);
    if (logits.kind == Logits::kScaled) state.template form_logits<false>(logits);
    if (!keys.interior(begin, end)) state.mask(visible + warp_row, begin, lane);
    state.exponentiate(logits.factor);
    state.multiply_values();
  }
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
