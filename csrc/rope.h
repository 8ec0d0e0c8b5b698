// Rotary embedding on CUDA: what bindings_cuda.cpp and the kernel share. No torch header.
#pragma once

#include <cstdint>

#ifdef LONGATTN_EMULATED
#include "simt.h"
#else
#include <driver_types.h>
#endif

namespace longattn::cuda {

enum class RopeElement : int32_t { kFloat32, kBFloat16, kFloat16 };

// One of query and key. Strides in elements, of the batch, head and token dims; channels are contiguous.
struct RopeTensor {
  const void* x;  // [B, heads, S, D]
  void* out;      // [B, heads, S, D]; may be x itself
  int64_t heads;
  int64_t x_stride[3], out_stride[3];
};

struct RopeParams {
  RopeTensor tensors[2];   // query, key
  const float *cos, *sin;  // [B or 1, S, half]; strides in elements, of the batch (0 where shared) and token dims
  int64_t cos_stride[2], sin_stride[2];
  int64_t batch, tokens, head_dim;
  int64_t half;  // rotated pairs a row; 2 * half <= head_dim
  RopeElement element;
  bool interleaved;
  bool inverse;  // rotate by the negated angle, which is the backward pass
};

cudaError_t rope_forward(const RopeParams& params, cudaStream_t stream);

}  // namespace longattn::cuda
