// Rotary embedding on the CPU: the contract between bindings.cpp and the kernel. No torch header.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace longattn::cpu {

// One of query and key. Strides in elements, of the batch, head and token dims; channels are contiguous.
struct RopeTensor {
  const void* x;  // [B, heads, S, D]
  void* out;      // [B, heads, S, D]
  int64_t heads;
  int64_t x_stride[3];
  int64_t out_stride[3];
};

struct RopeParams {
  RopeTensor tensors[2];  // query, key
  const float* cos;       // [B or 1, S, half]; strides in elements, of the batch (0 where shared) and token dims
  const float* sin;
  int64_t cos_stride[2];
  int64_t sin_stride[2];
  int64_t batch, tokens, head_dim;
  int64_t half;  // rotated pairs a row; 2 * half <= head_dim
  bool interleaved;
  bool inverse;  // rotate by the negated angle, which is the backward pass
};

void rope_float32(const RopeParams& params, ParallelFor parallel_for);
void rope_bfloat16(const RopeParams& params, ParallelFor parallel_for);

}  // namespace longattn::cpu
