// What csrc/simt90.h gives a kernel on Hopper, for g++: mbarriers, the copy engine, and products of warpgroups.
//
// A copy is carried out at a random time after its issue: its destination holds NaNs until then, and it is an agent of
// its own for the thread sanitizer, ordered by its issue and its mbarrier alone. Products are in product90.h; copies in
// one piece, and what else blocks that add to one sum need, in bulk90.h.
#pragma once

#include <map>
#include <numeric>

#include "emulator/simt.h"

#define SIMT_SM90A 1
#define SIMT_SHARED_1024(name) SIMT_SHARED(name)

namespace simt {

inline bool is_sm90() { return true; }

struct TensorMap {
  unsigned char* data;
  uint64_t sizes[4], strides[4];  // strides in bytes, the channels' too
  uint32_t box[4];
  int row_bytes;
};

// As cuTensorMapEncodeTiled, with what its documentation asks for.
inline bool encode_map(TensorMap& map, void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                       const uint32_t (&box)[4], int row_bytes) {
  map = {static_cast<unsigned char*>(data), {}, {2}, {}, row_bytes};
  if (reinterpret_cast<uintptr_t>(data) % 16 || box[0] % 8 || static_cast<int>(2 * box[0]) > row_bytes) return false;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256) return false;
    if (i > 0 && (strides[i - 1] == 0 || strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40)) return false;
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (i > 0) map.strides[i] = strides[i - 1];
  }
  return true;
}

constexpr int kMostOfBarrier = (1 << 20) - 1;  // arrivals, and bytes that are yet to come

struct Barrier {
  int count = 0, pending = 0;
  const Thread* made_by = nullptr;
  bool visible = false;  // to others, and to copies
  int64_t bytes = 0;     // that copies have yet to bring
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
  char edge = 0;
};

// A store reads shared memory at one time and writes global memory at a later one, that of a box before the block's end
// at the latest.
struct BoxCopy {
  bool load;
  uint32_t shared, barrier;
  TensorMap map;
  int at[4];
  Thread* thread;  // of a store
  void* fiber;
  char* edge;
  uint64_t group = 0;
  std::vector<uint16_t> taken;
};

struct ProductIn {
  float* sum;
  const uint32_t* a;  // registers; else a descriptor
  uint64_t left, right;
  bool left_k, right_k;  // whether k is contiguous
  bool add;
  int n;
  float (*load)(uint16_t);
};

struct Registers {  // the same ones of 128 threads
  void* at[128];
  size_t bytes;
  std::vector<unsigned char> seen;  // what they held when they were looked at

  void look();
  bool are_as_seen() const;
};

struct Product {
  ProductIn in;  // of the first thread
  Registers a;
  std::vector<uint16_t> operands;  // in shared memory
};

struct Sum {  // that products are adding to
  Registers registers;
  std::vector<float> values;
  int products;
};

struct Warpgroup {
  unsigned arrived = 0;
  const char* operation = nullptr;
  int line = 0;
  const void* in[128];
  bool fenced = false;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::map<const void*, Sum> sums;         // by their first thread's registers
  std::map<const void*, Registers> known;  // that products have had, likewise
};

struct BulkCopy {  // contiguous floats to global memory: read at one time, written or added a quarter at a time later
  uint32_t shared;
  float* global;
  uint32_t count;
  bool add;
  Thread* thread;
  void* fiber;
  char* edge;
  std::vector<float> taken;
  uint32_t written = 0;
  uint64_t group = 0;
};

struct StoreGroups {  // of one thread
  uint64_t committed = 0;
  bool uncommitted = false;
  struct Unfinished {
    std::map<uint64_t, int> copies;  // of a group
    bool awaited = false;
    uint64_t until = 0;  // that no group before this one is unfinished
    char edge = 0;

    bool reached() const { return copies.empty() || copies.begin()->first >= until; }
    void finish(uint64_t group, Thread* thread) {
      if (--copies[group] == 0) copies.erase(group);
      if (!awaited || !reached()) return;
      awaited = false;
      thread->state = State::kReady;
    }
  } reads, writes;
  bool waited_unfenced = false, acquired_unfenced = false;  // what only a fence lets the other kind of access see
};

struct NamedBarrier {
  size_t count = 0;  // that the first to arrive gave
  std::vector<Thread*> waiting;
  char edge = 0;
};

inline uint32_t swizzled(uint32_t address, int row_bytes) {
  return address ^ (address >> 7 & (row_bytes == 128 ? 7u : 3u)) << 4;
}

