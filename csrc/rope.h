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

// Where phases are formed in the kernel. Positions are given, or count from the start of each packed document.
struct RopePhases {
  const double* inv_freq;    // [half], radians a token; null where tables are given
  const int64_t* positions;  // [B or 1, S] or null; strides in elements, of the batch (0 where shared) and token dims
  int64_t position_stride[2];
  const int32_t* cu_seqlens;  // [num_documents + 1] where there are no positions
  int num_documents;
  float scaling;  // of cos and sin
};

struct RopeParams {
  RopeTensor tensors[2];   // query, key
  const float *cos, *sin;  // [B or 1, S, half]; strides in elements, of the batch (0 where shared) and token dims
  int64_t cos_stride[2], sin_stride[2];
  RopePhases phases;
  int64_t batch, tokens, head_dim;
  int64_t half;  // rotated pairs a row; 2 * half <= head_dim
  RopeElement element;
  bool interleaved;
  bool inverse;  // rotate by the negated angle, which is the backward pass
};

// cudaErrorInvalidValue for more than 2^31 - 1 tokens, or more than kMostFormedPairs pairs whose phases are formed.
constexpr int64_t kMostFormedPairs = 4096;
cudaError_t rope_forward(const RopeParams& params, cudaStream_t stream);

}  // namespace longattn::cuda
