// Which compilers get the kernels for which instruction sets. A binary must travel: the sets are chosen when it runs.
#pragma once

// Target regions (#pragma GCC target) are GCC's; other compilers get no attention kernels, and the pure path.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LONGATTN_X86_KERNELS 1
#if __GNUC__ >= 11 && defined(__linux__)  // Linux must be asked for the tiles
#define LONGATTN_AMX_KERNELS 1
#endif
#endif