struct Hopper : Engine {
  std::map<uint32_t, Barrier> barriers;
  std::map<int, NamedBarrier> named;
  std::vector<BoxCopy> copies;
  std::vector<Warpgroup> warpgroups;
  std::vector<BulkCopy> bulk;
  std::map<Thread*, StoreGroups> groups;
  std::vector<int> registers;  // that a thread of each warpgroup has
  std::vector<int> unfenced;   // of each 4 bytes of shared memory: the thread that wrote them since its last fence, + 1
  size_t unfenced_words = 0;
  std::vector<std::vector<uint32_t>> written;  // by each thread, of those

  void start_block() override {
    unfenced.assign(block->shared_bytes / 4 + 1, 0);
    unfenced_words = 0;
    written.assign(block->threads.size(), {});
    groups.clear();
    barriers.clear();
    named.clear();
    warpgroups.assign(block->warps.size() / 4, Warpgroup());
    registers.assign(warpgroups.size(), launched_registers());
  }
  void end_block() override {
    for (const BoxCopy& copy : copies)
      if (copy.load || copy.taken.empty()) fail("a block exits with copies in flight");
    if (!bulk.empty()) fail("a block exits with copies in flight");
    while (!copies.empty()) move_box(0);
    if (std::accumulate(registers.begin(), registers.end(), 0) >
        launched_registers() * static_cast<int>(registers.size()))
      fail("setmaxnreg: more registers than the block was launched with");
    for (const Warpgroup& each : warpgroups)
      if (!each.open.empty() || !each.groups.empty()) fail("a block exits with products in flight");
  }
  // Carries out one of the copies.
  bool step(unsigned random) override {
    if (copies.empty() && bulk.empty()) return false;
    const size_t which = random % (copies.size() + bulk.size());
    if (which >= copies.size()) {
      move_bulk(which - copies.size());
      return true;
    }
    move_box(which);
    return true;
  }

  void turn(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    for (Thread* thread : barrier.waiting) thread->state = State::kReady;
    barrier.waiting.clear();
  }

  // Copies and products see what threads wrote only behind the fences of those.
  void check_fenced(uint32_t address, uint32_t bytes) const {
    if (!unfenced_words) return;
    for (uint32_t i = address / 4; i < (address + bytes) / 4; ++i)
      if (unfenced[i]) fail("copy or product: meets what no fence has made visible to it");
  }
  int launched_registers() const { return std::min(256, 65536 / static_cast<int>(block->threads.size())) / 8 * 8; }

 private:
  void move_bulk(size_t which);
  // Carries out a load, or a half of a store.
  void move_box(size_t which) {
    BoxCopy copy = std::move(copies[which]);
    copies.erase(copies.begin() + static_cast<ptrdiff_t>(which));
    const bool reads = !copy.load && copy.taken.empty();
    StoreGroups* own = copy.load ? nullptr : &groups[copy.thread];
    const uint32_t elements = copy.map.box[0] * copy.map.box[1] * copy.map.box[2] * copy.map.box[3];
    if (reads) copy.taken.resize(elements);
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(copy.fiber, 1);
    if (copy.load || reads) acquire(copy.edge);
#endif
    copy.load ? move<Part::kLoad>(copy) : reads ? move<Part::kRead>(copy) : move<Part::kWrite>(copy);
    release(copy.load ? &barriers[copy.barrier].edge : reads ? &own->reads.edge : &own->writes.edge);
    if (!copy.load && !reads) release(&block->end_edge);
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(block->scheduler.tsan, 1);
    if (!reads) __tsan_destroy_fiber(copy.fiber);
#endif
    if (reads) {
      own->reads.finish(copy.group, copy.thread);
      copies.push_back(std::move(copy));
      return;
    }
    delete copy.edge;
    if (copy.load) {
      Barrier& barrier = barriers[copy.barrier];
      barrier.bytes -= 2 * elements;
      turn(barrier);
    } else {
      own->writes.finish(copy.group, copy.thread);
    }
  }

  enum class Part { kLoad, kRead, kWrite };
  template <Part kPart>
  void move(BoxCopy& copy) {
    const TensorMap& map = copy.map;
    uint32_t row = 0;
    int64_t moved = 0;
    uint16_t* taken = copy.taken.data();
    for (uint32_t z = 0; z < map.box[3]; ++z)
      for (uint32_t y = 0; y < map.box[2]; ++y)
        for (uint32_t x = 0; x < map.box[1]; ++x, ++row) {
          const int64_t outer[3] = {copy.at[1] + int64_t{x}, copy.at[2] + int64_t{y}, copy.at[3] + int64_t{z}};
          bool inside = true;
          int64_t offset = 0;
          for (int i = 0; i < 3; ++i) {
            inside &= outer[i] >= 0 && outer[i] < static_cast<int64_t>(map.sizes[i + 1]);
            offset += outer[i] * static_cast<int64_t>(map.strides[i + 1]);
          }
          for (uint32_t channel = 0; channel < map.box[0]; ++channel, ++taken) {
            const int64_t at = copy.at[0] + int64_t{channel};
            const bool exists = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[0]);
            const uint32_t shared = copy.shared + row * static_cast<uint32_t>(map.row_bytes) + 2 * channel;
            uint16_t* local = reinterpret_cast<uint16_t*>(shared_at(swizzled(shared, map.row_bytes), 2));
            uint16_t* global = exists ? reinterpret_cast<uint16_t*>(map.data + offset + 2 * at) : nullptr;
            if constexpr (kPart == Part::kLoad)
              *local = exists ? *global : 0;
            else if constexpr (kPart == Part::kRead)
              *taken = *local;
            else if (exists)
              *global = *taken;
            moved += exists ? 2 : 0;
          }
        }
    Unwatched unwatched;
    if (kPart == Part::kLoad) counters.bytes_read += moved;
    if (kPart == Part::kWrite) counters.bytes_written += moved;
  }
};

