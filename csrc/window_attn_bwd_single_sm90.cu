// Backward of banded attention on Hopper in one pass: which calls it serves, and which of these gain by it.
#include "window_attn_bwd_launch_sm90.cuh"
#include "window_attn_bwd_single_sm90.cuh"

namespace longattn::cuda {
namespace {

template <typename Type>
using SinglePass = SingleTraits<Type, 64, 4>;

// Keys that a query sees at most from which on one pass is expected to be faster (csrc/NOTES_SM90.md).
constexpr int64_t kManyKeys = 512;

// LONGATTN_HOPPER_BACKWARD=one or two (README, "Install"): as many passes, wherever one can serve.
int asked_passes() {
  static const int asked = [] {
    const char* value = std::getenv("LONGATTN_HOPPER_BACKWARD");
    const std::string_view text = value ? value : "";
    return text == "one" ? 1 : text == "two" ? 2 : 0;
  }();
  return asked;
}

int64_t most_keys(const AttentionParams& p) {
  const int64_t reach = p.band.group ? p.band.group : p.band.left + p.band.right + 1;
  return smaller<int64_t>(reach, p.rows.num_keys);
}

// Whether scratch takes no more than the gradients: what a backward may hold beside them.
bool is_within_memory(const AttentionParams& p, const SinglePassScratch& scratch) {
  const int64_t rows = static_cast<int64_t>(p.heads) * p.rows.num_queries;
  const int64_t keys = static_cast<int64_t>(p.kv_heads) * p.rows.num_keys, channels = p.head_dim;
  const int64_t stats = p.batch * rows * static_cast<int64_t>(sizeof(RowStats));
  return scratch.sums_bytes + scratch.flags_bytes + stats <= 2 * p.batch * channels * (rows + 2 * keys);
}

int query_tiles(const AttentionParams& p) {
  const int bits = 6 - packed_bits(p);
  return (p.rows.num_queries + (1 << bits) - 1) >> bits;
}

template <class Traits>
cudaError_t launch_single_pass(const BackwardParams& b, cudaStream_t stream) {
  SingleParams p{};
  fill_backward(p, b);
  p.sums = b.query_sums;
  p.flags = b.query_flags;
  p.query_tiles = query_tiles(b.forward);
  HopperMaps<Traits> maps{p};
  maps.query(p.query_out, b.grad_query, Traits::kGroupRows);
  if (!walk_keys(p, maps, b)) return cudaErrorInvalidValue;
  dim3 grid;
  const cudaError_t error = count_blocks(p, grid);
  if (error != cudaSuccess) return error;
  return SIMT_LAUNCH_TOGETHER(window_attn_bwd_single_sm90<Traits>, grid, dim3(Traits::kThreads),
                              SingleShared<Traits>::kBytes, stream, p);
}

}  // namespace

SinglePassScratch single_pass_scratch(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  const bool served = is_built(64) && p.head_dim <= 64 && p.rows.sinks == 0 && !p.rows.kv_end &&
                      p.rows.num_queries > 0 && !why_not_sm90(b);
  if (!served || asked_passes() == 2) return {0, 0};
  const int64_t tiles = static_cast<int64_t>(p.batch) * (p.heads >> packed_bits(p)) * query_tiles(p);
  const SinglePassScratch scratch{tiles * SingleShared<SinglePass<simt::Bf16>>::kSumBytes,
                                  tiles * static_cast<int64_t>(sizeof(int32_t))};
  if (asked_passes() == 0 && (most_keys(p) < kManyKeys || !is_within_memory(p, scratch))) return {0, 0};
  return scratch;
}

cudaError_t window_attn_single_pass_sm90(const BackwardParams& b, cudaStream_t stream) {
  if constexpr (is_built(64))
    return b.forward.bf16 ? launch_single_pass<SinglePass<simt::Bf16>>(b, stream)
                          : launch_single_pass<SinglePass<simt::Fp16>>(b, stream);
  return cudaErrorInvalidValue;
}

}  // namespace longattn::cuda
