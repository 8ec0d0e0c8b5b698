// Forward of banded attention on Hopper: what it serves, the tensor maps, and which kernel serves which head dim.
// LONGATTN_HOPPER=1 asks for it: README, "Install".
#include <cstdlib>
#include <string_view>

#include "window_attn_fwd_sm90.cuh"

namespace longattn::cuda {
namespace {

// Strides that a tensor map can't hold: of dimensions that are walked, they must be positive multiples of 16 bytes.
const char* why_no_map(const TensorView& x, int64_t batch, int64_t heads, int64_t tokens) {
  if (reinterpret_cast<uintptr_t>(x.data) % 16) return "tensors that start at multiples of 16 bytes";
  const int64_t sizes[] = {batch, heads, tokens}, strides[] = {x.batch_stride, x.head_stride, x.token_stride};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && (strides[i] <= 0 || strides[i] % 8 || strides[i] >= int64_t{1} << 39))
      return "strides that are positive multiples of 16 bytes";
  return nullptr;
}

// The heads that share a tile, as a power of two: neighbours that share keys and see the same ones.
int packed_bits(const AttentionParams& p) {
  const int ratio = p.heads / p.kv_heads;
  int bits = 0;
  for (; bits < 6 && ratio % (2 << bits) == 0; ++bits) {
    if (p.band.group == 0) continue;
    for (int head = 0; head < p.heads; ++head)
      if (p.shifts[head] != p.shifts[head >> (bits + 1) << (bits + 1)]) return bits;
  }
  return bits;
}

// Boxes hold 64 rows: `packed` heads of each token.
template <class Traits>
bool map_of(simt::TensorMap& map, const TensorView& x, const AttentionParams& p, int heads, int tokens, int packed) {
  const auto stride = [](int64_t size, int64_t elements) {
    return static_cast<uint64_t>(size > 1 ? 2 * elements : 16);
  };
  return simt::encode_map(
      map, x.data,
      {static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(heads), static_cast<uint64_t>(tokens),
       static_cast<uint64_t>(p.batch)},
      {stride(heads, x.head_stride), stride(tokens, x.token_stride), stride(p.batch, x.batch_stride)},
      {Traits::kPanelChannels, static_cast<uint32_t>(packed), static_cast<uint32_t>(64 / packed), 1},
      Traits::kRowBytes);
}

template <class Traits>
cudaError_t launch_sm90(const AttentionParams& attention, cudaStream_t stream) {
  HopperParams p{};
  p.attention = attention;
  p.packed_bits = packed_bits(attention);
  const int packed = 1 << p.packed_bits, positions = Traits::kRows / packed;
  const int queries = attention.rows.num_queries, keys = attention.rows.num_keys;
  const int64_t tiles = (static_cast<int64_t>(queries) + positions - 1) / positions;
  const int64_t total = tiles * (attention.heads / packed) * attention.batch;
  if (total > kMostIndex) return cudaErrorInvalidValue;
  p.tiles_of_heads = static_cast<int>(tiles);
  p.tiles_in_total = static_cast<int>(total);
  if (!map_of<Traits>(p.query, attention.query, attention, attention.heads, queries, packed) ||
      !map_of<Traits>(p.out, attention.out, attention, attention.heads, queries, packed) ||
      !map_of<Traits>(p.key, attention.key, attention, attention.kv_heads, keys, 1) ||
      !map_of<Traits>(p.value, attention.value, attention, attention.kv_heads, keys, 1))
    return cudaErrorInvalidValue;
  int multiprocessors = 0;
  const cudaError_t error = simt::count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return error;
  const int64_t blocks = smaller<int64_t>(total, multiprocessors);
  return SIMT_LAUNCH(window_attn_fwd_sm90<Traits>, dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads),
                     HopperShared<Traits>::kBytes, stream, p);
}

template <typename Type>
cudaError_t choose_sm90(const AttentionParams& p, cudaStream_t stream) {
  // head dim, warpgroups that compute, stages of K and V, slots of Q a warpgroup
  if constexpr (is_built(64))
    if (p.head_dim <= 64) return launch_sm90<HopperTraits<Type, 64, 3, 6, 2>>(p, stream);
  if constexpr (is_built(96))
    if (p.head_dim <= 96) return launch_sm90<HopperTraits<Type, 96, 3, 4, 2>>(p, stream);
  if constexpr (is_built(128))
    if (p.head_dim <= 128) return launch_sm90<HopperTraits<Type, 128, 2, 4, 2>>(p, stream);
  if constexpr (is_built(192))
    if (p.head_dim <= 192) return launch_sm90<HopperTraits<Type, 192, 2, 3, 1>>(p, stream);
  if constexpr (is_built(256)) return launch_sm90<HopperTraits<Type, 256, 2, 2, 1>>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

bool sm90_takes(const AttentionParams& p) {
  static const bool asked = [] {
    const char* value = std::getenv("LONGATTN_HOPPER");
    return value && std::string_view(value) == "1";
  }();
  return asked && p.rows.num_queries > kFewQueries && !why_not_sm90(p) && simt::is_sm90();
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
