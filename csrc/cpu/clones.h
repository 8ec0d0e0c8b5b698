// One CPU kernel compiled for several instruction sets; the loader picks one. No -march: a binary must travel.
#pragma once

// Clones resolve through ifunc, which glibc has; clang spells the targets differently, so it gets the baseline alone.
// The resolvers run before the thread sanitizer does, and crash in it.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define LONGATTN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define LONGATTN_CPU_TARGETS "x86-64 with clones for AVX2 and AVX-512"
#elif defined(__x86_64__)
#define LONGATTN_CLONES
#define LONGATTN_CPU_TARGETS "x86-64 baseline"
#elif defined(__aarch64__)
#define LONGATTN_CLONES
#define LONGATTN_CPU_TARGETS "aarch64 baseline"
#else
#define LONGATTN_CLONES
#define LONGATTN_CPU_TARGETS "the compiler's baseline"
#endif

// Helpers of a cloned function must be inlined into it to be compiled for its target.
#define LONGATTN_INLINE inline __attribute__((always_inline))
