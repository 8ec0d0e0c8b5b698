// Warp collectives: shuffles, votes, ldmatrix and mma.m16n8k16, after the fragment layouts of the PTX manual.
// Products are summed in float32 in plain order; tensor cores sum in another one.
#pragma once

#include <cmath>

#include "emulator/memory.h"

namespace simt {

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

struct BFloat16 {
  static float load(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
  static uint16_t store(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  static float load(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
    return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  }
  static uint16_t store(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
    if (std::isnan(value)) return 0x7fff;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00u;
    if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
    uint32_t bits;
    memcpy(&bits, &size, sizeof(bits));
    bits += 0xfffu + ((bits >> 13) & 1u);
    return sign | static_cast<uint16_t>((bits >> 13) - (112 << 10));
  }
};

inline float shuffle_xor(float value, int mask, int line) {
  struct In {
    float value;
    int mask;
  } in{value, mask};
  float out;
  collective("shfl", line, &in, &out, [](Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      const int from = lane ^ static_cast<const In*>(warp.in[lane])->mask;
      *static_cast<float*>(warp.out[lane]) = static_cast<const In*>(warp.in[from])->value;
    }
  });
  return out;
}

inline bool vote_any(bool value, int line) {
  bool out;
  collective("vote", line, &value, &out, [](Warp& warp) {
    bool any = false;
    for (const void* in : warp.in) any |= *static_cast<const bool*>(in);
    for (void* out : warp.out) *static_cast<bool*>(out) = any;
  });
  return out;
}

inline void sync_warp(int line) {
  collective("syncwarp", line, nullptr, nullptr, [](Warp&) {}, true);
}

template <bool kTransposed>
void load_matrices(uint32_t (&fragment)[4], uint32_t address, int line) {
  struct In {
    uint32_t address;
    uint16_t row[8];
  } in;
  in.address = address;
  const uint16_t* from = reinterpret_cast<const uint16_t*>(shared_at(address, 16));
  for (int i = 0; i < 8; ++i) in.row[i] = from[i];  // by the lane that gives the address, as a race would see it
  collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", line, &in, fragment, [](Warp& warp) {
    ++counters.ldmatrix;
    count_conflicts(warp);
    const auto element = [&](int lane, int i) { return static_cast<const In*>(warp.in[lane])->row[i]; };
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, pair = 2 * (lane % 4), base = 8 * matrix;
        const uint32_t low = kTransposed ? element(base + pair, row) : element(base + row, pair);
        const uint32_t high = kTransposed ? element(base + pair + 1, row) : element(base + row, pair + 1);
        static_cast<uint32_t*>(warp.out[lane])[matrix] = low | high << 16;
      }
  });
}

template <typename Element, bool kAdd>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  struct In {
    uint32_t a[4], b[2];
  } in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  collective("mma", line, &in, sum, [](Warp& warp) {
    ++counters.mma;
    float left[16][16], right[8][16];
    const auto half = [](uint32_t word, int which) { return Element::load(static_cast<uint16_t>(word >> 16 * which)); };
    for (int lane = 0; lane < 32; ++lane) {
      const In& from = *static_cast<const In*>(warp.in[lane]);
      const int row = lane / 4, pair = 2 * (lane % 4);
      for (int which = 0; which < 2; ++which) {
        for (int i = 0; i < 4; ++i) left[row + 8 * (i & 1)][pair + which + 8 * (i >> 1)] = half(from.a[i], which);
        for (int i = 0; i < 2; ++i) right[row][pair + which + 8 * i] = half(from.b[i], which);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const float* row = left[lane / 4 + 8 * (i >> 1)];
        const float* column = right[2 * (lane % 4) + (i & 1)];
        float dot = 0.0f;
        for (int k = 0; k < 16; ++k) dot += row[k] * column[k];
        float& sum = static_cast<float*>(warp.out[lane])[i];
        sum = kAdd ? sum + dot : dot;
      }
  });
}

}  // namespace simt
