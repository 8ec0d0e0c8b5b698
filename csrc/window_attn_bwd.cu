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

dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

// The kernels of the two passes for one head dim.
template <class Queries_, class Keys_>
struct Passes {
  using Queries = Queries_;
  using Keys = Keys_;
  using Type = typename Queries::Type;
  static constexpr int kQueryBytes = query_pass_shared_bytes<Queries>(), kKeyBytes = key_pass_shared_bytes<Keys>();
  static_assert(kQueryBytes <= kLeastSharedBytes && kKeyBytes <= kLeastSharedBytes);
};

// Row statistics, the sinks' logits and the sums of split sinks.
template <class P>
cudaError_t launch_before(const BackwardParams& b, cudaStream_t stream) {
  using Type = typename P::Type;
  const AttentionParams& p = b.forward;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads, groups = static_cast<int64_t>(p.batch) * p.kv_heads;
  const int64_t stats_blocks = rows * tiles_of(p.rows.num_queries, kStatsRows);
  const int64_t sink_blocks = groups * tiles_of(b.sink_keys, P::Keys::kRows) * b.sink_chunks;
  const int64_t sum_blocks =
      groups * b.sink_chunks * tiles_of(2 * static_cast<int64_t>(b.sink_keys) * p.head_dim, kSumThreads);
  if (too_many(stats_blocks, sink_blocks, sum_blocks)) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (stats_blocks > 0)
    error = SIMT_LAUNCH(window_attn_row_stats<Type>, grid_of(stats_blocks), dim3(kStatsThreads), 0, stream, b);
  if (error == cudaSuccess && b.grad_sink_logits && p.heads > 0)
    error = SIMT_LAUNCH(window_attn_sink_grad<kSinkThreads>, grid_of(p.heads), dim3(kSinkThreads),
                        kSinkThreads * sizeof(float), stream, b);
  if (error == cudaSuccess && sink_blocks > 0)
    error = SIMT_LAUNCH((window_attn_bwd_key<typename P::Keys, true>), grid_of(sink_blocks), dim3(P::Keys::kThreads),
                        P::kKeyBytes, stream, b);
  if (error == cudaSuccess && sink_blocks > 0)
    error = SIMT_LAUNCH(window_attn_sum_chunks<kSumThreads>, grid_of(sum_blocks), dim3(kSumThreads), 0, stream, b);
  return error;
}

// dQ, then dK and dV.
template <class P>
cudaError_t launch_passes(const BackwardParams& b, cudaStream_t stream) {
  const AttentionParams& p = b.forward;
  const int64_t query_blocks =
      static_cast<int64_t>(p.batch) * p.heads * tiles_of(p.rows.num_queries, P::Queries::kRows);
  const int64_t key_blocks = static_cast<int64_t>(p.batch) * p.kv_heads * tiles_of(p.rows.num_keys, P::Keys::kRows);
  if (too_many(query_blocks, key_blocks)) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (query_blocks > 0)
    error = SIMT_LAUNCH(window_attn_bwd_query<typename P::Queries>, grid_of(query_blocks), dim3(P::Queries::kThreads),
                        P::kQueryBytes, stream, b);
  if (error == cudaSuccess && key_blocks > 0)
    error = SIMT_LAUNCH((window_attn_bwd_key<typename P::Keys, false>), grid_of(key_blocks), dim3(P::Keys::kThreads),
                        P::kKeyBytes, stream, b);
  return error;
}

// Calls launch(Passes) with those of a head dim.
template <typename Type, typename Launch>
cudaError_t choose_passes(int head_dim, const Launch& launch) {
  // Of each pass: head dim, streamed columns, 16-row blocks of a warp, roles of warps, stages.
  if constexpr (is_built(32))
    if (head_dim <= 32)
      return launch(Passes<BackwardTraits<Type, 32, 32, 2, 1, 2>, BackwardTraits<Type, 32, 32, 1, 1, 2>>());
  if constexpr (is_built(64))
    if (head_dim <= 64)
      return launch(Passes<BackwardTraits<Type, 64, 32, 2, 1, 2>, BackwardTraits<Type, 64, 64, 1, 1, 2>>());
  if constexpr (is_built(96))
    if (head_dim <= 96)
      return launch(Passes<BackwardTraits<Type, 96, 32, 2, 1, 2>, BackwardTraits<Type, 96, 32, 1, 1, 2>>());
  if constexpr (is_built(128))
    if (head_dim <= 128)
      return launch(Passes<BackwardTraits<Type, 128, 32, 2, 1, 2>, BackwardTraits<Type, 128, 32, 1, 1, 2>>());
  if constexpr (is_built(192))
    if (head_dim <= 192)
      return launch(Passes<BackwardTraits<Type, 192, 32, 1, 1, 2>, BackwardTraits<Type, 192, 32, 1, 2, 2>>());
  if constexpr (is_built(256))
    return launch(Passes<BackwardTraits<Type, 256, 32, 1, 1, 1>, BackwardTraits<Type, 256, 32, 1, 2, 1>>());
  return cudaErrorInvalidValue;
}

template <typename Launch>
cudaError_t choose(const AttentionParams& p, const Launch& launch) {
  if (p.head_dim > kMostChannels || p.heads > kMaxHeads || p.rows.num_keys > kMostIndex ||
      p.rows.num_queries > kMostIndex)
    return cudaErrorInvalidValue;
  return p.bf16 ? choose_passes<simt::Bf16>(p.head_dim, launch) : choose_passes<simt::Fp16>(p.head_dim, launch);
}

}  // namespace

cudaError_t window_attn_before_passes(const BackwardParams& b, cudaStream_t stream) {
  return choose(b.forward, [&](auto passes) { return launch_before<decltype(passes)>(b, stream); });
}

cudaError_t window_attn_backward(const BackwardParams& b, cudaStream_t stream) {
  const cudaError_t error = window_attn_before_passes(b, stream);
  if (error != cudaSuccess) return error;
  return choose(b.forward, [&](auto passes) { return launch_passes<decltype(passes)>(b, stream); });
}

}  // namespace longattn::cuda
