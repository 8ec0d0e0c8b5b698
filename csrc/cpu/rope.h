// Rotary embedding on the CPU: the contract between bindings.cpp and the kernel, and between the kernel and the rows
// that each instruction set rotates in its own way. No torch header.
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

// Rows of one head or of one token, each `half` pairs; strides in elements.
struct RopeRows {
  const void* x;
  void* out;
  const void* next;  // the first of as many rows that come after these, to be asked for
  const float *cos, *sin;
  int64_t x_stride, out_stride, cos_stride, sin_stride, count, half;
  float sign;   // of the angle
  bool stream;  // whether to write around the caches
};

// The rows of one instruction set.
struct RopeKernels {
  using Rotate = void (*)(const RopeRows& rows);
  Rotate float32[2], bfloat16[2];  // half-split, interleaved
  bool streams;                    // whether it can write around the caches
};

// The best that this processor has and LONGATTN_CPU_ISA allows; null where there are none.
const RopeKernels* rope_kernels();

}  // namespace longattn::cpu
