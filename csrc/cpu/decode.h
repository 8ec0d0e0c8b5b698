// Banded attention, forward, for the few queries of a decoding step: it costs what reading keys and values costs.
//
// Nothing is packed. A task is a chunk of the keys of one KV head with all queries of the heads that share it: dot
// products row by row, an online softmax, sums of values. The chunks' partial results are merged in their order
// afterwards, so that a single sequence occupies every thread, with the same bits for any number of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>

#include "isa.h"
#include "rows.h"
#include "scratch.h"
#include "softmax.h"
#include "tasks.h"

namespace longattn::cpu {
namespace {

template <class M, typename T>
struct Decode {
  using V = typename M::V;
  using Vec = typename V::Vec;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kMostRows = 16;  // queries times the heads that share a KV head
  static constexpr int kChunk = 1024;   // keys of a task
  static constexpr int kAhead = 16;     // keys that are fetched before they are needed
  static constexpr int kPiece = 512;    // keys whose logits are formed before their values are read
  static constexpr int kBlock = 32;     // keys whose values the first-level cache holds for all rows

  const AttentionParams& p;
  LogitScale scale;
  int rows, chunks, cols;
  RowState* states;  // [sets, chunks, rows]
  float* sums;       // [sets, chunks, rows, cols]

  explicit Decode(const AttentionParams& params)
      : p(params),
        scale(params.scale, params.softcap),
        rows(params.heads / params.kv_heads * params.rows.num_queries),
        chunks(static_cast<int>(larger<int64_t>(1, divide_up(params.rows.num_keys, kChunk)))),
        cols(static_cast<int>(round_up(params.head_dim, kLanes))),
        states(nullptr),
        sums(nullptr) {}

  static bool serves(const AttentionParams& p) {
    return int64_t{p.heads / p.kv_heads} * p.rows.num_queries <= kMostRows;
  }
  int64_t sets() const { return int64_t{p.batch} * p.kv_heads; }
  int64_t tasks() const { return sets() * chunks; }

  struct Buffers {
    float *query, *logits;  // [rows, cols]; [rows, kPiece]
    VisibleKeys* visible;   // [rows]
    template <class Take>
    void lay_out(const Decode& d, Take take) {
      take(query, int64_t{d.rows} * d.cols);
      take(logits, int64_t{d.rows} * kPiece);
      take(visible, d.rows);
    }
  };
  using Memory = Scratch<Decode, Buffers>;
  struct Session {};

  int head_of(int kv_head, int row) const { return kv_head * (p.heads / p.kv_heads) + row / p.rows.num_queries; }

  void task(int64_t index, Memory& m) const {
    const int batch = static_cast<int>(index / chunks / p.kv_heads);
    const int kv_head = static_cast<int>(index / chunks % p.kv_heads);
    const int first = static_cast<int>(index % chunks) * kChunk;
    RowState* state = states + index * rows;
    float* sum = sums + index * rows * cols;
    for (int64_t i = 0; i < int64_t{rows} * cols; ++i) sum[i] = 0.0f;
    load_queries(batch, kv_head, m);
    for (int r = 0; r < rows; ++r) {
      state[r] = RowState();
      const int head = head_of(kv_head, r);
      m.visible[r] = RowBand(p.bands[head], p.rows, batch).keys(r % p.rows.num_queries);
    }
    for (Range VisibleKeys::*which : {&VisibleKeys::sinks, &VisibleKeys::band}) {
      Range hull{first + kChunk, first};
      for (int r = 0; r < rows; ++r) {
        const Range& seen = m.visible[r].*which;
        if (seen.empty()) continue;
        hull = {smaller(hull.begin, seen.begin), larger(hull.end, seen.end)};
      }
      hull = {larger(hull.begin, first), smaller(hull.end, first + kChunk)};
      for (int key = hull.begin; key < hull.end; key += kPiece)
        visit(batch, kv_head, which, {key, smaller(key + kPiece, hull.end)}, state, sum, m);
    }
  }

  void load_queries(int batch, int kv_head, Memory& m) const {
    const Vec sign = V::set1(LogitScale::query_factor(p.scale));
    for (int r = 0; r < rows; ++r) {
      const T* query = row_of<T>(p.query, batch, head_of(kv_head, r), r % p.rows.num_queries);
      for (int d = 0; d < cols; d += kLanes)
        V::store(m.query + r * cols + d, V::mul(sign, M::load_part(query + d, p.head_dim - d)));
    }
  }

