// A thread block: its threads as fibers of one OS thread, the order they run in, barriers and warp rendezvous.
//
// A thread runs until it waits. A warp collective is a rendezvous of its 32 threads, carried out once by the last to
// arrive; lanes that meet in different instructions, or never, end the program with a message. Seed 0 is a fixed round
// of all warps; any other seed is a random schedule that lets one warp run far ahead of the others. Blocks run one
// after the other, or, where they wait for each other, all at once, by the same two kinds of schedule.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
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

// What works beside the threads of a block, where a family of devices has such a thing.
struct Engine {
  virtual void start_block() = 0;
  virtual void end_block() = 0;
  virtual bool step(unsigned random) = 0;  // whether there was something to do
  virtual ~Engine() = default;
};

struct Block {
  dim3 index, threads_dim, grid_dim;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char *shared = nullptr, *stacks = nullptr;
  size_t shared_bytes = 0;
  unsigned at_barrier = 0, live = 0;
  char barrier_edge = 0, start_edge = 0, end_edge = 0;
  unsigned favoured = 0, burst = 0;  // the warp that runs ahead, and for how long yet
  std::unique_ptr<Engine> engine;
  Context scheduler;
  const std::function<void()>* body = nullptr;
};

inline Block* block = nullptr;
inline std::unique_ptr<Engine> (*make_engine)() = nullptr;
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

// One round of a block, the current one; whether anything happened.
inline bool run_round(Block& running, std::mt19937& random) {
  const unsigned warps = static_cast<unsigned>(running.warps.size());
  bool progress = false;
  if (schedule_seed && running.burst == 0) {
    running.favoured = random() % warps;
    running.burst = 1u << random() % 12;
  }
  for (unsigned w = 0; w < warps && !(schedule_seed && progress); ++w)  // others only while the favoured one waits
    progress |=
        schedule_seed ? run_warp(running, (running.favoured + w) % warps, random() % 32) : run_warp(running, w, 0);
  if (running.burst) --running.burst;
  if (running.engine && (!progress || (schedule_seed && random() % 4 == 0))) progress |= running.engine->step(random());
  return progress;
}

// Runs the first `count` of these blocks to their ends.
inline void run_blocks(std::vector<Block>& blocks, unsigned count, std::mt19937& random) {
  unsigned favoured = 0, burst = 0;
  const auto lives = [](const Block& each) { return each.live > 0; };
  while (std::any_of(blocks.begin(), blocks.begin() + count, lives)) {
    if (schedule_seed && count > 1 && burst == 0) {
      favoured = random() % count;
      burst = 1u << random() % 12;
    }
    if (burst) --burst;
    bool progress = false;
    for (unsigned i = 0; i < count && !(schedule_seed && progress); ++i) {
      Block& each = blocks[(favoured + i) % count];
      if (!each.live) continue;
      block = &each;
      progress |= run_round(each, random);
    }
    if (!progress) fail(block->at_barrier ? "deadlock at __syncthreads" : "deadlock in a warp collective");
  }
}

// Places a block of the grid on `running`. Shared memory starts as NaNs; pages behind it are fenced for the address
// sanitizer.
inline void start_block(Block& running, unsigned index, size_t shared_pages) {
  const size_t threads = running.threads.size();
#ifdef __SANITIZE_THREAD__
  if (running.shared) {  // so that the sanitizer forgets the accesses of the block before
    munmap(running.shared, shared_pages);
    munmap(running.stacks, threads * kStackBytes);
    running.shared = nullptr;
  }
#endif
  if (!running.shared) {
    running.shared = map_pages(shared_pages);
    running.stacks = map_pages(threads * kStackBytes);
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(running.shared, shared_pages);
#endif
  for (size_t byte = 0; byte < running.shared_bytes; ++byte) running.shared[byte] = 0xff;
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(running.shared + running.shared_bytes, shared_pages - running.shared_bytes);
#endif
  const dim3 grid = running.grid_dim;
  running.index = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
  running.live = static_cast<unsigned>(threads);
  running.at_barrier = running.favoured = running.burst = 0;
  running.warps.assign(threads / 32, Warp());
  for (unsigned t = 0; t < threads; ++t) {
    Thread& thread = running.threads[t];
    thread.index = t;
    thread.lane = t % 32;
    thread.warp = t / 32;
    thread.state = State::kReady;
    thread.context.start(running.stacks + t * kStackBytes, thread_main);
    running.warps[t / 32].live |= 1u << t % 32;
  }
  block = &running;
  if (running.engine) running.engine->start_block();
}

// Runs a grid, `at_once` blocks at a time.
inline void launch(dim3 grid, dim3 threads_dim, size_t shared_bytes, const std::function<void()>& body,
                   unsigned at_once = 1) {
  const unsigned threads = threads_dim.x * threads_dim.y * threads_dim.z, total = grid.x * grid.y * grid.z;
  const size_t shared_pages = (shared_bytes + 8191) / 4096 * 4096;
  Unwatched unwatched;
  std::vector<Block> blocks(std::min(at_once, total));
  std::mt19937 random(schedule_seed);
  for (Block& each : blocks) {
    each.threads_dim = threads_dim;
    each.grid_dim = grid;
    each.shared_bytes = shared_bytes;
    each.body = &body;
    each.threads.resize(threads);
    if (make_engine) each.engine = make_engine();
    block = &each;
    if (threads % 32) fail("a block must hold whole warps");
    if (threads > 1024 || shared_bytes > 227 * 1024 || grid.y > 65535 || grid.z > 65535)
      fail("a launch beyond what a device takes");
    release(&each.start_edge);
  }
  for (unsigned first = 0; first < total; first += at_once) {
    const unsigned count = std::min(at_once, total - first);
    for (unsigned i = 0; i < count; ++i) start_block(blocks[i], first + i, shared_pages);
    const int64_t mma_before = counters.mma;
    run_blocks(blocks, count, random);
    if (at_once == 1) counters.most_mma = std::max(counters.most_mma, counters.mma - mma_before);
    for (unsigned i = 0; i < count; ++i) {
      block = &blocks[i];
      if (block->engine) block->engine->end_block();
      for (Thread& thread : block->threads) thread.context.finish();
    }
  }
  for (Block& each : blocks) {
    if (each.shared) {
#ifdef __SANITIZE_ADDRESS__
      ASAN_UNPOISON_MEMORY_REGION(each.shared, shared_pages);
#endif
      munmap(each.shared, shared_pages);
      munmap(each.stacks, threads * kStackBytes);
    }
    acquire(&each.end_edge);
  }
  block = nullptr;
}

}  // namespace simt
