// What blocks on Hopper need that add to one sum in turn, for g++: contiguous copies and additions to global memory,
// flags there, and stores to shared memory that copies and products read.
//
// A copy in one piece reads shared memory at one random time and writes global memory at four later ones; until then
// who waited for it is not there yet. A thread that waits for a flag is woken by who raises it, so that waiting in vain
// is a deadlock and not a loop.
#pragma once

#include "emulator/simt90.h"

namespace simt {

// Carries out a part of one of the copies.
inline void Hopper::move_bulk(size_t which) {
  BulkCopy& copy = bulk[which];
  const bool reads = copy.taken.empty(), add = copy.add;
  const uint32_t shared = copy.shared, part = (copy.count + 3) / 4;
  const uint32_t begin = reads ? 0 : copy.written, end = reads ? copy.count : std::min(copy.count, begin + part);
  float* global = copy.global;
  if (reads) copy.taken.resize(copy.count);
  StoreGroups& own = groups[copy.thread];
  const bool done = !reads && end == copy.count;
#ifdef __SANITIZE_THREAD__
  char* const edge = copy.edge;
  __tsan_switch_to_fiber(copy.fiber, 1);
  if (reads) acquire(edge);
#endif
  for (uint32_t i = begin; i < end; ++i) {
    float taken = 0.0f;
    if (reads) taken = *reinterpret_cast<const float*>(shared_at(shared + 4 * i, 4));
    {
      Unwatched unwatched;
      if (reads) check_fenced(shared + 4 * i, 4);
      reads ? copy.taken[i] = taken : taken = copy.taken[i];
    }
    if (!reads) global[i] = add ? global[i] + taken : taken;
  }
  if (reads) release(&own.reads.edge);
  if (done) release(&own.writes.edge);
  if (done) release(&block->end_edge);
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(block->scheduler.tsan, 1);
  if (done) __tsan_destroy_fiber(copy.fiber);
#endif
  if (reads) own.reads.finish(copy.group, copy.thread);
  if (!reads) copy.written = end;
  if (!done) return;
  counters.bytes_written += 4 * int64_t{copy.count};
  delete copy.edge;
  own.writes.finish(copy.group, copy.thread);
  bulk.erase(bulk.begin() + static_cast<ptrdiff_t>(which));
}

template <bool kAdd>
void store_floats(float* to, uint32_t from, uint32_t bytes) {
  shared_at(from + bytes - 4, 4);
  if (from % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16) fail("copy: pieces must be 16-byte aligned");
  BulkCopy copy{from, to, bytes / 4, kAdd, self, nullptr, nullptr, {}};
  {
    Unwatched unwatched;
    if (hopper().groups[self].acquired_unfenced) fail("copy: a flag that no fence has made visible to it");
    hopper().check_fenced(from, bytes);
    copy.edge = new char;
    copy.group = add_to_group();
#ifdef __SANITIZE_THREAD__
    copy.fiber = __tsan_create_fiber(0);
#endif
  }
  release(copy.edge);
  Unwatched unwatched;
  hopper().bulk.push_back(std::move(copy));
}
inline void store_floats_commit() { store_commit(); }
template <int kPending>
void store_floats_wait() {
  wait_for_groups(&StoreGroups::writes, kPending);
  Unwatched unwatched;
  hopper().groups[self].waited_unfenced = true;
}
inline void fence_async_proxy_global() {
  Unwatched unwatched;
  StoreGroups& own = hopper().groups[self];
  own.waited_unfenced = own.acquired_unfenced = false;
}

inline bool mbarrier_test(uint32_t address, uint32_t parity) {
  Barrier* barrier;
  {
    Unwatched unwatched;
    barrier = &barrier_at(address);
    if (barrier->phase == parity) return false;
  }
  acquire(&barrier->edge);
  return true;
}

inline std::map<const int*, std::vector<Thread*>> flag_waiters;  // of all blocks

inline bool flag_is(const int* flag, int value) {
  {
    Unwatched unwatched;
    if (*flag != value) return false;
    hopper().groups[self].acquired_unfenced = true;
  }
  acquire(const_cast<int*>(flag));
  return true;
}
inline void wait_for_flag(const int* flag, int value) {
  while (!flag_is(flag, value)) {
    {
      Unwatched unwatched;
      flag_waiters[flag].push_back(self);
      self->state = State::kWaiting;
    }
    wait();
  }
}
inline void raise_flag(int* flag, int value) {
  {
    Unwatched unwatched;
    if (hopper().groups[self].waited_unfenced) fail("flag: a sum that no fence has made visible to others");
  }
  release(flag);
  Unwatched unwatched;
  *flag = value;
  for (Thread* thread : flag_waiters[flag]) thread->state = State::kReady;
  flag_waiters[flag].clear();
}

inline Chunk load_sums(const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("misaligned global address");
  return *reinterpret_cast<const Chunk*>(from);
}

inline void store_shared_chunk(uint32_t address, const Chunk& chunk, int line = __builtin_LINE()) {
  collective("st.shared.v4", line, &address, nullptr, [](Warp& warp) { count_conflicts(warp); });
  *reinterpret_cast<Chunk*>(shared_at(address, 16)) = chunk;
  mark_unfenced(address, 16);
}
inline void stmatrix_x4(uint32_t address, const uint32_t (&fragment)[4], int line = __builtin_LINE()) {
  struct In {
    uint32_t address;
    const uint32_t* fragment;
  } in{address, fragment};
  Chunk row;
  collective("stmatrix", line, &in, &row, [](Warp& warp) {
    count_conflicts(warp);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<Chunk*>(warp.out[lane])->word[i] =
            static_cast<const In*>(warp.in[lane % 8 * 4 + i])->fragment[lane / 8];
  });
  *reinterpret_cast<Chunk*>(shared_at(address, 16)) = row;
  mark_unfenced(address, 16);
}

}  // namespace simt
