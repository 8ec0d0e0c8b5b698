// Matrix products of bfloat16 operands by AMX tiles: 16 x 16 float32 sums, of 16 x 32 by 32 x 16 bfloat16.
//
// Four sums, two tiles of A and two of B fill the eight registers. Operands are packed as in pairs.h. Include inside
// the target region of one translation unit.
#pragma once

#include "pairs.h"

namespace longattn::cpu {
namespace {

struct Amx : Pairs<32, 32> {
  static constexpr int kDepthStep = 32;
  static constexpr int kKeyBlock = 128;
  static constexpr int kPiece = 512;
  static constexpr int kQueryPiece = 256;
  static constexpr bool kTransposedQueryGrads = true;  // left-hand tiles can't be read transposed

  // The tile registers' shapes, for as long as a thread works on tasks; before and behind, what they were.
  class Session {
   public:
    Session() {
      memory_barrier(before_);
      _tile_storeconfig(before_);
      memory_barrier(before_);
      Config config{};
      config.palette = 1;
      for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
      }
      memory_barrier(&config);
      _tile_loadconfig(&config);
    }
    ~Session() {
      memory_barrier(before_);
      if (before_[0] != 0)
        _tile_loadconfig(before_);
      else
        _tile_release();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    struct Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static_assert(sizeof(Config) == 64);
    alignas(64) uint8_t before_[64];
  };

  template <int64_t kRow, int64_t kDepth, bool kAdd>
  static void product(const BFloat16* a, const BFloat16* b, int64_t panel, int begin, int end, int64_t depth, float* c,
                      int64_t ldc) {
    static_assert(kDepth == kGroup);
    for (int col = begin; col < end; col += kPanel)
      tiles<kRow, kPanel, kAdd>(a, b + col / kPanel * panel, depth, c + (col - begin), ldc);
  }

  // The compiler does not know what memory the tile instructions read and write.
  static LONGATTN_FORCE_INLINE void memory_barrier(const void* also = nullptr) {
    asm volatile("" : : "r"(also) : "memory");
  }

  // 32 x 32 sums; rows of B are kCols pairs apart.
  template <int64_t kRow, int64_t kCols, bool kAdd>
  static void tiles(const BFloat16* a, const BFloat16* b, int64_t depth, float* c, int64_t ldc) {
    const int64_t pitch = ldc * static_cast<int64_t>(sizeof(float));
    memory_barrier();
    if constexpr (kAdd) {
      _tile_loadd(0, c, pitch);
      _tile_loadd(1, c + 16, pitch);
      _tile_loadd(2, c + 16 * ldc, pitch);
      _tile_loadd(3, c + 16 * ldc + 16, pitch);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, kRow * 2);
      _tile_loadd(6, b + k * kCols, kCols * 4);
      _tile_loadd(7, b + k * kCols + 32, kCols * 4);
      _tile_loadd(5, a + 16 * kRow + k, kRow * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, pitch);
    _tile_stored(1, c + 16, pitch);
    _tile_stored(2, c + 16 * ldc, pitch);
    _tile_stored(3, c + 16 * ldc + 16, pitch);
    memory_barrier();
  }

  // a[d * kLd + row] = x[row, d], rows up to `depth` and channels up to a multiple of 32 zero: keys as a left operand.
  template <int64_t kLd>
  static void pack_columns(const BFloat16* x, int64_t stride, int count, int depth, int dim, BFloat16* a) {
    for (int row = 0; row < depth; row += kLanes)
      for (int d = 0; d < depth_of(dim); d += kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          block[r] = row + r < count && d < dim ? load_part(x + (row + r) * stride + d, dim - d) : V::zero();
        V::transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) V::store(a + (d + r) * kLd + row, block[r]);
      }
  }
};

}  // namespace
}  // namespace longattn::cpu
