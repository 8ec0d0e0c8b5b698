// What csrc/simt90.h gives a kernel on Hopper, for g++: mbarriers, the copy engine, and products of warpgroups.
//
// A copy is carried out at a random time after its issue: its destination holds NaNs until then, and it is an agent of
// its own for the thread sanitizer, ordered by its issue and its mbarrier alone. A product is carried out when its
// warpgroup waits for it: operands are read then, and sums hold NaNs in between. Copies in one piece, and what else
// blocks that add to one sum need, are in bulk90.h.
#pragma once

#include <map>

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
  if (reinterpret_cast<uintptr_t>(data) % 16 || static_cast<int>(2 * box[0]) > row_bytes) return false;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256) return false;
    if (i > 0 && (strides[i - 1] == 0 || strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40)) return false;
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (i > 0) map.strides[i] = strides[i - 1];
  }
  return true;
}

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // that copies have yet to bring
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
  char edge = 0;
};

struct BoxCopy {
  bool load;
  uint32_t shared, barrier;
  TensorMap map;
  int at[4];
  Thread* thread;  // of a store
  void* fiber;
  char* edge;
};

struct Product {
  std::vector<float> before;  // the sums as they were, of 128 threads; empty where they are another product's
  float* sum[128];
  const uint32_t* a[128];  // registers; else a descriptor
  uint64_t left, right;
  bool left_k, right_k;  // whether k is contiguous
  bool add;
  int n;
  float (*load)(uint16_t);
};

struct Warpgroup {
  unsigned arrived = 0;
  const char* operation = nullptr;
  int line = 0;
  const void* in[128];
  bool fenced = false;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};

struct Stores {  // of one thread
  int on_their_way = 0;
  bool waited_for = false;
  char edge = 0;
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

struct BulkGroups {  // of one thread
  uint64_t committed = 0;
  std::map<uint64_t, int> unfinished;  // copies of a group
  bool waits = false;
  uint64_t until = 0;  // that no group before this one is unfinished
  char edge = 0;
  bool waited_unfenced = false, acquired_unfenced = false;  // what only a fence lets the other kind of access see
};

struct NamedBarrier {
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
  std::map<Thread*, Stores> stores;
  std::vector<char> proxy_fenced;
  bool uncommitted = false;
  std::vector<BulkCopy> bulk;
  std::map<Thread*, BulkGroups> groups;
  std::vector<int> unfenced;  // of each 16 bytes of shared memory: the thread that wrote them since its last fence, + 1
  std::vector<std::vector<uint32_t>> written;  // by each thread, of those

  void start_block() override {
    unfenced.assign(block->shared_bytes / 16 + 1, 0);
    written.assign(block->threads.size(), {});
    groups.clear();
    barriers.clear();
    named.clear();
    stores.clear();
    warpgroups.assign(block->warps.size() / 4, Warpgroup());
    proxy_fenced.assign(block->threads.size(), 0);
  }
  void end_block() override {
    if (!copies.empty() || !bulk.empty()) fail("a block exits with copies in flight");
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
    BoxCopy copy = copies[which];
    copies.erase(copies.begin() + static_cast<ptrdiff_t>(which));
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(copy.fiber, 1);
    acquire(copy.edge);
#endif
    move(copy);
    release(copy.load ? &barriers[copy.barrier].edge : &stores[copy.thread].edge);
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(block->scheduler.tsan, 1);
    __tsan_destroy_fiber(copy.fiber);
#endif
    delete copy.edge;
    if (copy.load) {
      Barrier& barrier = barriers[copy.barrier];
      barrier.bytes -= 2 * copy.map.box[0] * copy.map.box[1] * copy.map.box[2] * copy.map.box[3];
      turn(barrier);
    } else if (--stores[copy.thread].on_their_way == 0 && stores[copy.thread].waited_for) {
      stores[copy.thread].waited_for = false;
      copy.thread->state = State::kReady;
    }
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
  void check_fenced(uint32_t address) const {
    if (unfenced[address / 16]) fail("copy or product: reads what no fence has made visible to it");
  }

 private:
  void move_bulk(size_t which);
  void move(const BoxCopy& copy) {
    const TensorMap& map = copy.map;
    uint32_t row = 0;
    int64_t moved = 0;
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
          for (uint32_t channel = 0; channel < map.box[0]; ++channel) {
            const int64_t at = copy.at[0] + int64_t{channel};
            const bool exists = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[0]);
            const uint32_t shared = copy.shared + row * static_cast<uint32_t>(map.row_bytes) + 2 * channel;
            uint16_t* local = reinterpret_cast<uint16_t*>(shared_at(swizzled(shared, map.row_bytes), 2));
            uint16_t* global = exists ? reinterpret_cast<uint16_t*>(map.data + offset + 2 * at) : nullptr;
            if (copy.load)
              *local = exists ? *global : 0;
            else if (exists)
              *global = *local;
            moved += exists ? 2 : 0;
          }
        }
    Unwatched unwatched;
    (copy.load ? counters.bytes_read : counters.bytes_written) += moved;
  }
};

