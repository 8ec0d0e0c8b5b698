// Which compilers get the kernels for which instruction sets. A binary must travel: the sets are chosen when it runs.
#pragma once

// Target regions (#pragma GCC target) are GCC's; other compilers get no attention kernels, and the pure path.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LONGATTN_X86_KERNELS 1
#define LONGATTN_CPU_TARGETS "x86-64 with kernels for AVX2 and AVX-512"
#if __GNUC__ >= 11 && defined(__linux__)  // Linux must be asked for the tiles
#define LONGATTN_AMX_KERNELS 1
#endif
#endif
#ifndef LONGATTN_CPU_TARGETS
#define LONGATTN_CPU_TARGETS "the compiler's baseline"
#endif

#define LONGATTN_FORCE_INLINE inline __attribute__((always_inline))
