// Forward of banded attention for few queries against many keys: decoding, and short chunks of a prefill.
//
// Its floor is reading K and V once. The query heads of a key head are packed into one tile of rows (row = query *
// ratio + head), so that their keys are read once for all; a block takes such a tile and one of `splits` parts of its
// key tiles, however long those are at run time, so that one query of one sequence fills the device. 4 warps share the
// rows (kRowWarps of 16) and the 64 keys of a tile (kWarpKeys each); each keeps an online softmax of its own, merged at
// the block's end. K and V stream through one ring of kSlots tiles: K, V, K, V. With more than one split a second
// kernel combines them in their order (Flash-Decoding: Dao et al., 2023; the merge: Milakov, Gimelshein, 2018,
// arXiv:1805.02867).
// Shared memory: Q [kRows, kD] and the ring, reused to merge the warps [4 * 16, kD] in fp32; what each row sees.
#pragma once

#include "window_attn_softmax.cuh"

namespace longattn::cuda {

struct DecodeParams {
  AttentionParams forward;
  float* partial_out;  // [B, heads, num_queries, splits, partial_stride]; with one split neither is used
  float* partial_lse;  // [B, heads, num_queries, splits], base 2
  int32_t splits, partial_stride;
};

struct alignas(8) RowSum {
  float maximum;  // of a row's exponents in base 2
  float sum;      // of exp2(exponent - maximum)
};

template <typename Type_, int kD_, int kRowWarps_, int kSlots_>
struct DecodeTraits {
  using Type = Type_;
  static constexpr int kD = kD_, kRowWarps = kRowWarps_, kSlots = kSlots_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kRowWarps, kBlockN = 64;
  static constexpr int kKeyWarps = kWarps / kRowWarps, kWarpKeys = kBlockN / kKeyWarps;
  static constexpr int kSlotBytes = kBlockN * kD * 2, kQueryBytes = kRows * kD * 2;
  static constexpr int kMergeStride = kD + 8;  // floats: rows start 8 banks apart
  static constexpr int kMergeBytes = kWarps * 16 * kMergeStride * 4;
  static constexpr int kTileBytes = larger(kQueryBytes + kSlots * kSlotBytes, kMergeBytes);
  static constexpr int kSharedBytes = kTileBytes + kRows * static_cast<int>(sizeof(VisibleKeys)) +
                                      kWarps * 16 * static_cast<int>(sizeof(RowSum)) +
                                      static_cast<int>(sizeof(HeadRows) * 2 + sizeof(KeyTiles));
  // Blocks that a multiprocessor should hold, for about 48 KiB on their way to it at any time.
  static constexpr int kWanted = (48 * 1024 + (kSlots - 1) * kSlotBytes - 1) / ((kSlots - 1) * kSlotBytes);
  static_assert(kSlots >= 2 && kSharedBytes <= 99 * 1024, "the least that a device of these families has");
};

// Where a block works: rows of one key head, and its part of their keys.
struct DecodePlace {
  int batch, kv_head, first_row, rows, split;
};

// Blocks that read the same keys are neighbours.
template <int kRows>
__device__ __forceinline__ DecodePlace decode_place(const DecodeParams& d) {
  const AttentionParams& p = d.forward;
  const int all = p.heads / p.kv_heads * p.rows.num_queries, tiles = (all + kRows - 1) / kRows;
  const int tile = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int group = rest / d.splits, first = tile * kRows;
  return {group / p.kv_heads, group % p.kv_heads, first, smaller(all - first, kRows), rest % d.splits};
}

// A row of the tile: which query of which head it is.
struct PackedRow {
  int query, head;
  __device__ __forceinline__ PackedRow(const AttentionParams& p, const DecodePlace& place, int row) {
    const int ratio = p.heads / p.kv_heads, packed = place.first_row + row;
    query = packed / ratio;
    head = place.kv_head * ratio + packed % ratio;
  }
  __device__ __forceinline__ uint16_t* in(const TensorView& x, int batch) const {
    return static_cast<uint16_t*>(x.data) + batch * x.batch_stride + head * x.head_stride + query * x.token_stride;
  }
  // Its place in [B, heads, num_queries].
  __device__ __forceinline__ int64_t index(const AttentionParams& p, int batch) const {
    return (static_cast<int64_t>(batch) * p.heads + head) * p.rows.num_queries + query;
  }
};

template <class Traits>
__device__ __forceinline__ void load_packed_queries(unsigned char* tile, const AttentionParams& p,
                                                    const DecodePlace& place) {
  using Layout = TileLayout<Traits::kD>;
  for (int i = threadIdx.x; i < Traits::kRows * Layout::kChunks; i += Traits::kThreads) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    const int channels = row < place.rows ? p.head_dim - chunk * 8 : 0;
    const uint16_t* from = PackedRow(p, place, smaller(row, place.rows - 1)).in(p.query, place.batch) + chunk * 8;
    if (p.aligned)
      simt::cp_async16(simt::smem_address(tile) + Layout::offset(row, chunk), from, channels > 0);
    else
      copy_chunk(tile + Layout::offset(row, chunk), from, channels);
  }
}

