// Thin wrappers of what a kernel needs beyond C++: the only place with PTX. LONGATTN_EMULATED compiles the same kernels
// with g++ against the emulator in tests/, which gives the same names.
//
// Fragments of mma.m16n8k16 (lane = 4 g + t): A holds rows g, g + 8 and columns 2 t, 2 t + 1, + 8; B holds column g and
// rows 2 t, 2 t + 1, + 8; the sum holds rows g, g + 8 and columns 2 t, 2 t + 1.
#pragma once

#include <cstdint>

namespace simt {
struct alignas(16) Chunk {  // what a lane moves at once
  uint32_t word[4];
};
}  // namespace simt

#ifdef LONGATTN_EMULATED
#include "emulator/simt.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SIMT_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define SIMT_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  simt::launch(kernel, grid, threads, shared_bytes, stream, false, __VA_ARGS__)
// Of blocks that wait for each other: all run at once, or the launch is an error.
#define SIMT_LAUNCH_TOGETHER(kernel, grid, threads, shared_bytes, stream, ...) \
  simt::launch(kernel, grid, threads, shared_bytes, stream, true, __VA_ARGS__)

namespace simt {

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                   bool together, const Args&... args) {
  if (shared_bytes > 48 * 1024) {  // above this a kernel must ask, on each device
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = together ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Multiprocessors of the current device.
inline cudaError_t count_multiprocessors(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) : error;
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit elements; lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, zeros where not valid; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async8(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(destination), "l"(source), "r"(valid ? 8 : 0)
               : "memory");
}
// One access of 16 bytes. The compiler splits such stores at times, where two branches end in one.
__device__ __forceinline__ Chunk load_chunk(const void* source) {
  const uint4 moved = *static_cast<const uint4*>(source);
  return {{moved.x, moved.y, moved.z, moved.w}};
}
__device__ __forceinline__ void store_chunk(void* destination, const Chunk& chunk) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(destination)), "r"(chunk.word[0]),
               "r"(chunk.word[1]), "r"(chunk.word[2]), "r"(chunk.word[3])
               : "memory");
}
__device__ __forceinline__ Chunk load_shared_chunk(const void* source) { return load_chunk(source); }
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Element types: low and high widen the halves of a word, pack rounds two floats to nearest; multiply is d = A B + c.
struct Bf16 {
  __device__ static __forceinline__ float low(uint32_t word) { return __uint_as_float(word << 16); }
  __device__ static __forceinline__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ static __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                  float c0, float c1, float c2, float c3) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
  }
};
struct Fp16 {
  __device__ static __forceinline__ float low(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
  }
  __device__ static __forceinline__ float high(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
  }
  __device__ static __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                  float c0, float c1, float c2, float c3) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
  }
};

// sum += A B, or sum = A B, which needs no zeros beforehand.
template <typename Type, bool kAdd>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kAdd)
    Type::multiply(sum, a, b0, b1, sum[0], sum[1], sum[2], sum[3]);
  else
    Type::multiply(sum, a, b0, b1, 0.0f, 0.0f, 0.0f, 0.0f);
}
#define mma_add(Type, sum, a, b0, b1) multiply<Type, true>(sum, a, b0, b1)
#define mma_set(Type, sum, a, b0, b1) multiply<Type, false>(sum, a, b0, b1)

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; 0 for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float divide_fast(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float shfl_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }

}  // namespace simt
#endif
