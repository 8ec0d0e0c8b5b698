// The 16-bit element types of tensors, so that loads and stores are chosen by type.
#pragma once

#include <cstdint>

namespace longattn::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace longattn::cpu
