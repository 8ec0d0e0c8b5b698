// Rotary embedding of query and key in one launch: one pass over memory, which is what it costs.
//
// A thread takes a unit of kPairs pairs of one token, 16 bytes from each half of a row (32 in a run where the layout is
// interleaved), keeps their cos and sin in registers, and goes through about kHeads heads of query, then key;
// neighbouring threads move neighbouring bytes. Rows that no 16 bytes fit go pair by pair. A thread reads its unit
// before it writes it, so that the output may be the input. Where phases are formed here, a block first forms cos and
// sin of its tokens in shared memory, once for all heads. Su et al., RoFormer, 2021, arXiv:2104.09864.
#include <initializer_list>

#include "band.h"
#include "rope.h"
#include "rope_phase.h"
#include "simt.h"

namespace longattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // of a thread: tables are read once for that many

// How the threads of a block are laid out: units of a row innermost, then heads, then tokens.
struct RopePlan {
  int rotated, units;  // units of a row that rotate; those that pass through follow them
  int lanes, slots, tokens;
};

RopePlan rope_plan(const RopeParams& p, int pairs) {
  RopePlan plan{static_cast<int>(p.half / pairs), 0, 0, 0, 0};
  plan.units = plan.rotated + static_cast<int>((p.head_dim - 2 * p.half) / pairs);
  plan.lanes = smaller(plan.units, kThreads);
  const int64_t slots = (p.tensors[0].heads + p.tensors[1].heads + kHeads - 1) / kHeads;
  plan.slots = static_cast<int>(smaller<int64_t>(slots, kThreads / plan.lanes));
  plan.tokens = kThreads / (plan.lanes * plan.slots);
  return plan;
}

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kPerWord = 1;
};
struct BFloat16 : simt::Bf16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
};
struct Float16 : simt::Fp16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
};

template <typename Type>
__device__ __forceinline__ void widen(uint32_t word, float* values) {
  if constexpr (Type::kPerWord == 1) {
    values[0] = simt::as_float(word);
  } else {
    values[0] = Type::low(word);
    values[1] = Type::high(word);
  }
}

template <typename Type>
__device__ __forceinline__ uint32_t narrow(const float* values) {
  if constexpr (Type::kPerWord == 1)
    return simt::as_bits(values[0]);
  else
    return Type::pack(values[0], values[1]);
}

// kCount elements from an address that a chunk fits, or one from any.
template <typename Type, int kCount>
__device__ __forceinline__ void load(const typename Type::Bits* from, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    float both[2];
    widen<Type>(*from, both);
    values[0] = both[0];
  } else {
#pragma unroll
    for (int chunk = 0; chunk < kCount / Type::kPerWord / 4; ++chunk) {
      const simt::Chunk moved = simt::load_chunk(from + chunk * 4 * Type::kPerWord);
#pragma unroll
      for (int i = 0; i < 4; ++i) widen<Type>(moved.word[i], values + (4 * chunk + i) * Type::kPerWord);
    }
  }
}

template <typename Type, int kCount>
__device__ __forceinline__ void store(typename Type::Bits* to, const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    const float both[2] = {values[0], 0.0f};
    *to = static_cast<typename Type::Bits>(narrow<Type>(both));
  } else {
#pragma unroll
    for (int chunk = 0; chunk < kCount / Type::kPerWord / 4; ++chunk) {
      simt::Chunk moved;
#pragma unroll
      for (int i = 0; i < 4; ++i) moved.word[i] = narrow<Type>(values + (4 * chunk + i) * Type::kPerWord);
      simt::store_chunk(to + chunk * 4 * Type::kPerWord, moved);
    }
  }
}

template <typename Type, int kPairs, bool kInterleaved>
__device__ __forceinline__ void rotate_unit(const typename Type::Bits* x, typename Type::Bits* out, int64_t unit,
                                            int64_t half, const float (&cos)[kPairs], const float (&sin)[kPairs]) {
  if constexpr (kInterleaved && kPairs > 1) {
    float values[2 * kPairs];
    load<Type>(x + 2 * unit * kPairs, values);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = values[2 * i], b = values[2 * i + 1];
      values[2 * i] = a * cos[i] - b * sin[i];
      values[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    store<Type>(out + 2 * unit * kPairs, values);
  } else {
    const int64_t first = (kInterleaved ? 2 : 1) * unit * kPairs, second = first + (kInterleaved ? 1 : half);
    float a[kPairs], b[kPairs];
    load<Type>(x + first, a);
    load<Type>(x + second, b);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float rotated = a[i] * cos[i] - b[i] * sin[i];
      b[i] = b[i] * cos[i] + a[i] * sin[i];
      a[i] = rotated;
    }
    store<Type>(out + first, a);
    store<Type>(out + second, b);
  }
}

__device__ __forceinline__ int64_t position_of(const RopePhases& phases, int64_t batch, int64_t token) {
  if (phases.positions) return phases.positions[batch * phases.position_stride[0] + token * phases.position_stride[1]];
  return token - phases.cu_seqlens[document_of(phases.cu_seqlens, phases.num_documents, token)];
}

// cos [tokens, half], then sin, of the block's tokens.
__device__ __forceinline__ void form_tables(float* tables, const RopeParams& p, const RopePlan& plan) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * plan.tokens;
  const int half = static_cast<int>(p.half), entries = plan.tokens * half;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const int64_t row = first + i / half;
    if (row >= p.batch * p.tokens) break;
    const CosSin turn = cos_sin_at(position_of(p.phases, row / p.tokens, row % p.tokens), p.phases.inv_freq[i % half]);
    tables[i] = turn.cos * p.phases.scaling;
    tables[entries + i] = turn.sin * p.phases.scaling;
  }
}