  void visit(int batch, int kv_head, Range VisibleKeys::*which, Range keys, RowState* state, float* sum,
             Memory& m) const {
    const int count = keys.end - keys.begin;
    const T *key = row_of<T>(p.key, batch, kv_head, keys.begin),
            *value = row_of<T>(p.value, batch, kv_head, keys.begin);
    for (int j = 0; j < count; j += kLanes) {
      fetch(key + (j + kAhead) * p.key.token, p.key.token);
      for_rows([&]<int kTogether>(int r) {
        for (int k = j; k < smaller(count, j + kLanes); k += kLanes / kTogether)
          dot_rows<kTogether>(key + k * p.key.token, smaller(kLanes / kTogether, count - k), m.query + r * cols,
                              m.logits + r * kPiece + k);
      });
    }
    fetch(value, p.value.token);
    Range seen[kMostRows];
    for (int r = 0; r < rows; ++r) {
      const Range& all = m.visible[r].*which;
      seen[r] = {larger(0, all.begin - keys.begin), smaller(count, all.end - keys.begin)};
    }
    float shrink[kMostRows];
    const int padded = static_cast<int>(round_up(count, kLanes));
    SoftmaxRows<V, float>{m.logits, m.logits, kPiece, rows, padded, seen, scale}(state, shrink);
    for (int r = 0; r < rows; ++r) {
      if (shrink[r] == 1.0f) continue;
      for (int d = 0; d < cols; d += kLanes)
        V::store(sum + r * cols + d, V::mul(V::set1(shrink[r]), V::load(sum + r * cols + d)));
    }
    for (int j = 0; j < count; j += kBlock)
      for_rows([&]<int kTogether>(int r) {
        add_rows<kTogether>(value + j * p.value.token, smaller(kBlock, count - j), sum + r * cols,
                            m.logits + r * kPiece + j);
      });
  }

  // Calls part.operator()<n>(r) for rows r .. r + n, all rows in parts of a few.
  template <class Part>
  void for_rows(Part part) const {
    int r = 0;
    for (; r + 4 <= rows; r += 4) part.template operator()<4>(r);
    for (; r + 2 <= rows; r += 2) part.template operator()<2>(r);
    if (r < rows) part.template operator()<1>(r);
  }

  // Asks for rows that are read soon; they may lie behind the tensor, where nothing happens.
  void fetch(const T* row, int64_t stride) const {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    for (int j = 0; j < kLanes; ++j)
      for (int d = 0; d < p.head_dim; d += kLine) __builtin_prefetch(row + j * stride + d);
  }

  // Dot products of kTogether queries with as many keys as make a vector of them; absent keys give 0.
  template <int kTogether>
  void dot_rows(const T* key, int count, const float* query, float* logits) const {
    constexpr int kKeys = kLanes / kTogether, kVecs = 8;
    Vec sum[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = V::zero();
    int d = 0;
    for (; d + kVecs * kLanes <= p.head_dim; d += kVecs * kLanes)
      add_products<kTogether, kVecs>(key + d, kLanes, count, query + d, sum);
    for (; d < cols; d += kLanes) add_products<kTogether, 1>(key + d, p.head_dim - d, count, query + d, sum);
    float all[kLanes];
    V::store(all, V::sums(sum));
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) __builtin_memcpy(logits + i * kPiece, all + i * kKeys, kKeys * sizeof(float));
  }

