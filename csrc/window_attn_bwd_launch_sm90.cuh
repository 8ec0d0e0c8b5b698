// What launchers of the backward for compute capability 9.0 share, whatever its passes: parameters of a call, and the
// maps of what has keys for rows.
#pragma once

#include "window_attn_bwd_tile_sm90.cuh"
#include "window_attn_maps_sm90.cuh"

namespace longattn::cuda {

inline void fill_backward(HopperBackwardParams& p, const BackwardParams& b) {
  p.attention = b.forward;
  p.packed_bits = packed_bits(b.forward);
  p.stats = b.stats;
  p.sink_sums = b.sink_sums;
  p.sink_keys = b.sink_keys;
  p.sink_chunks = b.sink_chunks;
}

// Rows are keys, whose tiles are dealt out; false where that can't be.
template <class Traits>
bool walk_keys(HopperBackwardParams& p, HopperMaps<Traits>& maps, const BackwardParams& b) {
  p.parts = b.forward.heads / b.forward.kv_heads >> p.packed_bits;
  maps.key(p.rows[0], b.forward.key, Traits::kGroupRows);
  maps.key(p.rows[1], b.forward.value, Traits::kGroupRows);
  maps.query(p.streamed[0], b.forward.query, Traits::kColumns);
  maps.query(p.streamed[1], b.grad_out, Traits::kColumns);
  maps.key(p.out[0], b.grad_key, Traits::kGroupRows);
  maps.key(p.out[1], b.grad_value, Traits::kGroupRows);
  return maps.made && deal_tiles(p, b.forward.rows.num_keys, Traits::kRows, b.forward.kv_heads);
}

}  // namespace longattn::cuda
