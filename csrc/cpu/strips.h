// How the backward is cut into strips of queries, and which keys more than one strip sees.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "tasks.h"

namespace longattn::cpu {

// The two disjoint intervals of keys that a query sees, and so a strip.
constexpr Range VisibleKeys::*kFamilies[2] = {&VisibleKeys::sinks, &VisibleKeys::band};

class Strips {
 public:
  int rows = 0, count = 0;        // queries of a strip, strips of a row of the batch
  int64_t most_keys[2] = {0, 0};  // of a strip, of each family
  int64_t shared_rows = 0;        // of all strips: keys whose gradients are summed from shares

  // Shares take at most kShareBytes of the gradients' bytes.
  static constexpr double kShareBytes = 0.7;
  static constexpr int64_t kEnough = 64;                // tasks
  static constexpr int64_t kLeast = 256, kMost = 4096;  // queries

  Strips(const AttentionParams& params, int64_t element_size) : p_(params), keys_(params.rows.num_keys) {
    const int64_t sets = int64_t{p_.batch} * p_.kv_heads, queries = p_.rows.num_queries;
    const int64_t gradients =
        int64_t{p_.batch} * p_.head_dim * element_size * (p_.heads * queries + 2 * p_.kv_heads * int64_t{keys_});
    const int64_t share = 2 * round_up(p_.head_dim, 32) * int64_t{sizeof(float)};
    int64_t wanted = round_up(larger(kLeast, smaller(kMost, divide_up(queries * sets, kEnough))), 32);
    for (;; wanted *= 2) {
      rows = static_cast<int>(larger<int64_t>(1, smaller(wanted, queries)));
      count = static_cast<int>(divide_up(queries, rows));
      cut();
      if (count <= 1 || static_cast<double>(shared_rows * share) <= kShareBytes * static_cast<double>(gradients))
        return;
    }
  }

  // The keys of a family that a strip sees.
  const Range& keys(int set, int strip, int family) const { return keys_of_[index(set, strip, family)]; }
  // Strips, counted once a family, that see a key: 0, 1, or 2 for more.
  int cover(int set, int key) const { return cover_[int64_t{set} * keys_ + key]; }
  // Where the share of a key that several see lies among all shares.
  int64_t share_row(int set, int strip, int family, int key) const {
    const int64_t at = int64_t{set} * (keys_ + 1);
    return first_[index(set, strip, family)] + before_[at + key] - before_[at + keys(set, strip, family).begin];
  }

 private:
  int64_t index(int set, int strip, int family) const { return (int64_t{set} * count + strip) * 2 + family; }

  void cut() {
    const int sets = p_.batch * p_.kv_heads, group = p_.heads / p_.kv_heads;
    keys_of_.assign(int64_t{sets} * count * 2, {keys_, 0});
    first_.assign(keys_of_.size(), 0);
    cover_.assign(int64_t{sets} * keys_, 0);
    before_.assign(int64_t{sets} * (keys_ + 1), 0);
    shared_rows = 0;
    most_keys[0] = most_keys[1] = 0;
    for (int set = 0; set < sets; ++set) {
      for (int h = 0; h < group; ++h) {
        const RowBand band(p_.bands[set % p_.kv_heads * group + h], p_.rows, set / p_.kv_heads);
        for (int strip = 0; strip < count; ++strip) {
          const VisibleKeys first = band.keys(strip * rows);
          const VisibleKeys last = band.keys(smaller((strip + 1) * rows, p_.rows.num_queries) - 1);
          for (int family = 0; family < 2; ++family) {
            Range& range = keys_of_[index(set, strip, family)];
            range.begin = smaller(range.begin, (first.*kFamilies[family]).begin);
            range.end = larger(range.end, (last.*kFamilies[family]).end);
          }
        }
      }
      count_covers(set);
    }
  }

  void count_covers(int set) {
    uint8_t* cover = cover_.data() + int64_t{set} * keys_;
    int32_t* before = before_.data() + int64_t{set} * (keys_ + 1);
    for (int64_t i = index(set, 0, 0); i < index(set, count, 0); ++i)
      for (int j = keys_of_[i].begin; j < keys_of_[i].end; ++j) cover[j] = smaller(2, cover[j] + 1);
    for (int j = 0; j < keys_; ++j) before[j + 1] = before[j] + (cover[j] == 2);
    for (int64_t i = index(set, 0, 0); i < index(set, count, 0); ++i) {
      Range& range = keys_of_[i];
      if (range.empty()) range = {0, 0};
      first_[i] = shared_rows;
      shared_rows += before[range.end] - before[range.begin];
      most_keys[i % 2] = larger<int64_t>(most_keys[i % 2], range.end - range.begin);
    }
  }

  const AttentionParams& p_;
  int keys_;
  std::vector<Range> keys_of_;   // [sets, count, 2]
  std::vector<int64_t> first_;   // [sets, count, 2]: row of the first share
  std::vector<uint8_t> cover_;   // [sets, keys]
  std::vector<int32_t> before_;  // [sets, keys + 1]: keys before it that several strips see
};

}  // namespace longattn::cpu
