// Backward of banded attention, the pass for dK and dV: a block takes kRows keys of one key head and walks the query
// tiles that meet them, head after head of the group.
//
// dV = sum over queries of P dO, dK = scale * sum of dS Q. Shared memory: K and V [kRows, kD]; kStages of Q and dO
// [kColumns, kD] and of their RowStats; which queries see each key. See window_attn_bwd_tile.cuh, and
// window_attn_bwd_span.cuh for sinks, whose queries beyond the band are walked by blocks of their own (kSinks).
#pragma once

#include "window_attn_bwd_span.cuh"
#include "window_attn_bwd_tile.cuh"

namespace longattn::cuda {

template <class Traits>
constexpr int key_pass_shared_bytes() {
  return Traits::kTileBytes + Traits::kStages * Traits::kColumns * static_cast<int>(sizeof(RowStats)) +
         Traits::kRows * static_cast<int>(sizeof(Range));
}

template <class Traits, bool kSinks>
__device__ __forceinline__ KeyPassPlace key_pass_place(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  const int keys = kSinks ? b.sink_keys : p.rows.num_keys, tiles = (keys + Traits::kRows - 1) / Traits::kRows;
  const int tile = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int chunk = kSinks ? rest % b.sink_chunks : 0, group = kSinks ? rest / b.sink_chunks : rest;
  return {group / p.kv_heads, group % p.kv_heads, tile * Traits::kRows, chunk};
}

// Walks the tiles of queries, head after head.
template <class Traits, bool kSinks>
struct QueryWalk {
  int head, last_head, begin = 0;
  int end = 0;  // of the head's queries