struct PackedKeys {
  KeyTiles tiles;
  int end;  // slots of a cache from here on may never have been written
};

// What rows visit that are ordered by query: heads that share a tile may be shifted differently.
__device__ __forceinline__ PackedKeys packed_keys(const AttentionParams& p, const VisibleKeys* visible, int rows,
                                                  int size) {
  VisibleKeys first = visible[0], last = visible[rows - 1];
  if (p.band.group) {
    const int heads = smaller(p.heads / p.kv_heads, rows);  // each row among these is the first or the last of its head
    for (int h = 1; h < heads; ++h) {
      first = join_first(first, visible[h]);
      last = join_last(last, visible[rows - 1 - h]);
    }
  }
  return {RowBand::tiles_of(first, last, p.rows.sinks > 0, size), last.band.end};
}

// Adds a row's sums to those of keys before it; returns what the old and the new ones are to be multiplied by.
struct Merge {
  float old_weight, new_weight;
  __device__ __forceinline__ Merge(RowSum& into, const RowSum& more) {
    const float top = fmaxf(into.maximum, more.maximum), base = top == -INFINITY ? 0.0f : top;
    old_weight = simt::exp2_fast(into.maximum - base);
    new_weight = simt::exp2_fast(more.maximum - base);
    into = {top, into.sum * old_weight + more.sum * new_weight};
  }
};

__device__ __forceinline__ float log_sum_exp2(const RowSum& row) {
  return row.sum == 0.0f ? -INFINITY : row.maximum + log2f(row.sum);
}

// Stores 8 channels of a row; `from` are scaled. `data` is the row's.
template <typename Type>
__device__ __forceinline__ void store_channels(uint16_t* data, const float (&from)[8], float scale, int channels,
                                               bool aligned) {
  simt::Chunk packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.word[i] = Type::pack(from[2 * i] * scale, from[2 * i + 1] * scale);
  if (aligned) return simt::store_chunk(data, packed);
#pragma unroll
  for (int c = 0; c < 8; ++c)
    if (c < channels) data[c] = static_cast<uint16_t>(packed.word[c / 2] >> 16 * (c % 2));
}

