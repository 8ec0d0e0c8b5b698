// A thread block: its threads as fibers of one OS thread, the order they run in, barriers and warp rendezvous.
//
// A thread runs until it waits. A warp collective is a rendezvous of its 32 threads, carried out once by the last to
// arrive; lanes that meet in different instructions, or never, end the program with a message. Seed 0 is a fixed round
// of all warps; any other seed is a random schedule that lets one warp run far ahead of the others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "emulator/fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// What the run did, for tests that compare it with closed forms.
struct Counters {
  int64_t mma = 0;
  int64_t most_mma = 0;  // of one block
  int64_t ldmatrix = 0;
  int64_t bank_conflicts = 0;  // extra cycles of shared memory accesses of 16 bytes a lane
  int64_t barriers = 0;
  int64_t bytes_read = 0;  // of global memory, by cp.async and load_chunk
  int64_t bytes_written = 0;
};

struct Copy {  // on its way to shared memory; zeros where source is null
  uint32_t destination;
  const void* source;
  unsigned bytes;
};

enum class State : uint8_t { kReady, kWaiting, kDone };

struct Thread {
  Context context;
  unsigned index = 0, lane = 0, warp = 0;
  State state = State::kReady;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Warp {
  uint32_t arrived = 0, live = 0;
  const char* operation = nullptr;
  int line = 0;
  const void* in[32];
  void* out[32];
  char edge;
};

struct Block {
  dim3 index, threads_dim, grid_dim;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  unsigned at_barrier = 0, live = 0;
  char barrier_edge = 0, start_edge = 0, end_edge = 0;
  Context scheduler;
  const std::function<void()>* body = nullptr;
};

// What works beside the threads, where a family of devices has such a thing.
struct Engine {
  virtual void start_block() = 0;
  virtual void end_block() = 0;
  virtual bool step(unsigned random) = 0;  // whether there was something to do
  virtual ~Engine() = default;
};

inline Block* block = nullptr;
inline Engine* engine = nullptr;
inline Thread* self = nullptr;
inline Counters counters;
inline unsigned schedule_seed = 0;

[[noreturn]] inline void fail(const char* message) {
  fprintf(stderr, "simt: %s (block %u,%u,%u thread %d)\n", message, block->index.x, block->index.y, block->index.z,
          self ? static_cast<int>(self->index) : -1);
  fflush(stderr);
  abort();
}

inline void wait() {
  if (self->state == State::kWaiting) switch_to(self->context, block->scheduler);
}

// `carry_out` runs once all 32 lanes are here, over what each lane gave; `orders_memory` as __syncwarp does.
template <typename F>
void collective(const char* operation, int line, const void* in, void* out, F carry_out, bool orders_memory = false) {
  Warp& warp = block->warps[self->warp];
  if (orders_memory) release(&warp.edge);
  {
    Unwatched unwatched;
    if (warp.arrived == 0) {
      warp.operation = operation;
      warp.line = line;
    } else if (warp.operation != operation || warp.line != line) {
      fail("divergent warp collective: lanes meet in different instructions");
    }
    if (warp.live != 0xffffffffu) fail("warp collective with lanes that have exited");
    warp.in[self->lane] = in;
    warp.out[self->lane] = out;
    warp.arrived |= 1u << self->lane;
    if (warp.arrived == 0xffffffffu) {
      carry_out(warp);
      warp.arrived = 0;
      for (unsigned lane = 0; lane < 32; ++lane) block->threads[self->warp * 32 + lane].state = State::kReady;
    } else {
      self->state = State::kWaiting;
    }
  }
  wait();
  if (orders_memory) acquire(&warp.edge);
}

inline void barrier() {
  release(&block->barrier_edge);
  {
    Unwatched unwatched;
    if (block->live != block->threads.size()) fail("__syncthreads with threads that have exited");
    if (++block->at_barrier == block->live) {
      block->at_barrier = 0;
      ++counters.barriers;
      for (Thread& thread : block->threads) thread.state = State::kReady;
    } else {
      self->state = State::kWaiting;
    }
  }
  wait();
  acquire(&block->barrier_edge);
}

inline void thread_main() {
  entered(block->scheduler);
  acquire(&block->start_edge);
  (*block->body)();
  release(&block->end_edge);
  {
    Unwatched unwatched;
    if (!self->groups.empty() || !self->open.empty()) fail("a thread exits with cp.async in flight");
    self->state = State::kDone;
    --block->live;
    block->warps[self->warp].live &= ~(1u << self->lane);
  }
  switch_to(self->context, block->scheduler, true);
  abort();
}

// Runs the ready threads of one warp, starting with lane `first`; whether there were any.
inline bool run_warp(Block& running, unsigned warp, unsigned first) {
  bool progress = false;
  for (unsigned i = 0; i < 32; ++i) {
    Thread& thread = running.threads[warp * 32 + (first + i) % 32];
    if (thread.state != State::kReady) continue;
    progress = true;
    self = &thread;
    switch_to(running.scheduler, thread.context);
    self = nullptr;
  }
  return progress;
}

inline void run_block(Block& running, std::mt19937& random) {
  const unsigned warps = static_cast<unsigned>(running.warps.size());
  unsigned favoured = 0, burst = 0;
  while (running.live) {
    bool progress = false;
    if (schedule_seed && burst == 0) {
      favoured = random() % warps;
      burst = 1u << random() % 12;
    }
    for (unsigned w = 0; w < warps && !(schedule_seed && progress); ++w)  // others only while the favoured one waits
      progress |= schedule_seed ? run_warp(running, (favoured + w) % warps, random() % 32) : run_warp(running, w, 0);
    if (burst) --burst;
    if (engine && (!progress || (schedule_seed && random() % 4 == 0))) progress |= engine->step(random());
    if (!progress) fail(running.at_barrier ? "deadlock at __syncthreads" : "deadlock in a warp collective");
  }
}

// Runs a grid, block after block. Shared memory starts as NaNs; pages behind it are fenced for the address sanitizer.
inline void launch(dim3 grid, dim3 threads_dim, size_t shared_bytes, const std::function<void()>& body) {
  const unsigned threads = threads_dim.x * threads_dim.y * threads_dim.z;
  const size_t shared_pages = (shared_bytes + 8191) / 4096 * 4096;
  Unwatched unwatched;
  Block running;
  running.threads_dim = threads_dim;
  running.grid_dim = grid;
  running.shared_bytes = shared_bytes;
  running.body = &body;
  block = &running;
  if (threads % 32) fail("a block must hold whole warps");
  release(&running.start_edge);
  std::mt19937 random(schedule_seed);
  running.threads.resize(threads);
  unsigned char *shared = nullptr, *stacks = nullptr;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
#ifdef __SANITIZE_THREAD__
    if (shared) {  // so that the sanitizer forgets the accesses of the block before
      munmap(shared, shared_pages);
      munmap(stacks, threads * kStackBytes);
      shared = nullptr;
    }
#endif
    if (!shared) {
      shared = map_pages(shared_pages);
      stacks = map_pages(threads * kStackBytes);
    }
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(shared, shared_pages);
#endif
    for (size_t byte = 0; byte < shared_bytes; ++byte) shared[byte] = 0xff;
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(shared + shared_bytes, shared_pages - shared_bytes);
#endif
    running.shared = shared;
    running.index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    running.live = threads;
    running.at_barrier = 0;
    running.warps.assign(threads / 32, Warp());
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = running.threads[t];
      thread.index = t;
      thread.lane = t % 32;
      thread.warp = t / 32;
      thread.state = State::kReady;
      thread.context.start(stacks + t * kStackBytes, thread_main);
      running.warps[t / 32].live |= 1u << t % 32;
    }
    const int64_t mma_before = counters.mma;
    if (engine) engine->start_block();
    run_block(running, random);
    if (engine) engine->end_block();
    counters.most_mma = std::max(counters.most_mma, counters.mma - mma_before);
    for (Thread& thread : running.threads) thread.context.finish();
  }
  if (shared) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(shared, shared_pages);
#endif
    munmap(shared, shared_pages);
    munmap(stacks, threads * kStackBytes);
  }
  acquire(&running.end_edge);
  block = nullptr;
}

}  // namespace simt
