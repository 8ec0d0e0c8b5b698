// Shared memory with its range, alignment and banks, asynchronous copies into it, and counted global accesses.
//
// cp.async poisons its destination when it is issued and fills it when the issuing thread waits: reading too early, or
// overwriting what others still read, gives NaNs and is a race for the thread sanitizer.
#pragma once

#include <algorithm>
#include <cstring>

#include "emulator/block.h"

namespace simt {

inline uint32_t smem_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - block->shared;
  if (offset < 0 || static_cast<size_t>(offset) > block->shared_bytes) fail("a pointer outside of shared memory");
  return static_cast<uint32_t>(offset);
}

inline unsigned char* shared_at(uint32_t address, unsigned bytes) {
  if (address % bytes) fail("misaligned shared memory address");
  if (static_cast<size_t>(address) + bytes > block->shared_bytes) fail("shared memory address out of range");
  return block->shared + address;
}

// Extra cycles of 8 lanes that access 16 bytes each: those whose bank group another lane of the eight uses too.
inline int conflicts_of_eight(const uint32_t* addresses) {
  int worst = 0;
  for (int bank = 0; bank < 8; ++bank) {
    int lines = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (addresses[lane] / 16 % 8 != static_cast<uint32_t>(bank)) continue;
      bool first = true;  // equal addresses are one access
      for (int other = 0; other < lane; ++other) first &= addresses[other] != addresses[lane];
      lines += first;
    }
    worst = std::max(worst, lines);
  }
  return worst - 1;
}

inline void count_conflicts(const Warp& warp) {
  for (int eight = 0; eight < 32; eight += 8) {
    uint32_t addresses[8];
    for (int lane = 0; lane < 8; ++lane) addresses[lane] = *static_cast<const uint32_t*>(warp.in[eight + lane]);
    counters.bank_conflicts += conflicts_of_eight(addresses);
  }
}

template <unsigned kBytes>
void cp_async(uint32_t destination, const void* source, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(source) % kBytes) fail("cp.async: misaligned global address");
  memset(shared_at(destination, kBytes), 0xff, kBytes);
  Unwatched unwatched;
  self->open.push_back({destination, valid ? source : nullptr, kBytes});
  if (valid) counters.bytes_read += kBytes;
}
inline void cp_async16(uint32_t destination, const void* source, bool valid) {
  cp_async<16>(destination, source, valid);
}
inline void cp_async8(uint32_t destination, const void* source, bool valid) { cp_async<8>(destination, source, valid); }

inline Chunk load_chunk(const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("misaligned global address");
  {
    Unwatched unwatched;
    counters.bytes_read += 16;
  }
  return *static_cast<const Chunk*>(source);
}
inline Chunk load_shared_chunk(const void* source) {
  const uint32_t address = smem_address(source);
  return *reinterpret_cast<const Chunk*>(shared_at(address, 16));
}
inline void store_chunk(void* destination, const Chunk& chunk) {
  if (reinterpret_cast<uintptr_t>(destination) % 16) fail("misaligned global address");
  *static_cast<Chunk*>(destination) = chunk;
  Unwatched unwatched;
  counters.bytes_written += 16;
}

inline void cp_async_commit() {
  Unwatched unwatched;
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

template <int kPending>
void cp_async_wait() {
  std::vector<Copy> due;
  {
    Unwatched unwatched;
    while (self->groups.size() > kPending) {
      due.insert(due.end(), self->groups.front().begin(), self->groups.front().end());
      self->groups.erase(self->groups.begin());
    }
  }
  for (const Copy& copy : due) {
    uint32_t* to = reinterpret_cast<uint32_t*>(shared_at(copy.destination, copy.bytes));
    const uint32_t* from = static_cast<const uint32_t*>(copy.source);
    for (unsigned i = 0; i < copy.bytes / 4; ++i) to[i] = from ? from[i] : 0u;
  }
  Unwatched unwatched;
  std::vector<Copy>().swap(due);
}

}  // namespace simt
