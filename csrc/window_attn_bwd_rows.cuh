// The parts of the backward that work on rows alone: RowStats of every query, then the gradient of the sink logits.
#pragma once

#include "window_attn_logits.cuh"

namespace longattn::cuda {

constexpr int kStatsThreads = 128, kStatsRows = 64;  // of a block

// Eight lanes take a row. Reads out and grad_out once.
template <typename Type>
__global__ void __launch_bounds__(kStatsThreads) window_attn_row_stats(const __grid_constant__ BackwardParams b) {
  const AttentionParams& p = b.forward;
  const int num_queries = p.rows.num_queries, tiles = (num_queries + kStatsRows - 1) / kStatsRows;
  const int batch_head = static_cast<int>(blockIdx.x) / tiles,
            first = static_cast<int>(blockIdx.x) % tiles * kStatsRows;
  const int batch = batch_head / p.heads, head = batch_head % p.heads, lane = threadIdx.x % 8;
  const int64_t first_row = static_cast<int64_t>(batch_head) * num_queries;
  const auto rows_of = [&](const TensorView& x) {
    return static_cast<const uint16_t*>(x.data) + batch * x.batch_stride + head * x.head_stride;
  };
  const uint16_t *out = rows_of(p.out), *grad_out = rows_of(b.grad_out);
  for (int r = threadIdx.x / 8; r < kStatsRows; r += kStatsThreads / 8) {
    const int row = first + r;
    const bool exists = row < num_queries;  // all lanes stay for the shuffles
    const uint16_t *x = out + row * p.out.token_stride, *y = grad_out + row * b.grad_out.token_stride;
    float dot = 0.0f;
    for (int c = lane * 8; exists && c < p.head_dim; c += 64) {
      if (p.aligned) {
        const simt::Chunk left = simt::load_chunk(x + c);
        const simt::Chunk right = simt::load_chunk(y + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dot += Type::low(left.word[i]) * Type::low(right.word[i]);
          dot += Type::high(left.word[i]) * Type::high(right.word[i]);
        }
      } else {
        for (int i = c; i < c + 8 && i < p.head_dim; ++i) dot += Type::low(x[i]) * Type::low(y[i]);
      }
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) dot += simt::shfl_xor(dot, step);
    if (lane != 0 || !exists) continue;
    const float lse = p.lse[first_row + row], grad_lse = b.grad_lse ? b.grad_lse[first_row + row] : 0.0f;
    b.stats[first_row + row] = {lse == -INFINITY ? INFINITY : lse * kLog2E, dot - grad_lse};
  }
}

constexpr int kSinkThreads = 256;

// One block a head. Threads and their sums are added in an order that depends on shapes alone.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) window_attn_sink_grad(const __grid_constant__ BackwardParams b) {
  SIMT_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [kThreads]
  const AttentionParams& p = b.forward;
  const int head = blockIdx.x, thread = threadIdx.x;
  const float sink = p.sink_logits[head] * kLog2E;
  float sum = 0.0f;
  for (int batch = 0; batch < p.batch; ++batch) {
    const RowStats* stats = b.stats + (static_cast<int64_t>(batch) * p.heads + head) * p.rows.num_queries;
    for (int row = thread; row < p.rows.num_queries; row += kThreads)
      sum -= simt::exp2_fast(sink - stats[row].lse2) * stats[row].delta;
  }
  sums[thread] = sum;
  __syncthreads();
#pragma unroll
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (thread < step) sums[thread] += sums[thread + step];
    __syncthreads();
  }
  if (thread == 0) b.grad_sink_logits[head] = sums[0];
}

}  // namespace longattn::cuda