// Merges the warps that share rows, in their order, and writes the rows: whole ones, or one split's part.
template <class Traits>
__device__ __forceinline__ void store_merged(const DecodeParams& d, const DecodePlace& place, const float* sums,
                                             const RowSum* row_sums) {
  const AttentionParams& p = d.forward;
  const int chunks = (p.head_dim + 7) / 8;
  for (int i = threadIdx.x; i < place.rows * chunks; i += Traits::kThreads) {
    const int row = i / chunks, channel = i % chunks * 8;
    const PackedRow at(p, place, row);
    const float sink = p.sink_logits && d.splits == 1 ? p.sink_logits[at.head] * kLog2E : -INFINITY;
    RowSum total{sink, sink == -INFINITY ? 0.0f : 1.0f};
    float out[8] = {};
#pragma unroll
    for (int w = 0; w < Traits::kKeyWarps; ++w) {
      const int from = w * Traits::kRows + row;
      const Merge merge(total, row_sums[from]);
#pragma unroll
      for (int c = 0; c < 8; ++c)
        out[c] = out[c] * merge.old_weight + sums[from * Traits::kMergeStride + channel + c] * merge.new_weight;
    }
    const float scale = total.sum == 0.0f ? 0.0f : 1.0f / total.sum, lse2 = log_sum_exp2(total);
    const int64_t index = at.index(p, place.batch);
    if (d.splits == 1) {
      store_channels<typename Traits::Type>(at.in(p.out, place.batch) + channel, out, scale, p.head_dim - channel,
                                            p.aligned);
      if (channel == 0) p.lse[index] = lse2 * kLn2;
      continue;
    }
    const int64_t part = index * d.splits + place.split;
    if (channel == 0) d.partial_lse[part] = lse2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      simt::Chunk moved;
#pragma unroll
      for (int c = 0; c < 4; ++c) moved.word[c] = simt::as_bits(out[4 * half + c] * scale);
      simt::store_chunk(d.partial_out + part * d.partial_stride + channel + 4 * half, moved);
    }
  }
}

// Each warp leaves its rows' sums where Q and the ring were.
template <class Traits, class State>
__device__ __forceinline__ void stage_sums(State& state, float factor, float* sums, RowSum* row_sums, int warp,
                                           int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + 8 * half + lane / 4;
    float total = state.sum[0][half];
    total += simt::shfl_xor(total, 1);
    total += simt::shfl_xor(total, 2);
    if (lane % 4 == 0) row_sums[row] = {state.maximum[0][half] * factor, total};
    float* to = sums + row * Traits::kMergeStride + 2 * (lane % 4);
#pragma unroll
    for (int c = 0; c < Traits::kD / 8; ++c) {
      to[8 * c] = state.out[0][c][2 * half];
      to[8 * c + 1] = state.out[0][c][2 * half + 1];
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2) window_attn_decode(const __grid_constant__ DecodeParams d) {
  constexpr int kD = Traits::kD, kBlockN = Traits::kBlockN, kThreads = Traits::kThreads, kSlots = Traits::kSlots;
  SIMT_SHARED(shared);
  unsigned char* ring = shared + Traits::kQueryBytes;
  VisibleKeys* visible = reinterpret_cast<VisibleKeys*>(shared + Traits::kTileBytes);
  RowSum* row_sums = reinterpret_cast<RowSum*>(visible + Traits::kRows);
  HeadRows* streams = reinterpret_cast<HeadRows*>(row_sums + Traits::kWarps * 16);  // K, V
  KeyTiles& tiles = *reinterpret_cast<KeyTiles*>(streams + 2);

  const AttentionParams& p = d.forward;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % Traits::kRowWarps * 16, warp_key = warp / Traits::kRowWarps * Traits::kWarpKeys;
  const DecodePlace place = decode_place<Traits::kRows>(d);
  load_packed_queries<Traits>(shared, p, place);  // joins the first tile of K
  for (int r = thread; r < Traits::kRows; r += kThreads) {
    const PackedRow row(p, place, smaller(r, place.rows - 1));
    visible[r] = row_band(p, place.batch, row.head).keys(row.query);
  }
  __syncthreads();
  if (thread == 0) {
    const PackedKeys keys = packed_keys(p, visible, place.rows, kBlockN);
    tiles = keys.tiles;
    streams[0] = head_rows(p.key, place.batch, place.kv_head, keys.end, p.head_dim, p.aligned);
    streams[1] = head_rows(p.value, place.batch, place.kv_head, keys.end, p.head_dim, p.aligned);
  }
  __syncthreads();
  const int64_t count = tiles.count();
  const int first = static_cast<int>(count * place.split / d.splits);
  const int steps = 2 * (static_cast<int>(count * (place.split + 1) / d.splits) - first);
  const auto load = [&](int step) {
    if (step < steps)
      load_tile<kD, kBlockN, kThreads>(ring + step % kSlots * Traits::kSlotBytes, streams[step % 2],
                                       tiles.begin(first + step / 2));
    simt::cp_async_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kSlots - 1; ++step) load(step);
  const bool real = warp_row < place.rows;
  const Logits logits(p);
  SoftmaxWarp<typename Traits::Type, kD, Traits::kWarpKeys, 1> state(shared, warp_row, ring, ring, warp_key, lane);
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    const int tile = first + step / 2;
    simt::cp_async_wait<kSlots - 2>();
    __syncthreads();  // K is there, the last V is done with
    load(step + kSlots - 1);
    if (real) {
      state.multiply_keys(step % kSlots * Traits::kSlotBytes);
      if (logits.kind == Logits::kCapped) state.template form_logits<true>(logits);
      if (logits.kind == Logits::kScaled) state.template form_logits<false>(logits);
      if (!tiles.interior(tile)) state.mask(visible + warp_row, tiles.begin(tile) + warp_key, lane);
      state.exponentiate(logits.factor);
    }
    simt::cp_async_wait<kSlots - 2>();
    __syncthreads();  // V is there, K is done with
    load(step + kSlots);
    if (real) state.multiply_values((step + 1) % kSlots * Traits::kSlotBytes);
  }
  simt::cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
  stage_sums<Traits>(state, logits.factor, sums, row_sums, warp, lane);
  __syncthreads();
  store_merged<Traits>(d, place, sums, row_sums);
}