inline Hopper& hopper() { return static_cast<Hopper&>(*block->engine); }
inline const bool hopper_is_the_engine =
    (make_engine = []() -> std::unique_ptr<Engine> { return std::make_unique<Hopper>(); }, true);

inline Barrier& barrier_at(uint32_t address) {
  if (address % 8) fail("mbarrier: misaligned");
  const auto found = hopper().barriers.find(address);
  if (found == hopper().barriers.end()) fail("mbarrier: used before it is initialised");
  return found->second;
}

inline void mbarrier_init(uint32_t address, int arrivals) {
  Unwatched unwatched;
  shared_at(address, 8);
  Barrier& barrier = hopper().barriers[address];
  barrier.count = barrier.pending = arrivals;
}
inline void mbarrier_fence_init() {}

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

inline void issue_copy(bool load, uint32_t shared, const TensorMap& map, uint32_t barrier, const int (&at)[4]) {
  if (shared % 1024) fail("copy: shared memory must be 1024-byte aligned");
  BoxCopy copy{load, shared, barrier, map, {at[0], at[1], at[2], at[3]}, self, nullptr, nullptr};
  const uint32_t rows = map.box[1] * map.box[2] * map.box[3];
  if (load)
    for (uint32_t i = 0; i < rows * static_cast<uint32_t>(map.row_bytes) / 2; ++i)
      *reinterpret_cast<uint16_t*>(shared_at(shared + 2 * i, 2)) = 0xffff;
  {
    Unwatched unwatched;
    copy.edge = new char;
#ifdef __SANITIZE_THREAD__
    copy.fiber = __tsan_create_fiber(0);
#endif
  }
  release(copy.edge);
  Unwatched unwatched;
  hopper().copies.push_back(copy);
}
inline void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&at)[4]) {
  issue_copy(true, to, map, barrier, at);
}
inline void store_box(uint32_t from, const TensorMap& map, const int (&at)[4]) {
  {
    Unwatched unwatched;
    for (unsigned i = 0; i < 128; ++i)
      if (!hopper().proxy_fenced[self->warp / 4 * 128 + i])
        fail("copy: a store of what no fence has made visible to it");
    ++hopper().stores[self].on_their_way;
    hopper().uncommitted = true;
  }
  issue_copy(false, from, map, 0, at);
}
inline void store_commit() {
  Unwatched unwatched;
  for (unsigned i = 0; i < 128; ++i) hopper().proxy_fenced[self->warp / 4 * 128 + i] = 0;
  hopper().uncommitted = false;
}
inline void store_wait_read() {
  Stores* stores;
  {
    Unwatched unwatched;
    if (hopper().uncommitted) fail("copy: a wait for stores that were not committed");
    stores = &hopper().stores[self];
    stores->waited_for = stores->on_their_way > 0;
    if (stores->waited_for) self->state = State::kWaiting;
  }
  wait();
  acquire(&stores->edge);
}
inline void fence_async_proxy() {
  Unwatched unwatched;
  hopper().proxy_fenced[self->index] = 1;
  for (const uint32_t at : hopper().written[self->index])
    if (hopper().unfenced[at] == static_cast<int>(self->index) + 1) hopper().unfenced[at] = 0;
  hopper().written[self->index].clear();
}

