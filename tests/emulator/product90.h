// Products of whole warpgroups (wgmma), for g++.
//
// The hardware reads operands and changes sums at any time between a product's issue and the wait for it. Here operands
// are read at its issue, and must still be the same at the wait; sums hold a signalling NaN in between, which turns
// into another one where it is used in arithmetic, so that the wait notices whoever wrote them. Registers that products
// have had before are compared between a fence and an issue.
#pragma once

#include "emulator/simt90.h"

namespace simt {

constexpr uint32_t kInFlight = 0x7fa5a5a5;

inline bool Registers::are_as_seen() const {
  for (int thread = 0; thread < 128; ++thread)
    if (memcmp(seen.data() + thread * bytes, at[thread], bytes)) return false;
  return true;
}
inline void Registers::look() {
  seen.resize(128 * bytes);
  for (int thread = 0; thread < 128; ++thread) memcpy(seen.data() + thread * bytes, at[thread], bytes);
}

// Eight elements of an operand, from (mn, k) on: 16 of k, which is contiguous, or else mn is.
inline const unsigned char* eight_at(uint64_t descriptor, bool k_contiguous, int mn, int k) {
  const int kind = static_cast<int>(descriptor >> 62), row_bytes = kind == 1 ? 128 : 64;
  if (kind != 1 && kind != 2) fail("wgmma: a swizzle that is not emulated");
  const uint32_t base = (descriptor & 0x3fff) << 4, across = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t down = (descriptor >> 32 & 0x3fff) << 4;
  const int wide = row_bytes / 2;
  const uint32_t address = k_contiguous ? base + mn / 8 * down + mn % 8 * row_bytes + 2 * k
                                        : base + mn / wide * across + k / 8 * down + k % 8 * row_bytes + mn % wide * 2;
  return shared_at(swizzled(address, row_bytes), 16);
}

// Calls visit(mn, k, eight elements) for the rows or columns from `first` on.
template <typename Visit>
void visit_operand(uint64_t descriptor, bool k_contiguous, int first, int count, const Visit& visit) {
  const int mn_step = k_contiguous ? 1 : 8, k_step = k_contiguous ? 8 : 1;
  for (int mn = first; mn < first + count; mn += mn_step)
    for (int k = 0; k < 16; k += k_step) visit(mn, k, eight_at(descriptor, k_contiguous, mn, k));
}

// The operands in shared memory as they are: of the left one, unless it is in registers, then of the right one.
inline std::vector<uint16_t> read_operands(const ProductIn& in) {
  std::vector<uint16_t> taken;
  taken.reserve((64 + in.n) * 16);
  const auto take = [&](int, int, const unsigned char* eight) {
    hopper().check_fenced(smem_address(eight), 16);
    uint16_t elements[8];
    memcpy(elements, eight, sizeof(elements));
    taken.insert(taken.end(), elements, elements + 8);
  };
  if (!in.a) visit_operand(in.left, in.left_k, 0, 64, take);
  visit_operand(in.right, in.right_k, 0, in.n, take);
  return taken;
}

// What a warp's product reads of them: reads that the thread sanitizer sees, by the warp's first lane, as a warp issues
// and waits as one.
inline void watch_operands([[maybe_unused]] const ProductIn& in) {
#ifdef __SANITIZE_THREAD__
  if (self->lane != 0) return;
  const auto watch = [](int, int, const unsigned char* eight) {
    for (int i = 0; i < 2; ++i) (void)reinterpret_cast<const volatile uint64_t*>(eight)[i];
  };
  if (!in.a) visit_operand(in.left, in.left_k, static_cast<int>(self->warp % 4) * 16, 16, watch);
  visit_operand(in.right, in.right_k, 0, in.n, watch);
#endif
}

// Adds a product to its sum, by the operands that were read at its issue.
inline void carry_out(const Product& product, Sum& sum) {
  static float left[64][16], right[256][16];
  const ProductIn& in = product.in;
  size_t at = 0;
  const auto fill = [&](float(*to)[16], bool k_contiguous, int count) {
    const int mn_step = k_contiguous ? 1 : 8, k_step = k_contiguous ? 8 : 1;
    for (int mn = 0; mn < count; mn += mn_step)
      for (int k = 0; k < 16; k += k_step)
        for (int i = 0; i < 8; ++i, ++at)
          (k_contiguous ? to[mn][k + i] : to[mn + i][k]) = in.load(product.operands[at]);
  };
  if (!in.a) fill(left, in.left_k, 64);
  fill(right, in.right_k, in.n);
  for (int thread = 0; thread < 128 && in.a; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    uint32_t a[4];
    memcpy(a, product.a.seen.data() + thread * sizeof(a), sizeof(a));
    for (int i = 0; i < 8; ++i)
      left[row + 8 * (i / 2 % 2)][column + i % 2 + 8 * (i / 4)] =
          in.load(static_cast<uint16_t>(a[i / 2] >> 16 * (i % 2)));
  }
  const int width = in.n / 2;
  for (int thread = 0; thread < 128; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    float* values = sum.values.data() + thread * width;
    for (int i = 0; i < width; ++i) {
      const float *a = left[row + 8 * (i / 2 % 2)], *b = right[column + i % 2 + 8 * (i / 4)];
      float dot = 0.0f;
      for (int k = 0; k < 16; ++k) dot += a[k] * b[k];
      values[i] = (in.add ? values[i] : 0.0f) + dot;
    }
  }
  counters.mma += 4 * in.n / 8;
}

// Registers that a product is about to have must be as they were at the fence before it.
inline void check_registers(Warpgroup& group, const Registers& registers) {
  const auto [known, is_new] = group.known.try_emplace(registers.at[0], registers);
  if (!is_new && !known->second.seen.empty() && !known->second.are_as_seen())
    fail("wgmma: registers were written since the last wgmma.fence");
}

// Takes what registers hold, and leaves what no other arithmetic gives.
inline Sum start_sum(Registers&& registers) {
  Sum sum{std::move(registers), {}, 0};
  const size_t width = sum.registers.bytes / sizeof(float);
  sum.values.resize(128 * width);
  for (int thread = 0; thread < 128; ++thread) {
    memcpy(sum.values.data() + thread * width, sum.registers.at[thread], sum.registers.bytes);
    std::fill_n(static_cast<uint32_t*>(sum.registers.at[thread]), width, kInFlight);
  }
  sum.registers.look();
  return sum;
}

inline void issue_product(const ProductIn& in, int line) {
  watch_operands(in);
  warpgroup_collective("wgmma", line, &in, [](Warpgroup& group) {
    if (!group.fenced) fail("wgmma: registers may have been written since the last wgmma.fence");
    const ProductIn& first = *static_cast<const ProductIn*>(group.in[0]);
    Product product{first, {{}, first.a ? 4 * sizeof(uint32_t) : 0, {}}, read_operands(first)};
    Registers sums{{}, first.n / 2 * sizeof(float), {}};
    for (int i = 0; i < 128; ++i) {
      const ProductIn& each = *static_cast<const ProductIn*>(group.in[i]);
      if (each.left != first.left || each.right != first.right) fail("wgmma: descriptors differ in a warpgroup");
      product.a.at[i] = const_cast<uint32_t*>(each.a);
      sums.at[i] = each.sum;
    }
    if (first.a) {
      check_registers(group, product.a);
      product.a.look();
    }
    if (!group.sums.count(first.sum)) {
      check_registers(group, sums);
      group.sums[first.sum] = start_sum(std::move(sums));
    }
    ++group.sums[first.sum].products;
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
  warpgroup_collective("wgmma.fence", line, nullptr, [](Warpgroup& group) {
    group.fenced = true;
    for (auto& [first, registers] : group.known) registers.look();
  });
}
inline void wgmma_commit(int line = __builtin_LINE()) {
  warpgroup_collective("wgmma.commit", line, nullptr, [](Warpgroup& group) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

inline void end_product(Warpgroup& group, const Product& product) {
  if (read_operands(product.in) != product.operands) fail("wgmma: an operand in shared memory changed in flight");
  if (product.in.a && !product.a.are_as_seen()) fail("wgmma: an operand in registers changed in flight");
  Sum& sum = group.sums[product.in.sum];
  carry_out(product, sum);
  if (--sum.products) return;
  if (!sum.registers.are_as_seen()) fail("wgmma: sums were written in flight");
  const size_t width = sum.registers.bytes / sizeof(float);
  for (int thread = 0; thread < 128; ++thread)
    memcpy(sum.registers.at[thread], sum.values.data() + thread * width, sum.registers.bytes);
  group.sums.erase(product.in.sum);
}

inline void wait_for_products(size_t pending, int line) {
  const Warpgroup& mine = hopper().warpgroups[self->warp / 4];
  for (size_t i = 0; i + pending < mine.groups.size(); ++i)
    for (const Product& product : mine.groups[i]) watch_operands(product.in);
  warpgroup_collective("wgmma.wait", line, &pending, [](Warpgroup& group) {
    if (!group.open.empty()) fail("wgmma: a wait for products that were not committed");
    const size_t keep = *static_cast<const size_t*>(group.in[0]);
    while (group.groups.size() > keep) {
      for (const Product& product : group.groups.front()) end_product(group, product);
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