inline Hopper& hopper() { return static_cast<Hopper&>(*block->engine); }
inline const bool hopper_is_the_engine =
    (make_engine = []() -> std::unique_ptr<Engine> { return std::make_unique<Hopper>(); }, true);

inline Barrier& barrier_at(uint32_t address) {
  if (address % 8) fail("mbarrier: misaligned");
  const auto found = hopper().barriers.find(address);
  if (found == hopper().barriers.end()) fail("mbarrier: used before it is initialised");
  if (!found->second.visible && found->second.made_by != self)
    fail("mbarrier: used by another thread than the one that made it, which has not called fence.mbarrier_init");
  return found->second;
}

inline void mbarrier_init(uint32_t address, int arrivals) {
  Unwatched unwatched;
  shared_at(address, 8);
  const auto [made, is_new] = hopper().barriers.try_emplace(address);
  if (!is_new) fail("mbarrier: initialised twice");
  if (arrivals < 1 || arrivals > kMostOfBarrier) fail("mbarrier: a count that it can't hold");
  made->second.count = made->second.pending = arrivals;
  made->second.made_by = self;
}
inline void mbarrier_fence_init() {
  Unwatched unwatched;
  for (auto& [address, barrier] : hopper().barriers) barrier.visible |= barrier.made_by == self;
}

inline void arrive(uint32_t address, int64_t bytes) {
  Barrier* barrier;
  {
    Unwatched unwatched;
    barrier = &barrier_at(address);
  }
  release(&barrier->edge);
  Unwatched unwatched;
  if (barrier->pending == 0) fail("mbarrier: more arrivals than its count");
  barrier->bytes += bytes;
  if (barrier->bytes > kMostOfBarrier) fail("mbarrier: more bytes than it can count");
  --barrier->pending;
  hopper().turn(*barrier);
}
inline void mbarrier_arrive(uint32_t address) { arrive(address, 0); }
inline void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) { arrive(address, bytes); }
inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  Barrier* barrier;
  for (;;) {
    {
      Unwatched unwatched;
      barrier = &barrier_at(address);
      if (barrier->phase != parity) break;
      self->state = State::kWaiting;
      barrier->waiting.push_back(self);
    }
    wait();
  }
  acquire(&barrier->edge);
}

inline void prefetch_map(const TensorMap&) {}

// The group of a store that this thread issues.
inline uint64_t add_to_group() {
  StoreGroups& own = hopper().groups[self];
  own.uncommitted = true;
  ++own.reads.copies[own.committed];
  ++own.writes.copies[own.committed];
  return own.committed;
}

