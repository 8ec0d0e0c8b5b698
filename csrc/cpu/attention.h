// Banded attention on the CPU: the contract between bindings.cpp and the kernels. No torch header.
#pragma once

#include <cstdint>

#include "../band.h"
#include "parallel.h"

namespace longattn::cpu {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// A (B, H, S, D) tensor; strides in elements, channels contiguous.
struct Tensor4 {
  const void* data;
  int64_t batch, head, token;
};

struct AttentionParams {
  Tensor4 query;  // [B, heads, num_queries, head_dim]
  Tensor4 key;    // [B, kv_heads, num_keys, head_dim]
  Tensor4 value;
  Tensor4 out;  // forward writes it, backward reads it
  float* lse;   // [B, heads, num_queries] contiguous; as `out`
  int batch, heads, kv_heads, head_dim;
  Rows rows;                 // its pointers lie in host memory
  const Band* bands;         // [heads]
  const float* sink_logits;  // [heads] or null
  float scale, softcap;      // softcap 0 is none
  Element element;           // of all (B, H, S, D) tensors
};

struct AttentionGrads {
  Tensor4 grad_out;
  const float* grad_lse;  // [B, heads, num_queries] contiguous, or null for zeros
  Tensor4 grad_query, grad_key, grad_value;
  float* grad_sink_logits;  // [heads], or null where there are no sink logits
};

// The kernels of one instruction set; each returns false where scratch memory can't be had.
struct AttentionKernels {
  bool (*forward)(const AttentionParams& params, ParallelFor parallel_for);
  bool (*backward)(const AttentionParams& params, const AttentionGrads& grads, ParallelFor parallel_for);
  // Multiply-adds between registers, as many as the kernels' products have sums; returns the operations done. What it
  // takes is the floor of every product. Null where there is none.
  int64_t (*peak)(int64_t rounds);
};

constexpr int kMaxHeadDim = 256;  // and a multiple of 8

// The instruction sets that this processor has and LONGATTN_CPU_ISA allows, best last: "", "avx2", "avx512", ...
const char* attention_isa();

// The kernels for an element type on this processor; null where there are none.
const AttentionKernels* attention_kernels(Element element);

}  // namespace longattn::cpu
