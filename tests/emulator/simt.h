// What csrc/simt.h gives a kernel on a GPU, for g++: the CUDA words as macros, and the wrappers over the emulator.
// Collectives carry their source line, so that lanes which meet in different instructions are noticed.
#pragma once

#include "emulator/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

#define threadIdx (dim3(simt::self->index))
#define blockIdx (simt::block->index)
#define gridDim (simt::block->grid_dim)
#define __syncthreads() simt::barrier()
#define __syncwarp() simt::sync_warp(__LINE__)

#define SIMT_SHARED(name) unsigned char* name = simt::block->shared
#ifdef LONGATTN_LIST_LAUNCHES  // says what would be launched
#define SIMT_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), (void)(grid), simt::list_launch<kernel>(threads, shared_bytes))
#define SIMT_LAUNCH_TOGETHER SIMT_LAUNCH
namespace simt {
template <auto kKernel>
cudaError_t list_launch(dim3 threads, size_t shared_bytes) {
  printf("%u %zu %s\n", threads.x, shared_bytes, __PRETTY_FUNCTION__);
  return cudaSuccess;
}
}  // namespace simt
#else
#define SIMT_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), simt::launch(grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }), cudaSuccess)
#define SIMT_LAUNCH_TOGETHER(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), simt::launch(grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }, (grid).x), cudaSuccess)
#endif

#define ldmatrix_x4(fragment, address) load_matrices<false>(fragment, address, __LINE__)
#define ldmatrix_x4_trans(fragment, address) load_matrices<true>(fragment, address, __LINE__)
#define mma_add(Type, sum, a, b0, b1) multiply<typename Type::Emulated, true>(sum, a, b0, b1, __LINE__)
#define mma_set(Type, sum, a, b0, b1) multiply<typename Type::Emulated, false>(sum, a, b0, b1, __LINE__)
#define shfl_xor(value, mask) shuffle_xor(value, mask, __LINE__)
#define any_lane(value) vote_any(value, __LINE__)

namespace simt {

struct Bf16 {
  using Emulated = BFloat16;
  static float low(uint32_t word) { return BFloat16::load(static_cast<uint16_t>(word)); }
  static float high(uint32_t word) { return BFloat16::load(static_cast<uint16_t>(word >> 16)); }
  static uint32_t pack(float low, float high) { return BFloat16::store(low) | uint32_t{BFloat16::store(high)} << 16; }
};
#ifdef LONGATTN_ONLY_BF16  // halves what is to be compiled, for builds of which one kernel is looked at
using Fp16 = Bf16;
#else
struct Fp16 {
  using Emulated = Float16;
  static float low(uint32_t word) { return Float16::load(static_cast<uint16_t>(word)); }
  static float high(uint32_t word) { return Float16::load(static_cast<uint16_t>(word >> 16)); }
  static uint32_t pack(float low, float high) { return Float16::store(low) | uint32_t{Float16::store(high)} << 16; }
};
#endif

inline int multiprocessors = 8;
inline cudaError_t count_multiprocessors(int& count) {
  count = multiprocessors;
  return cudaSuccess;
}

inline float as_float(uint32_t bits) { return bits_to_float(bits); }
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float divide_fast(float a, float b) { return a / b; }

}  // namespace simt
