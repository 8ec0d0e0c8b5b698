// What sm_90a adds to simt.h: mbarriers, bulk tensor copies (TMA), products of whole warpgroups (wgmma), and named
// barriers.
//
// Products read tiles of [rows, panel] 16-bit elements, a row of a panel being 128 or 64 bytes, swizzled as the copies
// write it: the 16-byte chunks of a row are XORed with the row's number (bits 7 and up of the address).
// wgmma.m64nNk16: warp w of a warpgroup holds rows 16 w .. 16 w + 15 of the sum and of A as mma.m16n8k16 does; its N
// columns are N / 8 such blocks of 4 values a lane. Products run on their own: what they read and write may not be
// touched between issue and wgmma_wait.
#pragma once

#include "simt.h"

#ifdef LONGATTN_EMULATED
#include "emulator/simt90.h"
#else

#include <cuda.h>

#include <type_traits>

// The target that has these instructions. Kernels are never launched as another, as PTX that the driver is told to
// compile would be (CUDA_FORCE_PTX_JIT): there they end with an error rather than leave their outputs unwritten.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SIMT_SM90A 1
#endif
#define SIMT_SHARED_1024(name) extern __shared__ __align__(1024) unsigned char name[]

namespace simt {

using TensorMap = CUtensorMap;

// Fills a map of a [sizes[3], .., sizes[0]] tensor of 16-bit elements, channels contiguous, strides in bytes, moved in
// boxes whose rows are `row_bytes` (128 or 64) wide and swizzled. False where the driver can't.
inline bool encode_map(TensorMap& map, void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                       const uint32_t (&box)[4], int row_bytes) {
  static const auto encode = [] {
    void* found = nullptr;  // looked up at run time, as the driver's library is not there where this is linked
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  const uint32_t steps[4] = {1, 1, 1, 1};
  const auto swizzle = row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  if (!encode) return false;
  // Elements are only moved: one 16-bit type serves all. What lies outside of the tensor is read as zeros.
  const auto encoded = [&] {
    return encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, data, sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encoded();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // The driver asks for a context, which a thread that has launched nothing yet (autograd's, say) does not have. To
    // set its device, though that stays the same, gives it one.
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) result = encoded();
  }
  return result == CUDA_SUCCESS;
}

inline bool is_sm90() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

__device__ __forceinline__ void trap() { asm volatile("trap;"); }

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Between the first inits and the block's barrier: so that copies see them too.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase end only once copies have brought `bytes` more.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity; the first phase has parity 0.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}

// Whether it has ended, for who has something else to do meanwhile.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// The value of the first lane, where all have the same: so that the compiler knows it.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Of every thread of a warpgroup; multiples of 8.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// One box, from the given element on, to or from shared memory (1024-byte aligned).
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&at)[4]) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];" ::
          "r"(to),
      "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
      : "memory");
}
__device__ __forceinline__ void store_box(uint32_t from, const TensorMap& map, const int (&at)[4]) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2,%3,%4,%5}], [%0];" ::"r"(from),
               "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the stores of this thread have read shared memory.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Contiguous floats from shared memory, which replace those in global memory or are added to them; 16-byte aligned.
template <bool kAdd>
__device__ __forceinline__ void store_floats(float* to, uint32_t from, uint32_t bytes) {
  if constexpr (kAdd)
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void store_floats_commit() { store_commit(); }
// Until all but the last kPending groups of this thread's stores are where others can read them.
template <int kPending>
__device__ __forceinline__ void store_floats_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// Orders this thread's accesses to global memory, and what it has been let see, with its copies.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Flags in global memory: who sees a value sees all that was done before it was raised.
__device__ __forceinline__ bool flag_is(const int* flag, int value) {
  int found;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  return found == value;
}
__device__ __forceinline__ void wait_for_flag(const int* flag, int value) {
  while (!flag_is(flag, value)) {
  }
}
__device__ __forceinline__ void raise_flag(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Of what other blocks have written: past the first level of caches, which does not see it.
__device__ __forceinline__ Chunk load_sums(const float* from) {
  Chunk chunk;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(chunk.word[0]), "=r"(chunk.word[1]), "=r"(chunk.word[2]), "=r"(chunk.word[3])
               : "l"(from)
               : "memory");
  return chunk;
}

// A plain store, behind a fence for copies or products to read.
template <typename T>
__device__ __forceinline__ void store_shared(void* to, T value) {
  *static_cast<T*>(to) = value;
}
// 16 bytes of each lane, likewise.
__device__ __forceinline__ void store_shared_chunk(uint32_t address, const Chunk& chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(chunk.word[0]), "r"(chunk.word[1]),
               "r"(chunk.word[2]), "r"(chunk.word[3])
               : "memory");
}
// Four 8x8 matrices as sums hold them; lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// What this thread wrote to shared memory becomes visible to copies and products, behind the next barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A barrier of so many warpgroups; id 1 to 15, as 0 is __syncthreads.
template <int kWarpgroups>
__device__ __forceinline__ void sync_warpgroups(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(128 * kWarpgroups) : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last kPending groups are done; `sum` (and `other`) are theirs, and the compiler may move no use of
// them before.
template <int kPending, int kSize>
__device__ __forceinline__ void wgmma_wait(float (&sum)[kSize]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
template <int kPending, int kSize>
__device__ __forceinline__ void wgmma_wait(float (&sum)[kSize], float (&other)[kSize]) {
  wgmma_wait<kPending>(sum);
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(other[i])::"memory");
}

#define SIMT_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define SIMT_R0 SIMT_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SIMT_R1 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define SIMT_R2 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SIMT_R3                                                      \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define SIMT_R4                                                                  \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SIMT_F8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SIMT_F16(i) SIMT_F8(i), SIMT_F8(i + 8)
#define SIMT_F32(i) SIMT_F16(i), SIMT_F16(i + 16)
#define SIMT_LIST(...) __VA_ARGS__

// Sums of 64 x kN: A [64, 16] and B [kN, 16] in shared memory, both with contiguous k; replaced where !kAdd.
#define SIMT_WGMMA_SS(kN, kSums, registers, operands, a_and_b, add)                                      \
  template <typename Type, bool kAdd>                                                                    \
  __device__ __forceinline__ void wgmma_ss(float(&d)[kSums], uint64_t a, uint64_t b) {                   \
    if constexpr (std::is_same_v<Type, Bf16>)                                                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN \
                   "k16.f32.bf16.bf16 {" registers "}, " a_and_b ", p, 1, 1, 0, 0;\n}"                   \
                   : operands                                                                            \
                   : "l"(a), "l"(b), "n"(kAdd));                                                         \
    else                                                                                                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN \
                   "k16.f32.f16.f16 {" registers "}, " a_and_b ", p, 1, 1, 0, 0;\n}"                     \
                   : operands                                                                            \
                   : "l"(a), "l"(b), "n"(kAdd));                                                         \
  }