template <int kWarpgroups>
void sync_warpgroups(int id) {
  NamedBarrier* barrier;
  {
    Unwatched unwatched;
    barrier = &hopper().named[id];
  }
  release(&barrier->edge);
  {
    Unwatched unwatched;
    barrier->waiting.push_back(self);
    self->state = State::kWaiting;
    if (barrier->waiting.size() == 128 * kWarpgroups) {
      for (Thread* thread : barrier->waiting) thread->state = State::kReady;
      barrier->waiting.clear();
    }
  }
  wait();
  acquire(&barrier->edge);
}

template <int kRegisters>
void shrink_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24);
}
template <int kRegisters>
void grow_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters <= 256);
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

// Where element (mn, k) of an operand lies: 16 of k, which is contiguous, or else mn is.
inline const uint16_t* element_at(uint64_t descriptor, bool k_contiguous, int mn, int k) {
  const int kind = static_cast<int>(descriptor >> 62), row_bytes = kind == 1 ? 128 : 64;
  if (kind != 1 && kind != 2) fail("wgmma: a swizzle that is not emulated");
  const uint32_t base = (descriptor & 0x3fff) << 4, across = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t down = (descriptor >> 32 & 0x3fff) << 4;
  const int wide = row_bytes / 2;
  const uint32_t address = k_contiguous ? base + mn / 8 * down + mn % 8 * row_bytes + 2 * k
                                        : base + mn / wide * across + k / 8 * down + k % 8 * row_bytes + mn % wide * 2;
  return reinterpret_cast<const uint16_t*>(shared_at(swizzled(address, row_bytes), 2));
}

inline void carry_out(Product& product) {
  static float left[64][16], right[256][16];
  const bool registers = product.a[0] != nullptr;
  const auto element = [&](uint64_t descriptor, bool k_contiguous, int mn, int k) {
    const uint16_t* at = element_at(descriptor, k_contiguous, mn, k);
    hopper().check_fenced(smem_address(at));
    return product.load(*at);
  };
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < product.n; ++n) right[n][k] = element(product.right, product.right_k, n, k);
    for (int m = 0; m < 64 && !registers; ++m) left[m][k] = element(product.left, product.left_k, m, k);
  }
  for (int thread = 0; thread < 128; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    for (int i = 0; i < 8 && registers; ++i)
      left[row + 8 * (i / 2 % 2)][column + i % 2 + 8 * (i / 4)] =
          product.load(static_cast<uint16_t>(product.a[thread][i / 2] >> 16 * (i % 2)));
  }
  const int width = product.n / 2;
  for (int thread = 0; thread < 128; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    float* sum = product.sum[thread];
    const float* before = product.before.empty() ? sum : product.before.data() + thread * width;
    for (int i = 0; i < width; ++i) {
      const float *a = left[row + 8 * (i / 2 % 2)], *b = right[column + i % 2 + 8 * (i / 4)];
      float dot = 0.0f;
      for (int k = 0; k < 16; ++k) dot += a[k] * b[k];
      sum[i] = (product.add ? before[i] : 0.0f) + dot;
    }
  }
  counters.mma += 4 * product.n / 8;
}

struct ProductIn {
  float* sum;
  const uint32_t* a;
  uint64_t left, right;
  bool left_k, right_k;
  bool add;
  int n;
  float (*load)(uint16_t);
};

