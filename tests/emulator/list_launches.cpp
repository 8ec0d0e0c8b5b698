// Prints threads, bytes of shared memory and name of every kernel that can be launched: for the budgets of .ci/cuda.
#define LONGATTN_EMULATED
#define LONGATTN_LIST_LAUNCHES
#include "rope.cu"
#include "window_attn_bwd.cu"
#include "window_attn_bwd_single_sm90.cu"
#include "window_attn_bwd_sm90.cu"
#include "window_attn_fwd.cu"
#include "window_attn_fwd_sm90.cu"

int main() {
  using namespace longattn::cuda;
  float sink = 0.0f;
  for (const bool bf16 : {false, true})
    for (const int head_dim : {32, 64, 96, 128, 192, 256}) {
      BackwardParams b{};
      AttentionParams& p = b.forward;
      p.batch = p.heads = p.kv_heads = p.rows.num_queries = p.rows.num_keys = 1;
      p.rows.sinks = 1;
      p.head_dim = head_dim;
      p.bf16 = bf16;
      b.grad_sink_logits = &sink;
      b.sink_keys = b.sink_chunks = 1;
      if (!why_not_sm90(p) && window_attn_forward_sm90(p, nullptr) != cudaSuccess) return 1;
      if (!why_not_sm90(b) && window_attn_backward_sm90(b, nullptr) != cudaSuccess) return 1;
      if (p.head_dim == 64 && window_attn_single_pass_sm90(b, nullptr) != cudaSuccess) return 1;
      if (window_attn_backward(b, nullptr) != cudaSuccess) return 1;
      for (const int queries : {1, 17, kFewQueries + 1}) {
        p.rows.num_queries = queries;
        if (window_attn_forward(p, {2, 0}, nullptr, nullptr) != cudaSuccess) return 1;
      }
    }
  for (const RopeElement element : {RopeElement::kFloat32, RopeElement::kBFloat16, RopeElement::kFloat16})
    for (const bool interleaved : {false, true})
      for (const int half : {1, 8, 9, 16}) {
        RopeParams p{};
        p.batch = p.tokens = p.tensors[0].heads = 1;
        p.half = half;
        p.head_dim = 2 * half;
        p.element = element;
        p.interleaved = interleaved;
        const double inv_freq = 0.0;
        if (half > 8) p.phases.inv_freq = &inv_freq;
        if (rope_forward(p, nullptr) != cudaSuccess) return 1;
      }
}
