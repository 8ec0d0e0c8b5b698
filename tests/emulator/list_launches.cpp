// Prints threads, bytes of shared memory and name of every kernel that can be launched: for the budgets of .ci/cuda.
#define LONGATTN_EMULATED
#define LONGATTN_LIST_LAUNCHES
#include "window_attn_bwd.cu"
#include "window_attn_fwd.cu"

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
      if (window_attn_forward(p, nullptr) != cudaSuccess || window_attn_backward(b, nullptr) != cudaSuccess) return 1;
    }
}
