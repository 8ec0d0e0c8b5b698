// Backward of banded attention: which kernels serve which head dim, and their order.
#include "window_attn_bwd_key.cuh"
#include "window_attn_bwd_query.cuh"
#include "window_attn_bwd_rows.cuh"

namespace longattn::cuda {
namespace {

constexpr int kLeastSharedBytes = 99 * 1024;  // of the devices that these kernels serve

int64_t tiles_of(int64_t rows, int64_t size) { return (rows + size - 1) / size; }

template <typename... Kernel>
bool too_many(Kernel... blocks) {
  return ((blocks > kMostIndex) || ...);
}

// Row statistics, the sinks' logits, dQ, the sums of split sinks, then dK and dV.
template <class Queries, class Keys>
cudaError_t launch_backward(const BackwardParams& b, cudaStream_t stream) {
  using Type = typename Queries::Type;
  constexpr int kQueryBytes = query_pass_shared_bytes<Queries>(), kKeyBytes = key_pass_shared_bytes<Keys>();
  static_assert(kQueryBytes <= kLeastSharedBytes && kKeyBytes <= kLeastSharedBytes);
  const AttentionParams& p = b.forward;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads, groups = static_cast<int64_t>(p.batch) * p.kv_heads;
  const int64_t stats_blocks = rows * tiles_of(p.rows.num_queries, kStatsRows);
  const int64_t query_blocks = rows * tiles_of(p.rows.num_queries, Queries::kRows);
  const int64_t sink_blocks = groups * tiles_of(b.sink_keys, Keys::kRows) * b.sink_chunks;
  const int64_t sum_blocks =
      groups * b.sink_chunks * tiles_of(2 * static_cast<int64_t>(b.sink_keys) * p.head_dim, kSumThreads);
  const int64_t key_blocks = groups * tiles_of(p.rows.num_keys, Keys::kRows);
  if (too_many(stats_blocks, query_blocks, sink_blocks, sum_blocks, key_blocks)) return cudaErrorInvalidValue;
  const auto grid = [](int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); };
  cudaError_t error = cudaSuccess;
  if (stats_blocks > 0)
    error = SIMT_LAUNCH(window_attn_row_stats<Type>, grid(stats_blocks), dim3(kStatsThreads), 0, stream, b);
  if (error == cudaSuccess && b.grad_sink_logits && p.heads > 0)
    error = SIMT_LAUNCH(window_attn_sink_grad<kSinkThreads>, grid(p.heads), dim3(kSinkThreads),
                        kSinkThreads * sizeof(float), stream, b);
  if (error == cudaSuccess && query_blocks > 0)
    error = SIMT_LAUNCH(window_attn_bwd_query<Queries>, grid(query_blocks), dim3(Queries::kThreads), kQueryBytes,
                        stream, b);
  if (error == cudaSuccess && sink_blocks > 0)
    error =
        SIMT_LAUNCH((window_attn_bwd_key<Keys, true>), grid(sink_blocks), dim3(Keys::kThreads), kKeyBytes, stream, b);
  if (error == cudaSuccess && sink_blocks > 0)
    error = SIMT_LAUNCH(window_attn_sum_chunks<kSumThreads>, grid(sum_blocks), dim3(kSumThreads), 0, stream, b);
  if (error == cudaSuccess && key_blocks > 0)
    error =
        SIMT_LAUNCH((window_attn_bwd_key<Keys, false>), grid(key_blocks), dim3(Keys::kThreads), kKeyBytes, stream, b);
  return error;
}

template <typename Type>
cudaError_t choose(const BackwardParams& b, cudaStream_t stream) {
  const int head_dim = b.forward.head_dim;
  // Of each pass: head dim, streamed columns, 16-row blocks of a warp, roles of warps, stages.
  if constexpr (is_built(32))
    if (head_dim <= 32)
      return launch_backward<BackwardTraits<Type, 32, 32, 2, 1, 2>, BackwardTraits<Type, 32, 32, 1, 1, 2>>(b, stream);
  if constexpr (is_built(64))
    if (head_dim <= 64)
      return launch_backward<BackwardTraits<Type, 64, 32, 2, 1, 2>, BackwardTraits<Type, 64, 64, 1, 1, 2>>(b, stream);
  if constexpr (is_built(96))
    if (head_dim <= 96)
      return launch_backward<BackwardTraits<Type, 96, 32, 2, 1, 2>, BackwardTraits<Type, 96, 32, 1, 1, 2>>(b, stream);
  if constexpr (is_built(128))
    if (head_dim <= 128)
      return launch_backward<BackwardTraits<Type, 128, 32, 2, 1, 2>, BackwardTraits<Type, 128, 32, 1, 1, 2>>(b, stream);
  if constexpr (is_built(192))
    if (head_dim <= 192)
      return launch_backward<BackwardTraits<Type, 192, 32, 1, 1, 2>, BackwardTraits<Type, 192, 32, 1, 2, 2>>(b, stream);
  if constexpr (is_built(256))
    return launch_backward<BackwardTraits<Type, 256, 32, 1, 1, 1>, BackwardTraits<Type, 256, 32, 1, 2, 1>>(b, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t window_attn_backward(const BackwardParams& b, cudaStream_t stream) {
  const AttentionParams& p = b.forward;
  if (p.head_dim > kMostChannels || p.heads > kMaxHeads || p.rows.num_keys > kMostIndex ||
      p.rows.num_queries > kMostIndex)
    return cudaErrorInvalidValue;
  return p.bf16 ? choose<simt::Bf16>(b, stream) : choose<simt::Fp16>(b, stream);
}

}  // namespace longattn::cuda
