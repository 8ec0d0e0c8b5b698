// Scratch memory of a task: one block for all buffers of a struct. Nothing here throws.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace longattn::cpu {

constexpr int64_t kAlignment = 64;  // bytes: a cache line and an AVX-512 vector

template <typename E>
constexpr int64_t aligned_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(E)) + kAlignment - 1) / kAlignment * kAlignment;
}

// Buffers has pointers and lay_out(job, take), which calls take(pointer, count of elements) for each of them.
template <class Job, class Buffers>
class Scratch : public Buffers {
 public:
  explicit Scratch(const Job& job) {
    int64_t total = 0;
    this->lay_out(job, [&]<typename E>(E*&, int64_t count) { total += aligned_bytes<E>(count); });
    block_ = static_cast<char*>(std::aligned_alloc(kAlignment, total));
    if (!block_) return;
    char* next = block_;
    this->lay_out(job, [&]<typename E>(E*& at, int64_t count) {
      at = reinterpret_cast<E*>(next);
      next += aligned_bytes<E>(count);
    });
  }
  ~Scratch() { std::free(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return block_ != nullptr; }

 private:
  char* block_ = nullptr;
};

}  // namespace longattn::cpu
