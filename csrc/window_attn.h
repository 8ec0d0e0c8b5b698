// Banded attention on CUDA: what bindings.cpp and the kernels share. No torch header.
#pragma once

#include <cstdint>

#include "band.h"
#include "simt.h"

namespace longattn::cuda {

constexpr int kMaxHeads = 256;                             // query heads whose shifts a launch can carry
constexpr int64_t kMostIndex = (int64_t{1} << 31) - 1024;  // of tokens and blocks; leaves room for a tile's end

struct TensorView {  // [B, H, S, D], 16-bit floats, channels contiguous
  void* data;
  int64_t batch_stride, head_stride, token_stride;  // elements
};

struct AttentionParams {
  TensorView query;          // [B, heads, num_queries, head_dim]
  TensorView key, value;     // [B, kv_heads, num_keys, head_dim]
  TensorView out;            // like query
  float* lse;                // [B, heads, num_queries], natural log
  const float* sink_logits;  // [heads] or null
  Rows rows;
  Band band;                  // but for the shift
  int32_t shifts[kMaxHeads];  // of each query head, where the band is a group
  int32_t batch, heads, kv_heads, head_dim;
  float scale, softcap;  // logits are softcap * tanh(scale * dot / softcap), scale * dot where softcap is 0
  bool bf16;             // else fp16
  bool aligned;          // all tensors may be moved in chunks of 16 bytes: chunks_fit, and head_dim a multiple of 8
};

inline bool chunks_fit(const TensorView& x) {
  return (reinterpret_cast<uintptr_t>(x.data) | static_cast<uintptr_t>(2 * x.batch_stride) |
          static_cast<uintptr_t>(2 * x.head_stride) | static_cast<uintptr_t>(2 * x.token_stride)) %
             16 ==
         0;
}

// Fills out and lse. cudaErrorInvalidValue for what the kernels do not serve: head_dim > 256, heads > kMaxHeads for
// groups, more than 2^31 - 1024 keys or tiles.
cudaError_t window_attn_forward(const AttentionParams& params, cudaStream_t stream);

}  // namespace longattn::cuda