// One row a block: threads take 8 channels of every kGroups-th split each, whose sums are added in order.
constexpr int kCombineThreads = 128, kMostSplits = 128;
constexpr int kCombineBytes = (kCombineThreads * 8 + kMostSplits) * static_cast<int>(sizeof(float));
static_assert(kMostSplits <= kCombineThreads);
template <typename Type>
__global__ void __launch_bounds__(kCombineThreads) window_attn_combine(const __grid_constant__ DecodeParams d) {
  SIMT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [kCombineThreads, 8]
  float* lse2 = sums + kCombineThreads * 8;        // [splits]
  const AttentionParams& p = d.forward;
  const int thread = threadIdx.x, chunks = (p.head_dim + 7) / 8, groups = kCombineThreads / chunks;
  const int64_t row = blockIdx.x, batch_head = row / p.rows.num_queries;
  const int head = static_cast<int>(batch_head % p.heads);
  if (thread < d.splits) lse2[thread] = d.partial_lse[row * d.splits + thread];
  __syncthreads();
  const float sink = p.sink_logits ? p.sink_logits[head] * kLog2E : -INFINITY;
  float top = sink;
  for (int split = 0; split < d.splits; ++split) top = fmaxf(top, lse2[split]);
  const float base = top == -INFINITY ? 0.0f : top;
  float total = simt::exp2_fast(sink - base);
  for (int split = 0; split < d.splits; ++split) total += simt::exp2_fast(lse2[split] - base);

  float own[8] = {};
  const int channel = thread % chunks * 8;
#pragma unroll 4
  for (int split = thread / chunks; split < d.splits && thread < groups * chunks; split += groups) {
    const float* from = d.partial_out + (row * d.splits + split) * d.partial_stride + channel;
    const simt::Chunk halves[2] = {simt::load_chunk(from), simt::load_chunk(from + 4)};
    const float weight = simt::exp2_fast(lse2[split] - base);
#pragma unroll
    for (int c = 0; c < 8; ++c) own[c] += simt::as_float(halves[c / 4].word[c % 4]) * weight;
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) sums[thread * 8 + c] = own[c];
  __syncthreads();
  if (thread == 0) p.lse[row] = log_sum_exp2({base, total}) * kLn2;
  if (thread >= chunks) return;
  for (int group = 1; group < groups; ++group)
#pragma unroll
    for (int c = 0; c < 8; ++c) own[c] += sums[(group * chunks + thread) * 8 + c];
  uint16_t* out = static_cast<uint16_t*>(p.out.data) + batch_head / p.heads * p.out.batch_stride +
                  head * p.out.head_stride + row % p.rows.num_queries * p.out.token_stride;
  store_channels<Type>(out + channel, own, total == 0.0f ? 0.0f : 1.0f / total, p.head_dim - channel, p.aligned);
}

}  // namespace longattn::cuda
