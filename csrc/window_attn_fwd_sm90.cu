// Forward of banded attention on Hopper: what it serves, and which kernel serves which head dim.
#include "window_attn_fwd_sm90.cuh"
#include "window_attn_maps_sm90.cuh"

namespace longattn::cuda {
namespace {

template <class Traits>
cudaError_t launch_sm90(const AttentionParams& attention, cudaStream_t stream) {
  HopperParams p{};
  p.attention = attention;
  p.packed_bits = packed_bits(attention);
  HopperMaps<Traits> maps{p};
  maps.query(p.rows[0], attention.query, Traits::kGroupRows);
  maps.key(p.streamed[0], attention.key, Traits::kColumns);
  maps.key(p.streamed[1], attention.value, Traits::kColumns);
  maps.query(p.out[0], attention.out, Traits::kGroupRows);
  if (!maps.made ||
      !deal_tiles(p, attention.rows.num_queries, Traits::kRows >> p.packed_bits, attention.heads >> p.packed_bits))
    return cudaErrorInvalidValue;
  dim3 grid;
  const cudaError_t error = count_blocks(p, grid);
  if (error != cudaSuccess) return error;
  return SIMT_LAUNCH(window_attn_fwd_sm90<Traits>, grid, dim3(Traits::kThreads),
                     (HopperShared<Traits, ForwardPlanned<Traits>>::kBytes), stream, p);
}

template <typename Type>
cudaError_t choose_sm90(const AttentionParams& p, cudaStream_t stream) {
  // head dim, warpgroups that compute, stages of K and V, slots of a warpgroup, tensors of rows
  if constexpr (is_built(64))
    if (p.head_dim <= 64) return launch_sm90<HopperTraits<Type, 64, 3, 6, 2, 1>>(p, stream);
  if constexpr (is_built(96))
    if (p.head_dim <= 96) return launch_sm90<HopperTraits<Type, 96, 3, 4, 2, 1>>(p, stream);
  if constexpr (is_built(128))
    if (p.head_dim <= 128) return launch_sm90<HopperTraits<Type, 128, 2, 4, 2, 1>>(p, stream);
  if constexpr (is_built(192))
    if (p.head_dim <= 192) return launch_sm90<HopperTraits<Type, 192, 2, 3, 1, 1>>(p, stream);
  if constexpr (is_built(256)) return launch_sm90<HopperTraits<Type, 256, 2, 2, 1, 1>>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

bool sm90_takes(const AttentionParams& p) {
  return p.rows.num_queries > kFewQueries && !why_not_sm90(p) && asked_for_sm90();
}

const char* why_not_sm90(const AttentionParams& p) {
  if (p.head_dim <= 32 || p.head_dim > kMostChannels) return "a head dim of 33 to 256";
  if (p.rows.num_keys == 0) return "at least one key";
  const char* reason = nullptr;
  for (const TensorView* x : {&p.query, &p.out})
    if (!reason) reason = why_no_map(*x, p.batch, p.heads, p.rows.num_queries);
  for (const TensorView* x : {&p.key, &p.value})
    if (!reason) reason = why_no_map(*x, p.batch, p.kv_heads, p.rows.num_keys);
  return reason;
}

cudaError_t window_attn_forward_sm90(const AttentionParams& p, cudaStream_t stream) {
  if (why_not_sm90(p) || p.heads > kMaxHeads || p.rows.num_keys > kMostIndex || p.rows.num_queries > kMostIndex)
    return cudaErrorInvalidValue;
  if (static_cast<int64_t>(p.batch) * p.heads * p.rows.num_queries == 0) return cudaSuccess;
  return p.bf16 ? choose_sm90<simt::Bf16>(p, stream) : choose_sm90<simt::Fp16>(p, stream);
}

}  // namespace longattn::cuda
