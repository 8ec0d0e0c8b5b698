// Attention kernels for bfloat16 on AMX's bfloat16 tiles. The target region begins behind the headers that other files
// compile too: an inline function of theirs, compiled for this instruction set, could serve a processor that lacks it.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "attention_isas.h"
#include "elements.h"
#include "isa.h"
#include "scratch.h"
#include "strips.h"
#include "tasks.h"

#ifdef LONGATTN_AMX_KERNELS
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside immintrin.h
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#include "amx.h"
#include "backward.h"
#include "forward.h"

namespace longattn::cpu {

const AttentionKernels* amx_kernels() {
  static const AttentionKernels kernels{&forward<Amx, BFloat16>, &backward<Amx, BFloat16>, nullptr};
  return &kernels;
}

}  // namespace longattn::cpu
#endif
