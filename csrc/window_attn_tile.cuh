// Tiles of [rows, kD] 16-bit elements in shared memory: swizzle, loads, and the addresses of matrix fragments.
//
// A row is kD / 8 chunks of 16 bytes. A chunk's place in its row is XORed with the row's number, within aligned runs of
// 8 chunks (4 where the row is no multiple of 8), so that the 8 rows of a matrix lie in 8 different bank groups. The
// XOR touches the lowest bits only and repeats every 8 rows: each lane forms its few addresses once, and all others are
// those plus compile-time constants.
#pragma once

#include "simt.h"
#include "window_attn.h"

namespace longattn::cuda {

template <int kD>
struct TileLayout {
  static_assert(kD % 32 == 0);
  static constexpr int kChunks = kD / 8;
  static constexpr int kRun = kChunks % 8 == 0 ? 8 : 4;  // chunks that the XOR mixes
  static constexpr int kRowBytes = kD * 2;

  __device__ static __forceinline__ int mix(int row) { return kRun == 8 ? row & 7 : (row >> 1) & 3; }
  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + (chunk ^ mix(row)) * 16);
  }
};

// One lane's addresses of ldmatrix: row `row` of a tile, chunk 2 i + `half` for the i-th 16 channels. Tiles begin at
// multiples of a run's bytes, so that the XOR may be applied to the address itself.
template <int kD>
struct FragmentAddress {
  using Layout = TileLayout<kD>;
  static constexpr int kRunBytes = Layout::kRun * 16;
  uint32_t base;

  __device__ __forceinline__ FragmentAddress(uint32_t tile, int row, int half)
      : base(tile + Layout::offset(row, half)) {}
  // `rows` further down, a multiple of 8.
  __device__ __forceinline__ uint32_t at(int channels16, int rows) const {
    const int bytes = channels16 * 32;
    return (base ^ bytes % kRunBytes) + bytes / kRunBytes * kRunBytes + rows * Layout::kRowBytes;
  }
};

// Rows of one head of one batch row in global memory.
struct HeadRows {
  const uint16_t* data;
  int64_t stride;  // elements from one token to the next
  int rows, channels;
  bool aligned;
};

__device__ __forceinline__ HeadRows head_rows(const TensorView& x, int batch, int head, int rows, int channels,
                                              bool aligned) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  return {data + batch * x.batch_stride + head * x.head_stride, x.token_stride, rows, channels, aligned};
}

// Copies 8 elements of a row that lie anywhere, `channels` of which exist; the others become zeros.
__device__ __forceinline__ void copy_chunk(unsigned char* to, const uint16_t* from, int channels) {
  simt::Chunk moved;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < channels ? from[2 * i] : 0;
    const uint32_t high = 2 * i + 1 < channels ? from[2 * i + 1] : 0;
    moved.word[i] = low | high << 16;
  }
  *reinterpret_cast<simt::Chunk*>(to) = moved;
}

// Loads rows `from` .. from + kRows - 1; rows and channels that do not exist become zeros. Asynchronous where the
// memory is aligned: the caller commits and waits.
template <int kD, int kRows, int kThreads>
__device__ __forceinline__ void load_tile(unsigned char* tile, const HeadRows& source, int from) {
  using Layout = TileLayout<kD>;
  constexpr int kStep = kThreads / Layout::kRun;  // rows that all threads load at once
  static_assert(kRows % kStep == 0 && kStep % 8 == 0);
  const int row = threadIdx.x / Layout::kRun, chunk = threadIdx.x % Layout::kRun;
  const uint16_t* data = source.data + (from + row) * source.stride + chunk * 8;
  if (source.aligned) {
    const uint32_t to = simt::smem_address(tile) + Layout::offset(row, chunk);
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
      const bool exists = from + row + r < source.rows;
#pragma unroll
      for (int c = 0; c < Layout::kChunks; c += Layout::kRun)
        simt::cp_async16(to + r * Layout::kRowBytes + c * 16, data + c * 8,
                         exists && (c + chunk) * 8 < source.channels);
      data += kStep * source.stride;
    }
    return;
  }
#pragma unroll 1
  for (int r = 0; r < kRows; r += kStep) {
    const bool exists = from + row + r < source.rows;
#pragma unroll 1
    for (int c = 0; c < Layout::kChunks; c += Layout::kRun) {
      copy_chunk(tile + Layout::offset(row + r, c + chunk), data + c * 8,
                 exists ? source.channels - (c + chunk) * 8 : 0);
    }
    data += kStep * source.stride;
  }
}

// Writes rows `from` .. from + kRows - 1 of a tile that this warp alone has filled; those past the end are left out.
template <int kD, int kRows>
__device__ __forceinline__ void store_rows(const unsigned char* tile, int tile_row, const TensorView& x, uint16_t* head,
                                           int from, int rows, int channels, bool aligned) {
  using Layout = TileLayout<kD>;
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int i = lane; i < kRows * Layout::kChunks; i += 32) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    if (from + row >= rows || chunk * 8 >= channels) continue;
    const simt::Chunk moved = *reinterpret_cast<const simt::Chunk*>(tile + Layout::offset(tile_row + row, chunk));
    uint16_t* to = head + (from + row) * x.token_stride + chunk * 8;
    if (aligned) {
      simt::store_chunk(to, moved);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (chunk * 8 + c < channels) to[c] = static_cast<uint16_t>(moved.word[c / 2] >> 16 * (c % 2));
    }
  }
}

}  // namespace longattn::cuda
