// Banded attention on CUDA: what bindings.cpp and the kernels share. No torch header.
#pragma once

#include <cstdint>

#include "band.h"
#ifdef LONGATTN_EMULATED
#include "simt.h"
#else
#include <driver_types.h>
#endif

namespace longattn::cuda {

constexpr int kMostChannels = 256;
constexpr int kMaxHeads = 256;                             // query heads whose shifts a launch can carry
constexpr int64_t kMostIndex = (int64_t{1} << 31) - 1024;  // of tokens and blocks; leaves room for a tile's end

// Builds that take long, as those for sanitizers do, may hold the kernels of one head dim alone.
#ifdef LONGATTN_ONLY_HEAD_DIM
constexpr bool is_built(int head_dim) { return head_dim == LONGATTN_ONLY_HEAD_DIM; }
#else
constexpr bool is_built(int) { return true; }
#endif

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
  int64_t shifts[kMaxHeads];  // of each query head, where the band is a group
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

struct alignas(8) RowStats {
  float lse2;   // log-sum-exp in base 2; +inf where the row has none, so that its weights come out as 0
  float delta;  // dot(out, grad_out) - grad_lse: what the weighted gradients of a row's logits sum to
};

struct BackwardParams {
  AttentionParams forward;  // out and lse are inputs here
  TensorView grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse;    // [B, heads, num_queries] or null for zeros
  float* grad_sink_logits;  // [heads] or null
  RowStats* stats;          // scratch [B, heads, num_queries]
  float* sink_sums;         // scratch [B, kv_heads, sink_chunks, 2, sink_keys, head_dim]: of grad_key and grad_value
  int32_t sink_keys, sink_chunks;
  float* query_sums;     // scratch of a backward in one pass (window_attn_sm90.h), else null
  int32_t* query_flags;  // beside it, zeros
};

// Queries whose gradients of the sink keys one block sums: keys that all later queries see are split among blocks.
constexpr int kSinkChunk = 1024;

// Sizes of the scratch, from shapes alone.
struct BackwardScratch {
  int64_t stats_bytes, sink_sums_bytes;
  int32_t sink_keys, sink_chunks;
};
inline BackwardScratch backward_scratch(const AttentionParams& p) {
  const int64_t stats = static_cast<int64_t>(p.batch) * p.heads * p.rows.num_queries * 8;
  if (p.rows.sinks == 0) return {stats, 0, 0, 0};
  const int64_t keys = smaller<int64_t>(p.rows.sinks, p.rows.num_keys);
  const int64_t chunks = (static_cast<int64_t>(p.rows.num_queries) + kSinkChunk - 1) / kSinkChunk;
  const int64_t sums = static_cast<int64_t>(p.batch) * p.kv_heads * chunks * 2 * keys * p.head_dim * 4;
  return {stats, sums, static_cast<int32_t>(keys), static_cast<int32_t>(chunks)};
}

// Up to this many queries the heads of a key head share a block, and the keys may be split among blocks.
constexpr int kFewQueries = 64;

// How many blocks share the keys of a query, by shapes and the current device alone, and the scratch they need.
struct ForwardPlan {
  int32_t splits;
  int64_t scratch_bytes;
};
cudaError_t plan_forward(const AttentionParams& params, ForwardPlan& plan);

// Fills out and lse; scratch is plan.scratch_bytes of the device, aligned to 16. cudaErrorInvalidValue for what the
// kernels do not serve: head_dim > 256, more than kMaxHeads heads, more than 2^31 - 1024 keys or tiles.
cudaError_t window_attn_forward(const AttentionParams& params, const ForwardPlan& plan, void* scratch,
                                cudaStream_t stream);

// Fills the gradients; the same bits for the same inputs. Errors as window_attn_forward.
cudaError_t window_attn_backward(const BackwardParams& params, cudaStream_t stream);

// The part of it that comes before the passes for dQ and for dK and dV, whichever kernels these are: fills
// grad_sink_logits and the scratch.
cudaError_t window_attn_before_passes(const BackwardParams& params, cudaStream_t stream);

}  // namespace longattn::cuda
