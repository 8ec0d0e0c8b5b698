// Backward of banded attention, the pass for dQ: a block takes kRows queries of one head and walks their key tiles.
//
// dQ = scale * sum over keys of dS K. Shared memory: Q and dO [kRows, kD]; kStages of K and V [kColumns, kD]; what each
// row sees. See window_attn_bwd_tile.cuh.
#pragma once

#include "window_attn_bwd_tile.cuh"

namespace longattn::cuda {

struct QueryPassPlan {
  int batch, head, kv_head, first_query;
  HeadRows key, value;
  KeyTiles tiles;
  Logits logits;
};

template <class Traits>
constexpr int query_pass_shared_bytes() {
  return Traits::kTileBytes + Traits::kRows * static_cast<int>(sizeof(VisibleKeys) + sizeof(float)) +
         static_cast<int>(sizeof(QueryPassPlan));
}

template <class Traits>
__device__ __forceinline__ void load_keys(unsigned char* stages, const QueryPassPlan& plan, int tile) {
  unsigned char* stage = stages + tile % Traits::kStages * Traits::kStageBytes;
  const int begin = plan.tiles.begin(tile);
  load_tile<Traits::kD, Traits::kColumns, Traits::kThreads>(stage, plan.key, begin);
  load_tile<Traits::kD, Traits::kColumns, Traits::kThreads>(stage + Traits::kColumnTileBytes, plan.value, begin);
  simt::cp_async_commit();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) window_attn_bwd_query(const __grid_constant__ BackwardParams b) {
  constexpr int kD = Traits::kD, kRows = Traits::kRows, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  static_assert(Traits::kRoles == 1);
  SIMT_SHARED(shared);
  unsigned char* stages = shared + 2 * Traits::kRowTileBytes;
  VisibleKeys* visible = reinterpret_cast<VisibleKeys*>(shared + Traits::kTileBytes);
  float* deltas = reinterpret_cast<float*>(visible + kRows);
  QueryPassPlan& plan = *reinterpret_cast<QueryPassPlan*>(deltas + kRows);

  const AttentionParams& p = b.forward;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warp_row = warp * Traits::kWarpRows;
  const int num_queries = p.rows.num_queries;
  const int ratio = p.heads / p.kv_heads, query_tiles = (num_queries + kRows - 1) / kRows;
  const int tile_of_group = static_cast<int>(blockIdx.x) / ratio, group = tile_of_group / query_tiles;
  const int batch = group / p.kv_heads, kv_head = group % p.kv_heads;
  const int head = kv_head * ratio + static_cast<int>(blockIdx.x) % ratio;
  const int first_query = (query_tiles - 1 - tile_of_group % query_tiles) * kRows;
  const int rows = smaller(num_queries - first_query, kRows);

  const RowBand band = row_band(p, batch, head);
  for (int r = thread; r < kRows; r += kThreads) visible[r] = band.keys(first_query + smaller(r, rows - 1));
  __syncthreads();
  const KeyTiles tiles = RowBand::tiles_of(visible[0], visible[rows - 1], p.rows.sinks > 0, kColumns);
  const int seen_end = visible[rows - 1].band.end;  // slots of a cache from here on may never have been written
  if (thread == 0)
    plan = {batch,
            head,
            kv_head,
            first_query,
            head_rows(p.key, batch, kv_head, seen_end, p.head_dim, p.aligned),
            head_rows(p.value, batch, kv_head, seen_end, p.head_dim, p.aligned),
            tiles,
            Logits(p)};
  __syncthreads();
  if (tiles.count() > 0) {
    load_tile<kD, kRows, kThreads>(shared, head_rows(p.query, batch, head, num_queries, p.head_dim, p.aligned),
                                   first_query);
    load_tile<kD, kRows, kThreads>(shared + Traits::kRowTileBytes,
                                   head_rows(b.grad_out, batch, head, num_queries, p.head_dim, p.aligned), first_query);
    load_keys<Traits>(stages, plan, 0);
  }

  // Half of the row's statistics in registers, half in shared memory: neither has room for all.
  float lse2[Traits::kRowBlocks][2];
#pragma unroll
  for (int r = 0; r < Traits::kRowBlocks; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * r + 8 * half + lane / 4;  // past the end the last one's; nothing of it is stored
      const RowStats own =
          b.stats[(static_cast<int64_t>(batch) * p.heads + head) * num_queries + first_query + smaller(row, rows - 1)];
      lse2[r][half] = own.lse2;
      if (lane % 4 == 0) deltas[row] = own.delta;
    }
  __syncwarp();
  const float* own_deltas = deltas + warp_row + lane / 4;
  const auto stats = [&](int r, int half, int, int) { return RowStats{lse2[r][half], own_deltas[16 * r + 8 * half]}; };
  const bool real = warp_row < rows;
  const WarpKeys keys{visible[warp_row], visible[warp_row + Traits::kWarpRows - 1]};
  BackwardWarp<Traits> state(shared, warp, lane);
  typename BackwardWarp<Traits>::Gradient gradient;
  state.clear(gradient);
#pragma unroll 1
  for (int t = 0; t < plan.tiles.count(); ++t) {
    const int begin = plan.tiles.begin(t), stage = t % Traits::kStages;
    if (Traits::kStages == 2 && t + 1 < plan.tiles.count()) {
      load_keys<Traits>(stages, plan, t + 1);
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    __syncthreads();
    if (real && keys.seen(begin, begin + kColumns)) {
      state.template form_weights<true>(stage, plan.logits, stats);
      if (!keys.interior(begin, begin + kColumns))
        state.template mask<true>([&](int row, int word) { return visible[warp_row + row].bits(begin + 32 * word); },
                                  lane);
      state.accumulate(gradient, state.dp, stage, 0);
    }
    __syncthreads();  // the stage is done with
    if (Traits::kStages == 1 && t + 1 < plan.tiles.count()) load_keys<Traits>(stages, plan, t + 1);
  }
  if (!real) return;
  state.stage_rows(shared, gradient, p.scale, warp, lane);
  __syncwarp();
  uint16_t* out = static_cast<uint16_t*>(b.grad_query.data) + plan.batch * b.grad_query.batch_stride +
                  plan.head * b.grad_query.head_stride;
  store_rows<kD, Traits::kWarpRows>(shared, warp_row, b.grad_query, out, plan.first_query + warp_row, num_queries,
                                    p.head_dim, p.aligned);
}

}  // namespace longattn::cuda
