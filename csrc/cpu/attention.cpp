// Which kernels this processor gets. LONGATTN_CPU_ISA caps the instruction set: README, "Install".
#include "attention.h"

#include <cstdlib>
#include <cstring>

#include "attention_isas.h"
#include "isa.h"

#ifdef LONGATTN_AMX_KERNELS
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longattn::cpu {
namespace {

enum Isa { kNone, kAvx2, kAvx512, kAvx512Bf16, kAmx, kCount };
constexpr const char* kNames[kCount] = {"none", "avx2", "avx512", "avx512_bf16", "amx"};

// Linux gives the tile registers to a process that asks for them.
bool may_use_tiles() {
#ifdef LONGATTN_AMX_KERNELS
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has(int isa) {
#ifdef LONGATTN_X86_KERNELS
  __builtin_cpu_init();
  switch (isa) {
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case kAvx512Bf16:
      return __builtin_cpu_supports("avx512bf16");
#ifdef LONGATTN_AMX_KERNELS
    case kAmx:
      return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
#endif
  }
#endif
  return isa == kNone;
}

// Intel's processors take two cycles for a bfloat16 dot product: converting to float32 is as fast and more exact.
bool has_slow_dot() {
#ifdef LONGATTN_X86_KERNELS
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// The best instruction set that the processor has and the variable allows; a name that is none allows all.
int find_isa() {
  int cap = kCount - 1;
  bool named = false;
  if (const char* name = std::getenv("LONGATTN_CPU_ISA"))
    for (int isa = 0; isa < kCount; ++isa)
      if (std::strcmp(name, kNames[isa]) == 0) {
        cap = isa;
        named = true;
      }
  int best = kNone;
  while (best < cap && has(best + 1)) ++best;
  return best == kAvx512Bf16 && !named && has_slow_dot() ? kAvx512 : best;
}

int isa() {
  static const int found = find_isa();
  return found;
}

}  // namespace

const char* attention_isa() { return kNames[isa()]; }

const AttentionKernels* attention_kernels(Element element) {
#ifdef LONGATTN_X86_KERNELS
#ifdef LONGATTN_AMX_KERNELS
  if (isa() >= kAmx && element == Element::kBFloat16) return amx_kernels();
#endif
  if (isa() >= kAvx512Bf16 && element == Element::kBFloat16) return avx512_bf16_kernels();
  if (isa() >= kAvx512) return avx512_kernels(element);
  if (isa() >= kAvx2) return avx2_kernels(element);
#endif
  static_cast<void>(element);
  return nullptr;
}

const RopeKernels* rope_kernels() {
#ifdef LONGATTN_X86_KERNELS
  if (isa() >= kAvx512) return avx512_rope_kernels();
  if (isa() >= kAvx2) return avx2_rope_kernels();
#endif
  return nullptr;
}

}  // namespace longattn::cpu