  __device__ __forceinline__ QueryWalk(const AttentionParams& p, int kv_head)
      : head(kv_head * (p.heads / p.kv_heads) - 1), last_head(head + p.heads / p.kv_heads) {}
  // Goes to the next tile; false where there is none.
  __device__ __forceinline__ bool next(const KeyPassBand<Traits::kRows, kSinks>& of) {
    begin += Traits::kColumns;
    while (begin >= end) {
      if (head == last_head) return false;
      ++head;
      const Range span = of.span(row_band(of.p, of.place.batch, head));
      begin = span.begin;
      end = span.end;
    }
    return true;
  }
};

template <class Traits>
__device__ __forceinline__ void load_queries(unsigned char* stages, RowStats* stats, const BackwardParams& b, int batch,
                                             int head, int begin, int stage) {
  constexpr int kD = Traits::kD, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  const AttentionParams& p = b.forward;
  const int num_queries = p.rows.num_queries;
  unsigned char* to = stages + stage * Traits::kStageBytes;
  load_tile<kD, kColumns, kThreads>(to, head_rows(p.query, batch, head, num_queries, p.head_dim, p.aligned), begin);
  load_tile<kD, kColumns, kThreads>(to + Traits::kColumnTileBytes,
                                    head_rows(b.grad_out, batch, head, num_queries, p.head_dim, p.aligned), begin);
  const RowStats* from = b.stats + (static_cast<int64_t>(batch) * p.heads + head) * num_queries;
  const int column = threadIdx.x;
  if (column < kColumns)  // rows past the end get zeros: their Q and dO are zeros too, and add nothing
    simt::cp_async8(simt::smem_address(stats + stage * kColumns + column), from + begin + column,
                    begin + column < num_queries);
  simt::cp_async_commit();
}

// Calls visit(sum, its place in scratch) for every element of a gradient whose row has one: `places` holds those of the
// rows, as sums_of gives them.
template <class Traits, typename Visit>
__device__ __forceinline__ void visit_sinks(typename BackwardWarp<Traits>::Gradient& gradient, const BackwardParams& b,
                                            const KeyPassPlace& place, int which, const Range* places, int warp,
                                            int lane, const Visit& visit) {
  const AttentionParams& p = b.forward;
  const int64_t group = static_cast<int64_t>(place.batch) * p.kv_heads + place.kv_head;
#pragma unroll
  for (int r = 0; r < Traits::kRowBlocks; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range at = places[warp % Traits::kRowWarps * Traits::kWarpRows + 16 * r + 8 * half + lane / 4];
      const auto [chunk, sink] = at;
      if (chunk < 0) continue;
      float* row = b.sink_sums + (((group * b.sink_chunks + chunk) * 2 + which) * b.sink_keys + sink) * p.head_dim;
#pragma unroll
      for (int d = 0; d < Traits::kD / 8; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int channel = 8 * d + 2 * (lane % 4) + i;
          if (channel < p.head_dim) visit(gradient[r][d][2 * half + i], row[channel]);
        }
    }
}

// Adds the sums of a document's chunks, in order, into those of its first one: a thread takes one element of the sums
// of a chunk, and works where that is a first one.
constexpr int kSumThreads = 128;
template <int kThreads>
__global__ void __launch_bounds__(kThreads) window_attn_sum_chunks(const __grid_constant__ BackwardParams b) {
  const AttentionParams& p = b.forward;
  const int64_t elements = 2 * static_cast<int64_t>(b.sink_keys) * p.head_dim;  // of a chunk
  const int64_t blocks = (elements + kThreads - 1) / kThreads, group_chunk = blockIdx.x / blocks;
  const int64_t element = blockIdx.x % blocks * kThreads + threadIdx.x;
  const int first = static_cast<int>(group_chunk % b.sink_chunks);
  const int batch = static_cast<int>(group_chunk / b.sink_chunks) / p.kv_heads;
  const Range queries = document_of_chunk(row_band(p, batch, 0), first).queries;
  if (element >= elements || queries.empty() || queries.holds((first - 1) * kSinkChunk)) return;
  float* sums = b.sink_sums + group_chunk * elements + element;
  float sum = *sums;
  for (int next = 1; queries.holds((first + next) * kSinkChunk); ++next) sum += sums[next * elements];
  *sums = sum;
}

template <class Traits, bool kSinks>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kD == 32 ? 4 : 1)  // 128 registers hold 32 channels
    window_attn_bwd_key(const __grid_constant__ BackwardParams b) {
  constexpr int kD = Traits::kD, kRows = Traits::kRows, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  SIMT_SHARED(shared);
  unsigned char* stages = shared + 2 * Traits::kRowTileBytes;
  RowStats* stats = reinterpret_cast<RowStats*>(shared + Traits::kTileBytes);
  Range* seen_by = reinterpret_cast<Range*>(stats + Traits::kStages * kColumns);

  const AttentionParams& p = b.forward;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % Traits::kRowWarps * Traits::kWarpRows;
  const KeyPassBand<Traits::kRows, kSinks> of(b.forward, key_pass_place<Traits, kSinks>(b));
  const KeyPassPlace& place = of.place;
  const bool ordered = of.is_ordered();
  const int num_keys = p.rows.num_keys;

  BackwardWarp<Traits> state(shared, warp, lane);
  // With two roles, only one of the gradients is used; which one it is depends on the warp.
  const bool forms_key = Traits::kRoles == 1 || warp < Traits::kRowWarps;
  const bool forms_value = Traits::kRoles == 1 || !forms_key;
  typename BackwardWarp<Traits>::Gradient gradient[3 - Traits::kRoles];
  auto &grad_key = gradient[0], &grad_value = gradient[2 - Traits::kRoles];
  for (auto& each : gradient) state.clear(each);
  const Logits logits(p);
  QueryWalk<Traits, kSinks> ahead(p, place.kv_head);
  bool more = ahead.next(of);
  if (more) {
    load_tile<kD, kRows, kThreads>(
        shared, head_rows(p.key, place.batch, place.kv_head, num_keys, p.head_dim, p.aligned), place.first_key);
    load_tile<kD, kRows, kThreads>(shared + Traits::kRowTileBytes,
                                   head_rows(p.value, place.batch, place.kv_head, num_keys, p.head_dim, p.aligned),
                                   place.first_key);
    load_queries<Traits>(stages, stats, b, place.batch, ahead.head, ahead.begin, 0);
  }
  int head = -1;
#pragma unroll 1
  for (int t = 0; more; ++t) {
    const int stage = t % Traits::kStages, begin = ahead.begin, end = begin + kColumns;
    if (ahead.head != head) {
      head = ahead.head;
      const RowBand band = row_band(p, place.batch, head);
      for (int r = thread; r < kRows; r += kThreads) seen_by[r] = of.queries_of(band, place.first_key + r);
    }
    more = ahead.next(of);
    if (Traits::kStages == 2 && more) {
      load_queries<Traits>(stages, stats, b, place.batch, ahead.head, ahead.begin, stage ^ 1);
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    __syncthreads();
    const Range first = seen_by[warp_row], last = seen_by[warp_row + Traits::kWarpRows - 1];
    if (!ordered || Range{first.begin, last.end}.meets(begin, end)) {
      const bool interior = ordered && Range{last.begin, first.end}.covers(begin, end);
      const RowStats* column_stats = stats + stage * kColumns + 2 * (lane % 4);
      const auto stats_of = [column_stats](int, int, int n, int i) { return column_stats[8 * n + i]; };
      const auto bits = [&](int row, int word) { return seen_by[warp_row + row].bits(begin + 32 * word); };
      if (forms_key) {
        state.template form_weights<true>(stage, logits, stats_of);
        if (!interior) state.template mask<true>(bits, lane);
        if (forms_value) state.accumulate(grad_value, state.s, stage, 1);
        state.accumulate(grad_key, state.dp, stage, 0);
      } else {
        state.template form_weights<false>(stage, logits, stats_of);
        if (!interior) state.template mask<false>(bits, lane);
        state.accumulate(grad_value, state.s, stage, 1);
      }
    }
    __syncthreads();  // the stage and the rows' ranges are done with
    if (Traits::kStages == 1 && more) load_queries<Traits>(stages, stats, b, place.batch, ahead.head, ahead.begin, 0);
  }

  if (b.sink_chunks > 0) {
    for (int r = thread; r < kRows; r += kThreads) seen_by[r] = of.sums_of(place.first_key + r);
    __syncthreads();
    const auto visit = [&](const auto& visit_sum) {
      if (forms_key) visit_sinks<Traits>(grad_key, b, place, 0, seen_by, warp, lane, visit_sum);
      if (forms_value) visit_sinks<Traits>(grad_value, b, place, 1, seen_by, warp, lane, visit_sum);
    };
    if (kSinks) return visit([](float sum, float& kept) { kept = sum; });
    visit([](float& sum, float kept) { sum += kept; });
  }

  if (forms_key) state.stage_rows(shared, grad_key, p.scale, warp, lane);
  if (forms_value) state.stage_rows(shared + Traits::kRowTileBytes, grad_value, 1.0f, warp, lane);
  __syncthreads();
  const auto store = [&](const unsigned char* tile, const TensorView& x) {
    uint16_t* rows = static_cast<uint16_t*>(x.data) + place.batch * x.batch_stride + place.kv_head * x.head_stride;
    const int row = warp * (kRows / Traits::kWarps);
    store_rows<kD, kRows / Traits::kWarps>(tile, row, x, rows, place.first_key + row, num_keys, p.head_dim, p.aligned);
  };
  store(shared, b.grad_key);
  store(shared + Traits::kRowTileBytes, b.grad_value);
}

}  // namespace longattn::cuda