SIMT_WGMMA_SS(32, 16, SIMT_R16, SIMT_LIST(SIMT_F16(0)), "%16, %17", "%18")
SIMT_WGMMA_SS(64, 32, SIMT_R0, SIMT_LIST(SIMT_F32(0)), "%32, %33", "%34")

// Adds to sums of 64 x 64: A and B in shared memory, both across: with contiguous m and n.
template <typename Type>
__device__ __forceinline__ void wgmma_ss_across(float (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<Type, Bf16>)
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SIMT_R0 "}, %32, %33, p, 1, 1, 1, 1;\n}"
        : SIMT_F32(0)
        : "l"(a), "l"(b));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" SIMT_R0 "}, %32, %33, p, 1, 1, 1, 1;\n}"
        : SIMT_F32(0)
        : "l"(a), "l"(b));
}

// Adds to sums of 64 x kN: A [64, 16] in registers, B [16, kN] in shared memory with contiguous n.
#define SIMT_WGMMA_RS(kN, kSums, registers, operands, rest)                                        \
  template <typename Type>                                                                         \
  __device__ __forceinline__ void wgmma_rs(float(&d)[kSums], const uint32_t(&a)[4], uint64_t b) {  \
    if constexpr (std::is_same_v<Type, Bf16>)                                                      \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #kN \
                   "k16.f32.bf16.bf16 {" registers "}, " rest ", p, 1, 1, 1;\n}"                   \
                   : operands                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
    else                                                                                           \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #kN \
                   "k16.f32.f16.f16 {" registers "}, " rest ", p, 1, 1, 1;\n}"                     \
                   : operands                                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
  }
SIMT_WGMMA_RS(64, 32, SIMT_R0, SIMT_LIST(SIMT_F32(0)), "{%32,%33,%34,%35}, %36")
SIMT_WGMMA_RS(96, 48, SIMT_R0 "," SIMT_R1, SIMT_LIST(SIMT_F32(0), SIMT_F16(32)), "{%48,%49,%50,%51}, %52")
SIMT_WGMMA_RS(128, 64, SIMT_R0 "," SIMT_R1 "," SIMT_R2, SIMT_LIST(SIMT_F32(0), SIMT_F32(32)), "{%64,%65,%66,%67}, %68")
SIMT_WGMMA_RS(192, 96, SIMT_R0 "," SIMT_R1 "," SIMT_R2 "," SIMT_R3, SIMT_LIST(SIMT_F32(0), SIMT_F32(32), SIMT_F32(64)),
              "{%96,%97,%98,%99}, %100")
SIMT_WGMMA_RS(256, 128, SIMT_R0 "," SIMT_R1 "," SIMT_R2 "," SIMT_R3 "," SIMT_R4,
              SIMT_LIST(SIMT_F32(0), SIMT_F32(32), SIMT_F32(64), SIMT_F32(96)), "{%128,%129,%130,%131}, %132")

#undef SIMT_WGMMA_SS
#undef SIMT_WGMMA_RS
}  // namespace simt
#endif

namespace simt {

// The shared-memory operand of a product. Its upper half is the layout alone; the lower holds, in units of 16 bytes,
// the address, to which steps may be added, and the step between panels (`across`, where n is contiguous and wider than
// one).
template <int kRowBytes>
struct Operand {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  uint32_t low;

  __device__ __forceinline__ explicit Operand(uint32_t address, uint32_t across = 16)
      : low((address & 0x3ffff) >> 4 | across >> 4 << 16) {}
  __device__ __forceinline__ uint64_t at(int bytes) const {
    constexpr uint64_t kEightRows = 8 * kRowBytes / 16, kSwizzle = kRowBytes == 128 ? 1 : 2;
    return (kEightRows | kSwizzle << 30) << 32 | (low + bytes / 16);
  }
};

}  // namespace simt
