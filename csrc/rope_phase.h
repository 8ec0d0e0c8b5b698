// Exact rotary phases: position times frequency as a fraction of a turn in 64-bit fixed point, where whole turns drop
// out of the integer product by themselves, and its cosine and sine in float32.
//
// The frequency is rounded to 2^-64 turns (the float64 of it divided by 2 pi in double-double), so that at position
// 10,000,000 the phase is right to 4e-12 radians, and no float64 arithmetic depends on the position. Every operation is
// an integer one or names its rounding: the emulator and a GPU give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "band.h"

namespace longattn::cuda {

// A frequency in radians a token, as 2^-64 turns a token.
LONGATTN_HD uint64_t turns_of(double inv_freq) {
  constexpr double kTurns = 0x1.45f306dc9c883p-3, kTurnsRest = -0x1.6b01ec5417056p-57;  // 1 / (2 pi) in two doubles
  const double high = inv_freq * kTurns;
  const double low = fma(inv_freq, kTurnsRest, fma(inv_freq, kTurns, -high));
  const double parts[2] = {high - rint(high), low - rint(low)};  // whole turns drop out; at most half a turn is left
  uint64_t turns = 0;
  for (const double part : parts) turns += static_cast<uint64_t>(static_cast<int64_t>(part * 0x1p63)) * 2;
  return turns;
}

struct CosSin {
  float cos, sin;
};

// Of a phase in 2^-64 turns, to 1e-7: Taylor's series of an eighth of a turn at most, turned by quarters.
LONGATTN_HD CosSin cos_sin_of(uint64_t phase) {
  const uint64_t quarter = (phase + (uint64_t{1} << 61)) >> 62;
  const float t = static_cast<float>(static_cast<int64_t>(phase - (quarter << 62))) * 0x1p-64f;  // -1/8 .. 1/8 turns
  const float square = t * t;
  float sine = fmaf(square, 42.058693944897654f, -76.70585975306136f);  // (2 pi)^n / n! in turn
  sine = fmaf(square, sine, 81.60524927607504f);
  sine = fmaf(square, sine, -41.341702240399755f);
  sine = fmaf(t, 6.2831855f, t * fmaf(square, sine, -1.7484556e-7f));  // 2 pi in two floats
  float cosine = fmaf(square, -26.426256783374398f, 60.24464137187666f);
  cosine = fmaf(square, cosine, -85.45681720669373f);
  cosine = fmaf(square, cosine, 64.93939402266829f);
  cosine = fmaf(square, cosine, -19.739208802178716f);
  cosine = fmaf(square, cosine, 1.0f);
  const bool swapped = quarter & 1;
  const float along = swapped ? sine : cosine, across = swapped ? cosine : sine;
  return {quarter == 1 || quarter == 2 ? -along : along, quarter >= 2 ? -across : across};
}

// cos and sin of position * inv_freq; NaN where the frequency is no finite number.
LONGATTN_HD CosSin cos_sin_at(int64_t position, double inv_freq) {
  if (!(fabs(inv_freq) <= 0x1.fffffffffffffp1023)) return {NAN, NAN};
  return cos_sin_of(static_cast<uint64_t>(position) * turns_of(inv_freq));
}

}  // namespace longattn::cuda
