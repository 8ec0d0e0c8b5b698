// Attention kernels for AVX2, FMA and F16C. The target region begins behind the headers that other files compile too:
// an inline function of theirs, compiled for this instruction set, could serve a processor that lacks it.
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
#include "rope.h"
#include "scratch.h"
#include "strips.h"
#include "tasks.h"

#ifdef LONGATTN_X86_KERNELS
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside immintrin.h
#pragma GCC target("avx2,fma,f16c")
#include "backward.h"
#include "fma.h"
#include "forward.h"
#include "rope_rows.h"
#include "vec_avx2.h"

namespace longattn::cpu {

const AttentionKernels* avx2_kernels(Element element) {
  static const AttentionKernels kernels[] = {
      {&forward<Fma<Avx2>, float>, &backward<Fma<Avx2>, float>, &Fma<Avx2>::peak},
      {&forward<Fma<Avx2>, BFloat16>, &backward<Fma<Avx2>, BFloat16>, &Fma<Avx2>::peak},
      {&forward<Fma<Avx2>, Float16>, &backward<Fma<Avx2>, Float16>, &Fma<Avx2>::peak},
  };
  return &kernels[static_cast<int>(element)];
}

const RopeKernels* avx2_rope_kernels() { return rope_kernels_of<Avx2>(); }

}  // namespace longattn::cpu
#endif
