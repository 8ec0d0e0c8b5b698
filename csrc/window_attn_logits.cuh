// How products of queries and keys become logits, and which of them a warp's rows see: shared by forward and backward.
#pragma once

#include <cmath>

#include "simt.h"
#include "window_attn.h"

namespace longattn::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ RowBand row_band(const AttentionParams& p, int batch, int head) {
  Band band = p.band;
  if (band.group) band.shift = p.shifts[head];
  return RowBand(band, p.rows, batch);
}

// How products become logits: exponents are factor * x in base 2, after x = tanh(inner * x), x = inner * x or neither.
struct Logits {
  float inner, factor;
  enum { kPlain, kScaled, kCapped } kind;

  __device__ __forceinline__ explicit Logits(const AttentionParams& p) {
    if (p.softcap > 0) {
      kind = kCapped;
      inner = p.scale / p.softcap;
      factor = p.softcap * kLog2E;
    } else {
      kind = p.scale > 0 ? kPlain : kScaled;  // the running maximum needs a factor above 0
      inner = p.scale;
      factor = p.scale > 0 ? p.scale * kLog2E : kLog2E;
    }
  }
  __device__ __forceinline__ float scaled(float x) const { return inner * x; }
  // tanh by the two fast instructions that it takes: the absolute error is that of float32.
  __device__ __forceinline__ float capped(float x) const {
    return 1.0f - simt::divide_fast(2.0f, 1.0f + simt::exp2_fast(fminf(2.0f * kLog2E * inner * x, 64.0f)));
  }
};

// What the rows of a warp see, from its first and last; both lie in shared memory.
struct WarpKeys {
  const VisibleKeys &first, &last;
  __device__ __forceinline__ bool seen(int begin, int end) const {
    return Range{first.band.begin, last.band.end}.meets(begin, end) || first.sinks.meets(begin, end);
  }
  __device__ __forceinline__ bool interior(int begin, int end) const {
    return Range{last.band.begin, first.band.end}.covers(begin, end);
  }
};

}  // namespace longattn::cuda
