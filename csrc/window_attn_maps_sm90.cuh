// What launchers of the kernels for compute capability 9.0 share: which calls these can serve, and the maps that copies
// follow.
#pragma once

#include <cstdlib>
#include <string_view>

#include "window_attn_ring_sm90.cuh"
#include "window_attn_sm90.h"

namespace longattn::cuda {

// Whether LONGATTN_HOPPER=1 asks for these kernels (README, "Install") and the current device has them.
inline bool asked_for_sm90() {
  static const bool asked = [] {
    const char* value = std::getenv("LONGATTN_HOPPER");
    return value && std::string_view(value) == "1";
  }();
  return asked && simt::is_sm90();
}

// Strides that a tensor map can't hold: of dimensions that are walked, they must be positive multiples of 16 bytes.
inline const char* why_no_map(const TensorView& x, int64_t batch, int64_t heads, int64_t tokens) {
  if (reinterpret_cast<uintptr_t>(x.data) % 16) return "tensors that start at multiples of 16 bytes";
  const int64_t sizes[] = {batch, heads, tokens}, strides[] = {x.batch_stride, x.head_stride, x.token_stride};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && (strides[i] <= 0 || strides[i] % 8 || strides[i] >= int64_t{1} << 39))
      return "strides that are positive multiples of 16 bytes";
  return nullptr;
}

// The heads that share a tile, as a power of two: neighbours that share keys and see the same ones.
inline int packed_bits(const AttentionParams& p) {
  const int ratio = p.heads / p.kv_heads;
  int bits = 0;
  for (; bits < 6 && ratio % (2 << bits) == 0; ++bits) {
    if (p.band.group == 0) continue;
    for (int head = 0; head < p.heads; ++head)
      if (p.shifts[head] != p.shifts[head >> (bits + 1) << (bits + 1)]) return bits;
  }
  return bits;
}

// Boxes hold so many rows: `packed` heads of each token.
template <class Traits>
bool map_of(simt::TensorMap& map, const TensorView& x, const AttentionParams& p, int heads, int tokens, int packed,
            int rows) {
  const auto stride = [](int64_t size, int64_t elements) {
    return static_cast<uint64_t>(size > 1 ? 2 * elements : 16);
  };
  return simt::encode_map(
      map, x.data,
      {static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(heads), static_cast<uint64_t>(tokens),
       static_cast<uint64_t>(p.batch)},
      {stride(heads, x.head_stride), stride(tokens, x.token_stride), stride(p.batch, x.batch_stride)},
      {Traits::kPanelChannels, static_cast<uint32_t>(packed), static_cast<uint32_t>(rows / packed), 1},
      Traits::kRowBytes);
}

// Maps of tensors like query or like key, in boxes of 64 rows or of a tile's columns.
template <class Traits>
struct HopperMaps {
  const HopperParams& p;
  bool made = true;

  void query(simt::TensorMap& map, const TensorView& x, int rows) {
    made &=
        map_of<Traits>(map, x, p.attention, p.attention.heads, p.attention.rows.num_queries, 1 << p.packed_bits, rows);
  }
  void key(simt::TensorMap& map, const TensorView& x, int rows) {
    made &= map_of<Traits>(map, x, p.attention, p.attention.kv_heads, p.attention.rows.num_keys, 1, rows);
  }
};

// Deals out `tiles` tiles of rows for each of `sets` sets of heads of each batch; false where there are too many.
inline bool deal_tiles(HopperParams& p, int64_t rows, int64_t rows_of_tile, int64_t sets) {
  const int64_t tiles = (rows + rows_of_tile - 1) / rows_of_tile, total = tiles * sets * p.attention.batch;
  if (total > kMostIndex) return false;
  p.tiles_of_heads = static_cast<int>(tiles);
  p.tiles_in_total = static_cast<int>(total);
  return true;
}

// As many blocks as multiprocessors, or tiles.
inline cudaError_t count_blocks(const HopperParams& p, dim3& grid) {
  int multiprocessors = 0;
  const cudaError_t error = simt::count_multiprocessors(multiprocessors);
  grid = dim3(static_cast<unsigned>(smaller(p.tiles_in_total, multiprocessors)));
  return error;
}

}  // namespace longattn::cuda
