// Rotary embedding of query and key in one pass over memory, which is what it costs.
//
// Work item: one token of one batch row. Tokens go in tiles of kTokens, so that their cos and sin stay in the L1 cache
// while all heads of query and key use them. Within a tile the loop runs along the tensor's memory: heads inside tokens
// for (B, S, H, D) memory, tokens inside heads for (B, H, S, D).
// Row functions are plain loops that the compiler vectorises, cloned for AVX-512, AVX2 and the baseline; the loader
// picks one. The build forbids fused multiply-add contraction, so that all clones round alike on every machine.
// Su et al., RoFormer, 2021, arXiv:2104.09864.
#include "rope.h"

#include <algorithm>
#include <cstring>

#include "clones.h"

namespace longattn::cpu {
namespace {

constexpr int64_t kTokens = 16;  // tile; at half = 64 its cos and sin take 8 KiB
constexpr int64_t kGrainElements = 1 << 15;

LONGATTN_INLINE float load(float x) { return x; }
LONGATTN_INLINE void store(float* out, float x) { *out = x; }

LONGATTN_INLINE float load(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

// Round to nearest, ties to even; a NaN stays one.
LONGATTN_INLINE void store(uint16_t* out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *out = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// One row of `half` pairs (a[i], b[i]), kStep elements apart.
template <typename T, int kStep>
LONGATTN_INLINE void rotate(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out_a,
                            T* __restrict__ out_b, const float* __restrict__ cos, const float* __restrict__ sin,
                            int64_t half, float sign) {
  for (int64_t i = 0; i < half; ++i) {
    const float x = load(a[kStep * i]), y = load(b[kStep * i]);
    const float c = cos[i], s = sign * sin[i];
    store(out_a + kStep * i, x * c - y * s);
    store(out_b + kStep * i, y * c + x * s);
  }
}

template <typename T, bool kInterleaved>
LONGATTN_INLINE void rotate_row(const void* x, void* out, const float* cos, const float* sin, int64_t half,
                                float sign) {
  const T* a = static_cast<const T*>(x);
  T* out_a = static_cast<T*>(out);
  const int64_t gap = kInterleaved ? 1 : half;
  rotate<T, kInterleaved ? 2 : 1>(a, a + gap, out_a, out_a + gap, cos, sin, half, sign);
}

using Row = void (*)(const void*, void*, const float*, const float*, int64_t half, float sign);

LONGATTN_CLONES void half_split_float32(const void* x, void* out, const float* cos, const float* sin, int64_t half,
                                        float sign) {
  rotate_row<float, false>(x, out, cos, sin, half, sign);
}

LONGATTN_CLONES void interleaved_float32(const void* x, void* out, const float* cos, const float* sin, int64_t half,
                                         float sign) {
  rotate_row<float, true>(x, out, cos, sin, half, sign);
}

LONGATTN_CLONES void half_split_bfloat16(const void* x, void* out, const float* cos, const float* sin, int64_t half,
                                         float sign) {
  rotate_row<uint16_t, false>(x, out, cos, sin, half, sign);
}

LONGATTN_CLONES void interleaved_bfloat16(const void* x, void* out, const float* cos, const float* sin, int64_t half,
                                          float sign) {
  rotate_row<uint16_t, true>(x, out, cos, sin, half, sign);
}

struct Job {
  const RopeParams& p;
  Row row;
  int64_t element_size;  // bytes

  void rotate_token(const RopeTensor& t, int64_t b, int64_t h, int64_t s) const {
    const int64_t from = b * t.x_stride[0] + h * t.x_stride[1] + s * t.x_stride[2];
    const int64_t to = b * t.out_stride[0] + h * t.out_stride[1] + s * t.out_stride[2];
    const char* x = static_cast<const char*>(t.x) + from * element_size;
    char* out = static_cast<char*>(t.out) + to * element_size;
    const float* cos = p.cos + b * p.cos_stride[0] + s * p.cos_stride[1];
    const float* sin = p.sin + b * p.sin_stride[0] + s * p.sin_stride[1];
    row(x, out, cos, sin, p.half, p.inverse ? -1.0f : 1.0f);
    const int64_t rotated = 2 * p.half * element_size, row_size = p.head_dim * element_size;
    if (rotated < row_size) std::memcpy(out + rotated, x + rotated, row_size - rotated);
  }

  // Tokens [begin, end) of batch row b.
  void tile(int64_t b, int64_t begin, int64_t end) const {
    for (const RopeTensor& t : p.tensors) {
      if (t.x_stride[1] < t.x_stride[2]) {
        for (int64_t s = begin; s < end; ++s)
          for (int64_t h = 0; h < t.heads; ++h) rotate_token(t, b, h, s);
      } else {
        for (int64_t h = 0; h < t.heads; ++h)
          for (int64_t s = begin; s < end; ++s) rotate_token(t, b, h, s);
      }
    }
  }

  // Items [begin, end) of the B * S tokens.
  static void run(int64_t begin, int64_t end, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t tokens = job.p.tokens;
    while (begin < end) {
      const int64_t b = begin / tokens, s = begin % tokens;
      const int64_t count = std::min({end - begin, tokens - s, kTokens});
      job.tile(b, s, s + count);
      begin += count;
    }
  }
};

void launch(const RopeParams& p, Row row, int64_t element_size, ParallelFor parallel_for) {
  const int64_t elements_per_token = (p.tensors[0].heads + p.tensors[1].heads) * p.head_dim;
  if (p.batch * p.tokens * elements_per_token == 0) return;
  Job job{p, row, element_size};
  parallel_for(p.batch * p.tokens, std::max<int64_t>(1, kGrainElements / elements_per_token), &Job::run, &job);
}

}  // namespace

void rope_float32(const RopeParams& p, ParallelFor parallel_for) {
  launch(p, p.interleaved ? interleaved_float32 : half_split_float32, sizeof(float), parallel_for);
}

void rope_bfloat16(const RopeParams& p, ParallelFor parallel_for) {
  launch(p, p.interleaved ? interleaved_bfloat16 : half_split_bfloat16, sizeof(uint16_t), parallel_for);
}

}  // namespace longattn::cpu