template <int kCount>
__device__ __forceinline__ void read_table(const float* from, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = *from;
  } else {
#pragma unroll
    for (int chunk = 0; chunk < kCount / 4; ++chunk) {
      const simt::Chunk moved = simt::load_shared_chunk(from + 4 * chunk);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[4 * chunk + i] = simt::as_float(moved.word[i]);
    }
  }
}

template <typename Type, int kPairs, bool kInterleaved, bool kFormed>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const __grid_constant__ RopeParams p, const __grid_constant__ RopePlan plan) {
  using Bits = typename Type::Bits;
  SIMT_SHARED(shared);
  float* tables = reinterpret_cast<float*>(shared);
  if (kFormed) {
    form_tables(tables, p, plan);
    __syncthreads();
  }
  const int thread = threadIdx.x, units = plan.units, rotated = plan.rotated, lanes = plan.lanes, slots = plan.slots;
  const int lane = thread % lanes, slot = thread / lanes % slots, place = thread / lanes / slots;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * plan.tokens + place;
  if (place >= plan.tokens || row >= p.batch * p.tokens) return;
  const int64_t batch = row / p.tokens, token = row % p.tokens;
  for (int unit = lane; unit < units; unit += lanes) {
    float cos[kPairs], sin[kPairs];
    if (unit < rotated) {
      if constexpr (kFormed) {
        const int half = static_cast<int>(p.half);
        const float* formed = tables + place * half + unit * kPairs;
        read_table(formed, cos);
        read_table(formed + plan.tokens * half, sin);
      } else {
        const auto table = [&](const float* data, const int64_t(&stride)[2]) {
          return reinterpret_cast<const uint32_t*>(data + batch * stride[0] + token * stride[1] + unit * kPairs);
        };
        load<Float32>(table(p.cos, p.cos_stride), cos);
        load<Float32>(table(p.sin, p.sin_stride), sin);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) sin[i] = p.inverse ? -sin[i] : sin[i];
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const RopeTensor& t = p.tensors[which];
      const Bits* x = static_cast<const Bits*>(t.x) + batch * t.x_stride[0] + token * t.x_stride[2];
      Bits* out = static_cast<Bits*>(t.out) + batch * t.out_stride[0] + token * t.out_stride[2];
      for (int64_t head = slot; head < t.heads; head += slots) {
        const Bits* from = x + head * t.x_stride[1];
        Bits* to = out + head * t.out_stride[1];
        if (unit < rotated) {
          rotate_unit<Type, kPairs, kInterleaved>(from, to, unit, p.half, cos, sin);
        } else if (from != to) {
          const int64_t channel = 2 * p.half + static_cast<int64_t>(unit - rotated) * kPairs;
          float values[kPairs];
          load<Type>(from + channel, values);
          store<Type>(to + channel, values);
        }
      }
    }
  }
}

bool chunks_fit(const void* data, std::initializer_list<int64_t> strides, int64_t element_bytes) {
  bool fit = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) fit &= stride * element_bytes % 16 == 0;
  return fit;
}

template <typename Type, int kPairs, bool kInterleaved>
cudaError_t launch_units(const RopeParams& p, cudaStream_t stream) {
  const RopePlan plan = rope_plan(p, kPairs);
  const dim3 grid(static_cast<unsigned>((p.batch * p.tokens + plan.tokens - 1) / plan.tokens));
  if (!p.phases.inv_freq)
    return SIMT_LAUNCH((rope_kernel<Type, kPairs, kInterleaved, false>), grid, dim3(kThreads), 0, stream, p, plan);
  const size_t table_bytes = 2 * sizeof(float) * plan.tokens * p.half;
  return SIMT_LAUNCH((rope_kernel<Type, kPairs, kInterleaved, true>), grid, dim3(kThreads), table_bytes, stream, p,
                     plan);
}

template <typename Type, bool kInterleaved>
cudaError_t launch(const RopeParams& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Type::Bits), kPairs = 16 / kBytes;
  bool fit = p.half % kPairs == 0 && p.head_dim % kPairs == 0 &&
             chunks_fit(p.cos, {p.cos_stride[0], p.cos_stride[1]}, 4) &&
             chunks_fit(p.sin, {p.sin_stride[0], p.sin_stride[1]}, 4);
  for (const RopeTensor& t : p.tensors)
    fit &= chunks_fit(t.x, {t.x_stride[0], t.x_stride[1], t.x_stride[2]}, kBytes) &&
           chunks_fit(t.out, {t.out_stride[0], t.out_stride[1], t.out_stride[2]}, kBytes);
  return fit ? launch_units<Type, kPairs, kInterleaved>(p, stream) : launch_units<Type, 1, kInterleaved>(p, stream);
}

template <typename Type>
cudaError_t choose(const RopeParams& p, cudaStream_t stream) {
  return p.interleaved ? launch<Type, true>(p, stream) : launch<Type, false>(p, stream);
}

}  // namespace

cudaError_t rope_forward(const RopeParams& p, cudaStream_t stream) {
  if (p.batch * p.tokens > (int64_t{1} << 31) - 1) return cudaErrorInvalidValue;
  if (p.phases.inv_freq && p.half > kMostFormedPairs) return cudaErrorInvalidValue;
  if (p.batch * p.tokens * p.head_dim * (p.tensors[0].heads + p.tensors[1].heads) == 0) return cudaSuccess;
  if (p.element == RopeElement::kFloat32) return choose<Float32>(p, stream);
  return p.element == RopeElement::kBFloat16 ? choose<BFloat16>(p, stream) : choose<Float16>(p, stream);
}

}  // namespace longattn::cuda
