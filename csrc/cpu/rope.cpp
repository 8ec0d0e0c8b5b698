// Rotary embedding of query and key in one pass over memory, which is what it costs.
//
// Work item: one token of one batch row. Tokens go in tiles of kTokens, so that their cos and sin stay in the cache
// while all heads of query and key use them. Within a tile the loop runs along the tensor's memory: heads inside tokens
// for (B, S, H, D) memory, tokens inside heads for (B, H, S, D). Rows are rotated by vectors where the processor has
// them (rope_rows.h), else pair by pair. The build forbids fused multiply-add contraction, so that all round alike.
// Su et al., RoFormer, 2021, arXiv:2104.09864.
#include "rope.h"

#include <algorithm>
#include <cstring>

#include "rope_pairs.h"

namespace longattn::cpu {
namespace {

constexpr int64_t kTokens = 64;  // tile; at half = 64 its cos and sin take 32 KiB
constexpr int64_t kGrainElements = 1 << 15;
constexpr int64_t kStreamBytes = 16 << 20;  // results larger than this are written around the caches
constexpr int64_t kLine = 64;               // bytes of a cache line, which streamed rows consist of

template <typename T, bool kInterleaved>
void rotate_plainly(const RopeRows& rows) {
  const int64_t gap = kInterleaved ? 1 : rows.half;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* x = static_cast<const T*>(rows.x) + r * rows.x_stride;
    T* out = static_cast<T*>(rows.out) + r * rows.out_stride;
    rotate_pairs<kInterleaved ? 2 : 1>(x, x + gap, out, out + gap, rows.cos + r * rows.cos_stride,
                                       rows.sin + r * rows.sin_stride, rows.half, rows.sign);
  }
}

const RopeKernels& kernels() {
  static const RopeKernels plain{{&rotate_plainly<float, false>, &rotate_plainly<float, true>},
                                 {&rotate_plainly<BFloat16, false>, &rotate_plainly<BFloat16, true>},
                                 false};
  const RopeKernels* found = rope_kernels();
  return found ? *found : plain;
}

struct Job {
  const RopeParams& p;
  RopeKernels::Rotate rotate;
  int64_t element_size;  // bytes
  bool stream[2];

  Job(const RopeParams& params, RopeKernels::Rotate rows, int64_t size) : p(params), rotate(rows), element_size(size) {
    int64_t bytes = 0;
    for (const RopeTensor& t : p.tensors) bytes += p.batch * t.heads * p.tokens * p.head_dim * element_size;
    for (int i = 0; i < 2; ++i) {
      const RopeTensor& t = p.tensors[i];
      bool aligned = reinterpret_cast<uintptr_t>(t.out) % kLine == 0 && p.half * element_size % kLine == 0;
      for (const int64_t stride : t.out_stride) aligned = aligned && stride * element_size % kLine == 0;
      stream[i] = kernels().streams && t.out != t.x && aligned && bytes > kStreamBytes;
    }
  }

  // Tokens [begin, begin + count) of batch row b.
  void tile(int64_t b, int64_t begin, int64_t count) const {
    for (int i = 0; i < 2; ++i) {
      const RopeTensor& t = p.tensors[i];
      const bool tokens_outside = t.x_stride[1] < t.x_stride[2];
      const int64_t runs = tokens_outside ? count : t.heads;
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t h = tokens_outside ? 0 : run, s = tokens_outside ? begin + run : begin;
        rotate_run(t, b, h, s, tokens_outside ? t.heads : count, tokens_outside, run + 1 < runs, stream[i]);
      }
    }
  }

  // `count` rows from head h of token s on: the heads of the token, or the tokens of the head.
  void rotate_run(const RopeTensor& t, int64_t b, int64_t h, int64_t s, int64_t count, bool one_token, bool more,
                  bool streamed) const {
    const int inner = one_token ? 1 : 2;
    const char* x =
        static_cast<const char*>(t.x) + (b * t.x_stride[0] + h * t.x_stride[1] + s * t.x_stride[2]) * element_size;
    char* out =
        static_cast<char*>(t.out) + (b * t.out_stride[0] + h * t.out_stride[1] + s * t.out_stride[2]) * element_size;
    const int64_t to_next = more ? t.x_stride[3 - inner] * element_size : 0;
    rotate({x, out, x + to_next, p.cos + b * p.cos_stride[0] + s * p.cos_stride[1],
            p.sin + b * p.sin_stride[0] + s * p.sin_stride[1], t.x_stride[inner], t.out_stride[inner],
            one_token ? 0 : p.cos_stride[1], one_token ? 0 : p.sin_stride[1], count, p.half, p.inverse ? -1.0f : 1.0f,
            streamed});
    const int64_t rotated = 2 * p.half * element_size, row_size = p.head_dim * element_size;
    if (rotated == row_size || t.x == t.out) return;
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(out + r * t.out_stride[inner] * element_size + rotated,
                  x + r * t.x_stride[inner] * element_size + rotated, row_size - rotated);
  }

  // Items [begin, end) of the B * S tokens.
  static void run(int64_t begin, int64_t end, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t tokens = job.p.tokens;
    while (begin < end) {
      const int64_t b = begin / tokens, s = begin % tokens;
      const int64_t count = std::min({end - begin, tokens - s, kTokens});
      job.tile(b, s, count);
      begin += count;
    }
  }
};

void launch(const RopeParams& p, RopeKernels::Rotate rotate, int64_t element_size, ParallelFor parallel_for) {
  const int64_t elements_per_token = (p.tensors[0].heads + p.tensors[1].heads) * p.head_dim;
  if (p.batch * p.tokens * elements_per_token == 0) return;
  Job job(p, rotate, element_size);
  parallel_for(p.batch * p.tokens, std::max<int64_t>(1, kGrainElements / elements_per_token), &Job::run, &job);
}

}  // namespace

void rope_float32(const RopeParams& p, ParallelFor parallel_for) {
  launch(p, kernels().float32[p.interleaved], sizeof(float), parallel_for);
}

void rope_bfloat16(const RopeParams& p, ParallelFor parallel_for) {
  launch(p, kernels().bfloat16[p.interleaved], sizeof(BFloat16), parallel_for);
}

}  // namespace longattn::cpu