inline void issue_product(const ProductIn& in, int line) {
  warpgroup_collective("wgmma", line, &in, [](Warpgroup& group) {
    if (!group.fenced) fail("wgmma: registers may have been written since the last wgmma.fence");
    const ProductIn& first = *static_cast<const ProductIn*>(group.in[0]);
    Product product{{}, {}, {}, first.left, first.right, first.left_k, first.right_k, first.add, first.n, first.load};
    bool pending = false;
    for (const std::vector<Product>* list : {&group.open})
      for (const Product& other : *list) pending |= other.sum[0] == first.sum;
    for (const std::vector<Product>& list : group.groups)
      for (const Product& other : list) pending |= other.sum[0] == first.sum;
    for (int i = 0; i < 128; ++i) {
      const ProductIn& each = *static_cast<const ProductIn*>(group.in[i]);
      if (each.left != first.left || each.right != first.right) fail("wgmma: descriptors differ in a warpgroup");
      product.sum[i] = each.sum;
      product.a[i] = each.a;
      if (pending) continue;
      product.before.insert(product.before.end(), each.sum, each.sum + each.n / 2);
      std::fill_n(each.sum, each.n / 2, std::nanf(""));
    }
    group.open.push_back(std::move(product));
  });
}

template <typename Type, bool kAdd, int kSums>
void wgmma_ss(float (&sum)[kSums], uint64_t a, uint64_t b, int line = __builtin_LINE()) {
  issue_product({sum, nullptr, a, b, true, true, kAdd, 2 * kSums, Type::Emulated::load}, line);
}
template <typename Type>
void wgmma_ss_across(float (&sum)[32], uint64_t a, uint64_t b, int line = __builtin_LINE()) {
  issue_product({sum, nullptr, a, b, false, false, true, 64, Type::Emulated::load}, line);
}
template <typename Type, int kSums>
void wgmma_rs(float (&sum)[kSums], const uint32_t (&a)[4], uint64_t b, int line = __builtin_LINE()) {
  issue_product({sum, a, 0, b, true, false, true, 2 * kSums, Type::Emulated::load}, line);
}
inline void wgmma_fence(int line = __builtin_LINE()) {
  warpgroup_collective("wgmma.fence", line, nullptr, [](Warpgroup& group) { group.fenced = true; });
}
inline void wgmma_commit(int line = __builtin_LINE()) {
  warpgroup_collective("wgmma.commit", line, nullptr, [](Warpgroup& group) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

// What a warp reads of the operands of products that end: reads that the thread sanitizer sees, by the warp's first
// lane, as a warp waits as one.
inline void read_operands([[maybe_unused]] const Product& product) {
#ifdef __SANITIZE_THREAD__
  if (self->lane != 0) return;
  const bool registers = product.a[0] != nullptr;
  const int first_row = static_cast<int>(self->warp % 4) * 16;
  for (int i = 0; i < product.n * 16; ++i)
    (void)*const_cast<const volatile uint16_t*>(element_at(product.right, product.right_k, i / 16, i % 16));
  for (int i = 0; i < 16 * 16 && !registers; ++i)
    (void)*const_cast<const volatile uint16_t*>(element_at(product.left, product.left_k, first_row + i / 16, i % 16));
#endif
}

inline void wait_for_products(size_t pending, int line) {
  const Warpgroup& mine = hopper().warpgroups[self->warp / 4];
  for (size_t i = 0; i + pending < mine.groups.size(); ++i)
    for (const Product& product : mine.groups[i]) read_operands(product);
  warpgroup_collective("wgmma.wait", line, &pending, [](Warpgroup& group) {
    if (!group.open.empty()) fail("wgmma: a wait for products that were not committed");
    const size_t keep = *static_cast<const size_t*>(group.in[0]);
    while (group.groups.size() > keep) {
      for (Product& product : group.groups.front()) carry_out(product);
      group.groups.erase(group.groups.begin());
    }
    group.fenced = false;
  });
}
template <int kPending, int kSize>
void wgmma_wait(float (&)[kSize], int line = __builtin_LINE()) {
  wait_for_products(kPending, line);
}
template <int kPending, int kSize>
void wgmma_wait(float (&)[kSize], float (&)[kSize], int line = __builtin_LINE()) {
  wait_for_products(kPending, line);
}

}  // namespace simt

#include "emulator/bulk90.h"
