// Which attention kernels this processor gets. LONGATTN_CPU_ISA caps the instruction set: README, "Install".
#include "attention.h"

#include <cstdlib>
#include <cstring>

#include "attention_isas.h"
#include "isa.h"

namespace longattn::cpu {
namespace {

constexpr const char* kNames[] = {"none", "avx2", "avx512"};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

bool has(int isa) {
#ifdef LONGATTN_X86_KERNELS
  __builtin_cpu_init();
  switch (isa) {
    case 1:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case 2:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == 0;
}

// The best instruction set that the processor has and the variable allows; a name that is none allows all.
int find_isa() {
  int cap = kCount - 1;
  if (const char* name = std::getenv("LONGATTN_CPU_ISA"))
    for (int isa = 0; isa < kCount; ++isa)
      if (std::strcmp(name, kNames[isa]) == 0) cap = isa;
  int best = 0;
  while (best < cap && has(best + 1)) ++best;
  return best;
}

int isa() {
  static const int found = find_isa();
  return found;
}

}  // namespace

const char* attention_isa() { return kNames[isa()]; }

const AttentionKernels* attention_kernels(Element element) {
#ifdef LONGATTN_X86_KERNELS
  switch (isa()) {
    case 1:
      return avx2_kernels(element);
    case 2:
      return avx512_kernels(element);
  }
#endif
  static_cast<void>(element);
  return nullptr;
}

}  // namespace longattn::cpu
