// Rotation of pairs one after another: on processors without kernels of their own, and of what no vector holds.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"

namespace longattn::cpu {
namespace {

inline float load(float x) { return x; }
inline void store(float* out, float x) { *out = x; }

inline float load(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Round to nearest, ties to even; a NaN stays one.
inline void store(BFloat16* out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// `count` pairs (a[i], b[i]), kStep elements apart; results may lie where the pairs do.
template <int kStep, typename T>
inline void rotate_pairs(const T* a, const T* b, T* out_a, T* out_b, const float* cos, const float* sin, int64_t count,
                         float sign) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = load(a[kStep * i]), y = load(b[kStep * i]);
    const float c = cos[i], s = sign * sin[i];
    store(out_a + kStep * i, x * c - y * s);
    store(out_b + kStep * i, y * c + x * s);
  }
}

}  // namespace
}  // namespace longattn::cpu