inline void issue_copy(bool load, uint32_t shared, const TensorMap& map, uint32_t barrier, const int (&at)[4]) {
  if (shared % 1024) fail("copy: shared memory must be 1024-byte aligned");
  BoxCopy copy{load, shared, barrier, map, {at[0], at[1], at[2], at[3]}, self, nullptr, nullptr, 0, {}};
  const uint32_t bytes = map.box[1] * map.box[2] * map.box[3] * static_cast<uint32_t>(map.row_bytes);
  shared_at(shared + bytes - 2, 2);
  if (load)
    for (uint32_t i = 0; i < bytes; i += 2) *reinterpret_cast<uint16_t*>(shared_at(shared + i, 2)) = 0xffff;
  {
    Unwatched unwatched;
    hopper().check_fenced(shared, bytes);
    if (load && !barrier_at(barrier).visible)
      fail("mbarrier: given to a copy that no fence.mbarrier_init has let see it");
    if (!load) copy.group = add_to_group();
    copy.edge = new char;
#ifdef __SANITIZE_THREAD__
    copy.fiber = __tsan_create_fiber(0);
#endif
  }
  release(copy.edge);
  Unwatched unwatched;
  hopper().copies.push_back(std::move(copy));
}
inline void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&at)[4]) {
  issue_copy(true, to, map, barrier, at);
}
inline void store_box(uint32_t from, const TensorMap& map, const int (&at)[4]) { issue_copy(false, from, map, 0, at); }
inline void store_commit() {
  Unwatched unwatched;
  StoreGroups& own = hopper().groups[self];
  ++own.committed;
  own.uncommitted = false;
}
// Until all but the last `pending` groups of this thread have been read, or written too.
inline void wait_for_groups(StoreGroups::Unfinished StoreGroups::*which, uint64_t pending) {
  StoreGroups::Unfinished* awaited;
  {
    Unwatched unwatched;
    StoreGroups& own = hopper().groups[self];
    awaited = &(own.*which);
    awaited->until = own.committed < pending ? 0 : own.committed - pending;
    if (own.uncommitted) fail("copy: a wait for stores that were not committed");
    awaited->awaited = !awaited->reached();
    if (awaited->awaited) self->state = State::kWaiting;
  }
  wait();
  acquire(&awaited->edge);
}
inline void store_wait_read() { wait_for_groups(&StoreGroups::reads, 0); }
// Written by this thread, to be met by copies or products.
inline void mark_unfenced(uint32_t address, uint32_t bytes) {
  Unwatched unwatched;
  for (uint32_t i = address / 4; i < (address + bytes) / 4; ++i) {
    hopper().unfenced_words += !hopper().unfenced[i];
    hopper().unfenced[i] = static_cast<int>(self->index) + 1;
    hopper().written[self->index].push_back(i);
  }
}
template <typename T>
void store_shared(void* to, T value) {
  *static_cast<T*>(to) = value;
  mark_unfenced(smem_address(to), sizeof(T));
}
inline void fence_async_proxy() {
  Unwatched unwatched;
  for (const uint32_t at : hopper().written[self->index]) {
    if (hopper().unfenced[at] != static_cast<int>(self->index) + 1) continue;
    hopper().unfenced[at] = 0;
    --hopper().unfenced_words;
  }
  hopper().written[self->index].clear();
}

template <int kWarpgroups>
void sync_warpgroups(int id) {
  NamedBarrier* barrier;
  {
    Unwatched unwatched;
    if (id < 1 || id > 15) fail("named barrier: ids are 1 to 15, and 0 is that of __syncthreads");
    barrier = &hopper().named[id];
    if (barrier->waiting.empty()) barrier->count = 128 * kWarpgroups;
    if (barrier->count != 128 * kWarpgroups) fail("named barrier: threads wait for different numbers of others");
  }
  release(&barrier->edge);
  {
    Unwatched unwatched;
    barrier->waiting.push_back(self);
    self->state = State::kWaiting;
    if (barrier->waiting.size() == barrier->count) {
      for (Thread* thread : barrier->waiting) thread->state = State::kReady;
      barrier->waiting.clear();
    }
  }
  wait();
  acquire(&barrier->edge);
}

inline int uniform(int value, int line = __builtin_LINE()) {
  collective("uniform", line, &value, nullptr, [](Warp& warp) {
    for (const void* in : warp.in)
      if (*static_cast<const int*>(in) != *static_cast<const int*>(warp.in[0])) fail("a uniform value that is not");
  });
  return value;
}

// As `collective`, of the 128 threads of a warpgroup.
template <typename F>
void warpgroup_collective(const char* operation, int line, const void* in, F carry_out) {
  {
    Unwatched unwatched;
    Warpgroup& group = hopper().warpgroups[self->warp / 4];
    if (group.arrived == 0) {
      group.operation = operation;
      group.line = line;
    } else if (group.operation != operation || group.line != line) {
      fail("divergent warpgroup collective: threads meet in different instructions");
    }
    group.in[self->index % 128] = in;
    if (++group.arrived == 128) {
      carry_out(group);
      group.arrived = 0;
      for (unsigned i = 0; i < 128; ++i) block->threads[self->warp / 4 * 128 + i].state = State::kReady;
    } else {
      self->state = State::kWaiting;
    }
  }
  wait();
}

// All of a warpgroup at once.
inline void set_registers(int count, bool grow, int line) {
  warpgroup_collective("setmaxnreg", line, &count, [grow](Warpgroup& group) {
    int& has = hopper().registers[static_cast<size_t>(&group - hopper().warpgroups.data())];
    const int wanted = *static_cast<const int*>(group.in[0]);
    if (grow ? wanted < has : wanted > has) fail("setmaxnreg: not the way that it was said to go");
    has = wanted;
  });
}
template <int kRegisters>
void shrink_registers(int line = __builtin_LINE()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  set_registers(kRegisters, false, line);
}
template <int kRegisters>
void grow_registers(int line = __builtin_LINE()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  set_registers(kRegisters, true, line);
}

}  // namespace simt

#include "emulator/bulk90.h"
#include "emulator/product90.h"
