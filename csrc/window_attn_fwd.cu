// Forward of banded attention: which kernel serves which head dim and number of queries.
#include "window_attn_decode.cuh"
#include "window_attn_fwd.cuh"

namespace longattn::cuda {
namespace {

// Calls use(Traits{}) with the kernel for few queries: head dim, warps that share the rows, tiles of the ring.
template <typename Type, typename Use>
cudaError_t with_decode_traits(const AttentionParams& p, const Use& use) {
  const bool one = static_cast<int64_t>(p.heads / p.kv_heads) * p.rows.num_queries <= 16;
  if constexpr (is_built(32))
    if (p.head_dim <= 32) return one ? use(DecodeTraits<Type, 32, 1, 8>{}) : use(DecodeTraits<Type, 32, 4, 6>{});
  if constexpr (is_built(64))
    if (p.head_dim <= 64) return one ? use(DecodeTraits<Type, 64, 1, 7>{}) : use(DecodeTraits<Type, 64, 4, 5>{});
  if constexpr (is_built(96))
    if (p.head_dim <= 96) return one ? use(DecodeTraits<Type, 96, 1, 6>{}) : use(DecodeTraits<Type, 96, 4, 5>{});
  if constexpr (is_built(128))
    if (p.head_dim <= 128) return one ? use(DecodeTraits<Type, 128, 1, 5>{}) : use(DecodeTraits<Type, 128, 4, 4>{});
  if constexpr (is_built(192))
    if (p.head_dim <= 192) return one ? use(DecodeTraits<Type, 192, 1, 3>{}) : use(DecodeTraits<Type, 192, 4, 3>{});
  if constexpr (is_built(256)) return one ? use(DecodeTraits<Type, 256, 1, 2>{}) : use(DecodeTraits<Type, 256, 4, 2>{});
  return cudaErrorInvalidValue;
}

template <typename Use>
cudaError_t with_decode_traits(const AttentionParams& p, const Use& use) {
  return p.bf16 ? with_decode_traits<simt::Bf16>(p, use) : with_decode_traits<simt::Fp16>(p, use);
}

template <class Traits>
int64_t row_tiles(const AttentionParams& p) {
  const int64_t rows = static_cast<int64_t>(p.heads / p.kv_heads) * p.rows.num_queries;
  return p.batch * static_cast<int64_t>(p.kv_heads) * ((rows + Traits::kRows - 1) / Traits::kRows);
}

// Key tiles that a block would walk with one split, as far as shapes say.
int64_t most_key_tiles(const AttentionParams& p, int64_t rows, int64_t size) {
  const int64_t queries = smaller<int64_t>(p.rows.num_queries, rows * p.kv_heads / p.heads + 1);
  const int64_t reach = p.band.group ? p.band.group : p.band.left + p.band.right;
  const int64_t keys = smaller<int64_t>(p.rows.num_keys, reach + queries + smaller<int64_t>(p.rows.sinks, kFar));
  return (keys + size - 1) / size;
}

// Tiles that the slowest multiprocessor streams, one more a block for its start and end, are what the time is made of.
template <class Traits>
int32_t best_splits(const AttentionParams& p, int multiprocessors) {
  const int64_t blocks = row_tiles<Traits>(p), tiles = most_key_tiles(p, Traits::kRows, Traits::kBlockN);
  const int64_t slots = static_cast<int64_t>(multiprocessors) * Traits::kWanted;
  int32_t best = 1;
  int64_t least = INT64_MAX;
  for (int32_t splits = 1; splits <= smaller<int64_t>(tiles, kMostSplits); ++splits) {
    const int64_t time = (blocks * splits + slots - 1) / slots * ((tiles + splits - 1) / splits + 1);
    if (time < least) {
      least = time;
      best = splits;
    }
  }
  return best;
}

int32_t partial_stride(const AttentionParams& p) { return (p.head_dim + 7) / 8 * 8; }

int64_t num_rows(const AttentionParams& p) { return static_cast<int64_t>(p.batch) * p.heads * p.rows.num_queries; }

template <class Traits>
cudaError_t launch_decode(const AttentionParams& p, int32_t splits, void* scratch, cudaStream_t stream) {
  const int64_t blocks = row_tiles<Traits>(p) * splits;
  if (blocks > kMostIndex || num_rows(p) > kMostIndex) return cudaErrorInvalidValue;
  DecodeParams d{p, static_cast<float*>(scratch), nullptr, splits, partial_stride(p)};
  d.partial_lse = d.partial_out + num_rows(p) * splits * d.partial_stride;
  cudaError_t error = SIMT_LAUNCH(window_attn_decode<Traits>, dim3(static_cast<unsigned>(blocks)),
                                  dim3(Traits::kThreads), Traits::kSharedBytes, stream, d);
  if (error == cudaSuccess && splits > 1)
    error = SIMT_LAUNCH(window_attn_combine<typename Traits::Type>, dim3(static_cast<unsigned>(num_rows(p))),
                        dim3(kCombineThreads), kCombineBytes, stream, d);
  return error;
}

template <typename Type>
cudaError_t choose(const AttentionParams& p, cudaStream_t stream) {
  // head dim, keys of a tile, 16-row blocks of a warp, resident blocks, slots of the ring
  if constexpr (is_built(32))
    if (p.head_dim <= 32) return launch_forward<ForwardTraits<Type, 32, 64, 2, 3, 3>>(p, stream);
  if constexpr (is_built(64))
    if (p.head_dim <= 64) return launch_forward<ForwardTraits<Type, 64, 64, 2, 2, 3>>(p, stream);
  if constexpr (is_built(96))
    if (p.head_dim <= 96) return launch_forward<ForwardTraits<Type, 96, 64, 2, 2, 3>>(p, stream);
  if constexpr (is_built(128))
    if (p.head_dim <= 128) return launch_forward<ForwardTraits<Type, 128, 64, 2, 2, 2>>(p, stream);
  if constexpr (is_built(192))
    if (p.head_dim <= 192) return launch_forward<ForwardTraits<Type, 192, 64, 1, 2, 2>>(p, stream);
  if constexpr (is_built(256)) return launch_forward<ForwardTraits<Type, 256, 64, 1, 2, 2>>(p, stream);
  return cudaErrorInvalidValue;
}

bool serves(const AttentionParams& p) {
  return p.head_dim <= kMostChannels && p.heads <= kMaxHeads && p.rows.num_keys <= kMostIndex &&
         p.rows.num_queries <= kMostIndex;
}

}  // namespace

cudaError_t plan_forward(const AttentionParams& p, ForwardPlan& plan) {
  plan = {1, 0};
  if (!serves(p)) return cudaErrorInvalidValue;
  if (num_rows(p) == 0 || p.rows.num_queries > kFewQueries) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = simt::count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return error;
  return with_decode_traits(p, [&](auto traits) {
    plan.splits = best_splits<decltype(traits)>(p, multiprocessors);
    if (plan.splits > 1) plan.scratch_bytes = num_rows(p) * plan.splits * (partial_stride(p) + 1) * 4;
    return cudaSuccess;
  });
}

cudaError_t window_attn_forward(const AttentionParams& p, const ForwardPlan& plan, void* scratch, cudaStream_t stream) {
  if (!serves(p)) return cudaErrorInvalidValue;
  if (num_rows(p) == 0) return cudaSuccess;
  if (p.rows.num_queries <= kFewQueries)
    return with_decode_traits(
        p, [&](auto traits) { return launch_decode<decltype(traits)>(p, plan.splits, scratch, stream); });
  return p.bf16 ? choose<simt::Bf16>(p, stream) : choose<simt::Fp16>(p, stream);
}

}  // namespace longattn::cuda
