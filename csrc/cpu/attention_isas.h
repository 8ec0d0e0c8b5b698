// The tables of kernels, one an instruction set, that attention.cpp chooses from.
#pragma once

#include "attention.h"
#include "rope.h"

namespace longattn::cpu {

const AttentionKernels* avx2_kernels(Element element);
const AttentionKernels* avx512_kernels(Element element);
const AttentionKernels* avx512_bf16_kernels();  // of bfloat16 alone
const AttentionKernels* amx_kernels();          // likewise
const RopeKernels* avx2_rope_kernels();
const RopeKernels* avx512_rope_kernels();

}  // namespace longattn::cpu
