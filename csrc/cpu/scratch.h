// Scratch memory of a task: one block, carved up in order. Nothing here throws.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace longattn::cpu {
namespace {

constexpr int64_t kAlignment = 64;  // bytes: a cache line and an AVX-512 vector

class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : block_(static_cast<char*>(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment))),
        next_(block_) {}
  ~Scratch() { std::free(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return block_ != nullptr; }

  template <typename T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }

  template <typename T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return at;
  }

 private:
  char* block_;
  char* next_;
};

}  // namespace
}  // namespace longattn::cpu
