// Banded attention for compute capability 9.0: what its launchers offer beside window_attn.h. No torch header.
#pragma once

#include "window_attn.h"

namespace longattn::cuda {

// Why this family can't serve a call, in words that follow "the kernels for compute capability 9.0 need"; null where it
// can. The tensors' places and strides decide, never values.
const char* why_not_sm90(const AttentionParams& params);
const char* why_not_sm90(const BackwardParams& params);

// Whether a call gets this family: LONGATTN_HOPPER=1 asks for it, the current device is of compute capability 9.0,
// there are more queries than those that decoding splits over keys, and nothing is lacking.
bool sm90_takes(const AttentionParams& params);
bool sm90_takes(const BackwardParams& params);

// As window_attn_forward and window_attn_backward, for calls that why_not_sm90 allows, on cards of compute capability
// 9.0 only.
cudaError_t window_attn_forward_sm90(const AttentionParams& params, cudaStream_t stream);
cudaError_t window_attn_backward_sm90(const BackwardParams& params, cudaStream_t stream);

// Scratch of a backward that forms all gradients in one pass; no bytes where it is to form them in two. Calls that the
// one pass serves and gains by have it, or those that LONGATTN_HOPPER_BACKWARD says (README, "Install").
struct SinglePassScratch {
  int64_t sums_bytes, flags_bytes;  // of BackwardParams' query_sums, and of query_flags, which are to be zeros
};
SinglePassScratch single_pass_scratch(const BackwardParams& params);

// The pass itself, behind window_attn_before_passes.
cudaError_t window_attn_single_pass_sm90(const BackwardParams& params, cudaStream_t stream);

}  // namespace longattn::cuda
