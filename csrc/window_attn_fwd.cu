// Forward of banded attention: which kernel serves which head dim.
#include "window_attn_fwd.cuh"

namespace longattn::cuda {
namespace {

template <typename Type>
cudaError_t choose(const AttentionParams& p, cudaStream_t stream) {
  // head dim, keys of a tile, 16-row blocks of a warp, resident blocks
  if constexpr (is_built(32))
    if (p.head_dim <= 32) return launch_forward<ForwardTraits<Type, 32, 64, 2, 3>>(p, stream);
  if constexpr (is_built(64))
    if (p.head_dim <= 64) return launch_forward<ForwardTraits<Type, 64, 64, 2, 2>>(p, stream);
  if constexpr (is_built(96))
    if (p.head_dim <= 96) return launch_forward<ForwardTraits<Type, 96, 64, 2, 2>>(p, stream);
  if constexpr (is_built(128))
    if (p.head_dim <= 128) return launch_forward<ForwardTraits<Type, 128, 64, 2, 2>>(p, stream);
  if constexpr (is_built(192))
    if (p.head_dim <= 192) return launch_forward<ForwardTraits<Type, 192, 64, 1, 2>>(p, stream);
  if constexpr (is_built(256)) return launch_forward<ForwardTraits<Type, 256, 64, 1, 2>>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t window_attn_forward(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim > kMostChannels || p.heads > kMaxHeads || p.rows.num_keys > kMostIndex ||
      p.rows.num_queries > kMostIndex)
    return cudaErrorInvalidValue;
  if (static_cast<int64_t>(p.batch) * p.heads * p.rows.num_queries == 0) return cudaSuccess;
  return p.bf16 ? choose<simt::Bf16>(p, stream) : choose<simt::Fp16>(p, stream);
}

}  // namespace longattn::cuda
