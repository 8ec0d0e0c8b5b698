// Backward of banded attention on Hopper: what it serves, and which kernels serve which head dim. Row statistics, the
// gradient of sink logits and the sums of split sinks are formed by the kernels that every card runs.
#include "window_attn_bwd_key_sm90.cuh"
#include "window_attn_bwd_launch_sm90.cuh"
#include "window_attn_bwd_query_sm90.cuh"

namespace longattn::cuda {
namespace {

template <class Traits>
cudaError_t launch_query_pass(const BackwardParams& b, cudaStream_t stream) {
  HopperBackwardParams p{};
  fill_backward(p, b);
  HopperMaps<Traits> maps{p};
  maps.query(p.rows[0], b.forward.query, Traits::kGroupRows);
  maps.query(p.rows[1], b.grad_out, Traits::kGroupRows);
  maps.key(p.streamed[0], b.forward.key, Traits::kColumns);
  maps.key(p.streamed[1], b.forward.value, Traits::kColumns);
  maps.query(p.out[0], b.grad_query, Traits::kGroupRows);
  if (!maps.made ||
      !deal_tiles(p, b.forward.rows.num_queries, Traits::kRows >> p.packed_bits, b.forward.heads >> p.packed_bits))
    return cudaErrorInvalidValue;
  dim3 grid;
  const cudaError_t error = count_blocks(p, grid);
  if (error != cudaSuccess) return error;
  return SIMT_LAUNCH(window_attn_bwd_query_sm90<Traits>, grid, dim3(Traits::kThreads),
                     (HopperShared<Traits, QueryGradientPlan<Traits>>::kBytes), stream, p);
}

template <class Traits>
cudaError_t launch_key_pass(const BackwardParams& b, cudaStream_t stream) {
  HopperBackwardParams p{};
  fill_backward(p, b);
  HopperMaps<Traits> maps{p};
  if (!walk_keys(p, maps, b)) return cudaErrorInvalidValue;
  dim3 grid;
  const cudaError_t error = count_blocks(p, grid);
  if (error != cudaSuccess) return error;
  return SIMT_LAUNCH(window_attn_bwd_key_sm90<Traits>, grid, dim3(Traits::kThreads),
                     (HopperShared<Traits, KeyPlan<Traits>>::kBytes), stream, p);
}

template <class Queries, class Keys>
cudaError_t launch_passes_sm90(const BackwardParams& b, cudaStream_t stream) {
  const cudaError_t error = launch_query_pass<Queries>(b, stream);
  return error == cudaSuccess ? launch_key_pass<Keys>(b, stream) : error;
}

template <typename Type>
cudaError_t choose_passes_sm90(const BackwardParams& b, cudaStream_t stream) {
  // Of each pass: head dim, warpgroups that compute, stages of columns, slots of rows, tensors of rows; then columns of
  // a tile and sets of rows, where these are not 64 and a set a warpgroup.
  const int head_dim = b.forward.head_dim;
  if constexpr (is_built(64))
    if (head_dim <= 64)
      return launch_passes_sm90<HopperTraits<Type, 64, 3, 4, 2, 2>, HopperTraits<Type, 64, 2, 6, 2, 2>>(b, stream);
  if constexpr (is_built(96))
    if (head_dim <= 96)
      return launch_passes_sm90<HopperTraits<Type, 96, 2, 4, 2, 2>, HopperTraits<Type, 96, 2, 4, 2, 2>>(b, stream);
  if constexpr (is_built(128))
    if (head_dim <= 128)
      return launch_passes_sm90<HopperTraits<Type, 128, 2, 2, 2, 2>, HopperTraits<Type, 128, 2, 2, 2, 2>>(b, stream);
  if constexpr (is_built(192))
    if (head_dim <= 192)
      return launch_passes_sm90<HopperTraits<Type, 192, 2, 2, 1, 2>, HopperTraits<Type, 192, 2, 2, 2, 2, 64, 1>>(
          b, stream);
  if constexpr (is_built(256))
    return launch_passes_sm90<HopperTraits<Type, 256, 2, 2, 1, 2, 32>, HopperTraits<Type, 256, 2, 2, 1, 2, 64, 1>>(
        b, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

bool sm90_takes(const BackwardParams& b) {
  return b.forward.rows.num_queries > kFewQueries && !why_not_sm90(b) && asked_for_sm90();
}

const char* why_not_sm90(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  const char* reason = why_not_sm90(p);
  for (const TensorView* x : {&b.grad_out, &b.grad_query})
    if (!reason) reason = why_no_map(*x, p.batch, p.heads, p.rows.num_queries);
  for (const TensorView* x : {&b.grad_key, &b.grad_value})
    if (!reason) reason = why_no_map(*x, p.batch, p.kv_heads, p.rows.num_keys);
  return reason;
}

cudaError_t window_attn_backward_sm90(const BackwardParams& b, cudaStream_t stream) {
  const AttentionParams& p = b.forward;
  if (why_not_sm90(b) || p.rows.num_queries == 0) return cudaErrorInvalidValue;
  const cudaError_t error = window_attn_before_passes(b, stream);
  if (error != cudaSuccess || static_cast<int64_t>(p.batch) * p.heads == 0) return error;
  if (b.query_sums) return window_attn_single_pass_sm90(b, stream);
  return p.bf16 ? choose_passes_sm90<simt::Bf16>(b, stream) : choose_passes_sm90<simt::Fp16>(b, stream);
}

}  // namespace longattn::cuda
