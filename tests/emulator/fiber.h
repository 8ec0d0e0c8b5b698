// Fibers: one stack for each emulated thread, a switch between them, and what the sanitizers must be told of it.
// x86-64 and aarch64. A switch creates no happens-before edge for the thread sanitizer: only barriers do.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void simt_switch(void** save_stack, void* to_stack);

#if defined(__x86_64__)
constexpr int kSavedRegisters = 6;
asm(R"(
.text
.weak simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#elif defined(__aarch64__)
constexpr int kSavedRegisters = 20;
asm(R"(
.text
.weak simt_switch
.type simt_switch,@function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the emulator switches stacks on x86-64 and aarch64 only"
#endif

namespace simt {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 1 << 20;  // red zones take room
#else
constexpr size_t kStackBytes = 256 << 10;
#endif

// The emulator's own bookkeeping is shared by all fibers on purpose.
struct Unwatched {
#ifdef __SANITIZE_THREAD__
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
#endif
};

inline void release([[maybe_unused]] void* edge) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(edge);
#endif
}

inline void acquire([[maybe_unused]] void* edge) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(edge);
#endif
}

inline unsigned char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    perror("mmap");
    abort();
  }
  return static_cast<unsigned char*>(pages);
}

// A side of a switch: a fiber, or the scheduler on the program's own stack.
struct Context {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;  // of a fiber
  void* tsan = nullptr;
  void* asan_fake = nullptr;
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;

  // A new fiber on `memory`, kStackBytes long, that starts in `entry`, which never returns.
  void start(unsigned char* memory, void (*entry)()) {
    stack = memory;
    asan_bottom = memory;
    asan_size = kStackBytes;
    void** top = reinterpret_cast<void**>(memory + kStackBytes);
#if defined(__x86_64__)
    *--top = nullptr;  // keeps the stack aligned as a call would
    *--top = reinterpret_cast<void*>(entry);
    top -= kSavedRegisters;
#else
    top -= kSavedRegisters;
    top[11] = reinterpret_cast<void*>(entry);  // the link register
#endif
    stack_pointer = top;
#ifdef __SANITIZE_THREAD__
    tsan = __tsan_create_fiber(0);
#endif
  }

  void finish() {
#ifdef __SANITIZE_THREAD__
    __tsan_destroy_fiber(tsan);
#endif
  }
};

// Called first on a new fiber.
inline void entered([[maybe_unused]] Context& from) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &from.asan_bottom, &from.asan_size);
#endif
}

inline void switch_to(Context& from, Context& to, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan_fake, to.asan_bottom, to.asan_size);
#endif
#ifdef __SANITIZE_THREAD__
  if (!from.tsan) from.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: no happens-before edge
#endif
  simt_switch(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.asan_fake, nullptr, nullptr);
#endif
}

}  // namespace simt
