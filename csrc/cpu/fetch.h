// Asks for memory that is needed soon, a few rows at a time between other work: a processor drops, or waits for,
// requests beyond what it can have on their way.
#pragma once

#include <cstdint>

namespace longattn::cpu {
namespace {

class Fetch {
 public:
  // Rows of `bytes` bytes, `stride` bytes apart. They may lie behind the tensor, where asking does nothing.
  void add(const void* first, int64_t stride, int bytes, int rows) {
    if (rows <= 0) return;
    streams_[count_++] = {static_cast<const char*>(first), stride, bytes, rows};
    rows_ += rows;
  }
  int rows() const { return rows_; }

  // Asks for the next rows.
  void next(int rows) {
    constexpr int kLine = 64;  // bytes
    for (; rows > 0 && rows_ > 0; --rows, --rows_) {
      Stream& stream = streams_[at_];
      for (int byte = 0; byte < stream.bytes; byte += kLine) __builtin_prefetch(stream.row + byte, 0, 2);
      stream.row += stream.stride;
      if (--stream.rows == 0) ++at_;
    }
  }

 private:
  struct Stream {
    const char* row;
    int64_t stride;
    int bytes, rows;
  };
  static constexpr int kMost = 4;
  Stream streams_[kMost];
  int count_ = 0, at_ = 0, rows_ = 0;
};

}  // namespace
}  // namespace longattn::cpu