  // sum[r, j] += query[r, d] key[j, d] for kTogether rows and kVecs vectors of channels, `channels` in the last. Loops
  // that the processor can't foresee the end of would keep it from reading ahead.
  template <int kTogether, int kVecs>
  LONGATTN_FORCE_INLINE void add_products(const T* key, int channels, int count, const float* query,
                                          Vec (&sum)[kLanes]) const {
    constexpr int kKeys = kLanes / kTogether;
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      if (j >= count) break;
      const T* row = key + j * p.key.token;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const Vec x = v + 1 < kVecs ? V::load(row + v * kLanes) : M::load_part(row + v * kLanes, channels);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i)
          sum[i * kKeys + j] = V::fma(V::load(query + i * cols + v * kLanes), x, sum[i * kKeys + j]);
      }
    }
  }

  // sum[r, d] += weights[r, j] value[j, d] for kTogether rows.
  template <int kTogether>
  void add_rows(const T* value, int count, float* sum, const float* weights) const {
    constexpr int kVecs = kTogether == 4 ? 4 : 8;
    int d = 0;
    for (; d + kVecs * kLanes <= p.head_dim; d += kVecs * kLanes)
      add_values<kTogether, kVecs>(value + d, kLanes, count, sum + d, weights);
    for (; d < cols; d += kLanes) add_values<kTogether, 1>(value + d, p.head_dim - d, count, sum + d, weights);
  }

  // `channels`: of the last vector.
  template <int kTogether, int kVecs>
  void add_values(const T* value, int channels, int count, float* sum, const float* weights) const {
    Vec total[kTogether][kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) total[i][v] = V::load(sum + i * cols + v * kLanes);
    for (int j = 0; j < count; ++j) {
      const T* row = value + j * p.value.token;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const Vec x = v + 1 < kVecs ? V::load(row + v * kLanes) : M::load_part(row + v * kLanes, channels);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) total[i][v] = V::fma(V::set1(weights[i * kPiece + j]), x, total[i][v]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) V::store(sum + i * cols + v * kLanes, total[i][v]);
  }
};

// Merges the chunks of a KV head's rows, in their order. A task is one KV head.
template <class M, typename T>
struct MergeChunks {
  using V = typename M::V;
  const Decode<M, T>& d;

  struct Buffers {
    float* sum;
    template <class Take>
    void lay_out(const MergeChunks& job, Take take) {
      take(sum, job.d.cols);
    }
  };
  using Memory = Scratch<MergeChunks, Buffers>;
  struct Session {};

  void task(int64_t set, Memory& m) const {
    for (int r = 0; r < d.rows; ++r) {
      RowState total;
      for (int c = 0; c < d.chunks; ++c) total.largest = larger(total.largest, part(set, c, r).largest);
      for (int i = 0; i < d.cols; ++i) m.sum[i] = 0.0f;
      for (int c = 0; c < d.chunks; ++c) {
        const RowState& state = part(set, c, r);
        if (state.largest == -INFINITY) continue;
        const float share = std::exp2(state.largest - total.largest);
        total.sum += state.sum * share;
        const float* x = d.sums + ((set * d.chunks + c) * d.rows + r) * d.cols;
        for (int i = 0; i < d.cols; i += V::kLanes)
          V::store(m.sum + i, V::fma(V::set1(share), V::load(x + i), V::load(m.sum + i)));
      }
      const int head = d.head_of(static_cast<int>(set % d.p.kv_heads), r);
      store_result<V, T>(d.p, static_cast<int>(set / d.p.kv_heads), head, r % d.p.rows.num_queries, total, m.sum);
    }
  }

  const RowState& part(int64_t set, int chunk, int row) const {
    return d.states[(set * d.chunks + chunk) * d.rows + row];
  }
};

template <class M, typename T>
bool decode(const AttentionParams& params, ParallelFor parallel_for) {
  Decode<M, T> job(params);
  const int64_t results = job.tasks() * job.rows;
  const int64_t states = aligned_bytes<RowState>(results), sums = aligned_bytes<float>(results * job.cols);
  const std::unique_ptr<char, decltype(&std::free)> parts(
      static_cast<char*>(std::aligned_alloc(kAlignment, states + sums)), &std::free);
  if (!parts) return false;
  job.states = reinterpret_cast<RowState*>(parts.get());
  job.sums = reinterpret_cast<float*>(parts.get() + states);
  const int64_t work = int64_t{smaller(params.rows.num_keys, Decode<M, T>::kChunk)} * params.head_dim * job.rows;
  if (!run_tasks(job, job.tasks(), parallel_for, work)) return false;
  MergeChunks<M, T> merge{job};
  return run_tasks(merge, job.sets(), parallel_for, int64_t{job.chunks} * job.rows * job.cols);
}

}  // namespace
}  // namespace longattn::cpu
