// Banded attention, forward: tiles of queries over the interval of keys that each row sees.
//
// A task is a chunk of queries of the query heads that share a KV head. Its keys are packed a block at a time, into
// what the second-level cache holds; then kRows queries after another: products with the block's keys, an exact online
// softmax row by row, products with its values. A row sees two disjoint intervals (sinks, band); both are handled
// alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "decode.h"
#include "rows.h"
#include "scratch.h"
#include "softmax.h"
#include "tasks.h"

namespace longattn::cpu {
namespace {

template <class M, typename T>
struct Forward {
  using V = typename M::V;
  using Operand = typename M::Operand;
  static constexpr int kRows = M::kRows;
  static constexpr int kPiece = M::kPiece;  // columns of a piece of logits
  static constexpr int kLd = kPiece + 16;   // of logits, in floats; rows that do not meet in the cache's sets
  static constexpr int kLdQuery = kMaxHeadDim + 16;
  static constexpr int64_t kBlockBytes = 768 << 10;  // of packed keys and values

  const AttentionParams& p;
  LogitScale scale;
  Partition part;
  int block;     // keys of a packed block
  int out_cols;  // of the accumulators

  explicit Forward(const AttentionParams& params)
      : p(params),
        scale(params.scale, params.softcap),
        part(params, kRows, 512),
        block(static_cast<int>(smaller<int64_t>(round_up(larger(params.rows.num_keys, 1), M::kPanel),
                                                kBlockBytes / (2 * params.head_dim * sizeof(Operand)) / 64 * 64))),
        out_cols(static_cast<int>(round_up(params.head_dim, M::kStep))) {}

  struct Buffers {
    Operand *keys, *values, *query, *weights;
    float *logits, *sums;
    RowState* states;
    VisibleKeys* visible;

    template <class Take>
    void lay_out(const Forward& f, Take take) {
      const int64_t rows = f.part.rows * f.part.heads;
      take(keys, M::panels(f.block) * M::panel_size(M::depth_of(f.p.head_dim)));
      take(values, M::panels(f.p.head_dim) * M::panel_size(f.block));
      take(query, int64_t{kRows} * kLdQuery);
      take(weights, M::kNarrow ? int64_t{kRows} * kLd : 0);
      take(logits, int64_t{kRows} * kLd);
      take(sums, rows * f.out_cols);
      take(states, rows);
      take(visible, rows);
    }
  };
  using Memory = Scratch<Forward, Buffers>;
  using Session = typename M::Session;

  // One task's place in the tensors.
  struct Place {
    int batch, kv_head, head, heads, row, rows;
    int tiles() const { return (rows + kRows - 1) / kRows; }
  };

  Place place(int64_t index) const {
    // Late chunks first: they are the long ones where there is no left bound.
    const int64_t chunk = part.chunks - 1 - index % part.chunks;
    index /= part.chunks;
    const int in_group = static_cast<int>(index % part.parts) * part.heads;
    index /= part.parts;
    Place at;
    at.kv_head = static_cast<int>(index % p.kv_heads);
    at.batch = static_cast<int>(index / p.kv_heads);
    const int group = p.heads / p.kv_heads;
    at.head = at.kv_head * group + in_group;
    at.heads = smaller(part.heads, group - in_group);
    at.row = static_cast<int>(chunk * part.rows);
    at.rows = static_cast<int>(smaller<int64_t>(part.rows, p.rows.num_queries - at.row));
    return at;
  }

  void task(int64_t index, Memory& m) const {
    const Place at = place(index);
    const int64_t stride = at.tiles() * kRows;
    for (int h = 0; h < at.heads; ++h) find_visible(at, h, m.visible + h * stride);
    for (int64_t i = 0; i < at.heads * stride; ++i) m.states[i] = RowState();
    for (int64_t i = 0; i < at.heads * stride * out_cols; ++i) m.sums[i] = 0.0f;
    for (Range VisibleKeys::*which : {&VisibleKeys::sinks, &VisibleKeys::band}) {
      Range hull{p.rows.num_keys, 0};
      for (int h = 0; h < at.heads; ++h) {
        const VisibleKeys* rows = m.visible + h * stride;
        hull.begin = smaller(hull.begin, (rows[0].*which).begin);
        hull.end = larger(hull.end, (rows[at.rows - 1].*which).end);
      }
      for (int begin = hull.begin; begin < hull.end; begin += block)
        visit_block(at, which, {begin, smaller(begin + block, hull.end)}, m);
    }
    finish(at, m);
  }

  // What each row of a head's chunk sees; ends never decrease. Rows behind the last are like it, and not stored.
  void find_visible(const Place& at, int h, VisibleKeys* to) const {
    const RowBand band(p.bands[at.head + h], p.rows, at.batch);
    for (int r = 0; r < at.tiles() * kRows; ++r) to[r] = band.keys(at.row + smaller(r, at.rows - 1));
  }

  void visit_block(const Place& at, Range VisibleKeys::*which, Range keys, Memory& m) const {
    bool packed = false;
    const int count = keys.end - keys.begin;
    const int depth = static_cast<int>(round_up(count, M::kStep));
    for (int h = 0; h < at.heads; ++h)
      for (int t = 0; t < at.tiles(); ++t) {
        const int64_t first = (int64_t{h} * at.tiles() + t) * kRows;
        const VisibleKeys* rows = m.visible + first;
        const int begin = larger(keys.begin, (rows[0].*which).begin) - keys.begin;
        const int end = smaller(keys.end, (rows[kRows - 1].*which).end) - keys.begin;
        if (end <= begin) continue;
        if (!packed) {
          const T* key = row_of<T>(p.key, at.batch, at.kv_head, keys.begin);
          const T* value = row_of<T>(p.value, at.batch, at.kv_head, keys.begin);
          M::pack_transposed(key, p.key.token, count, p.head_dim, m.keys);
          M::pack_rows(value, p.value.token, count, depth, p.head_dim, m.values);
          packed = true;
        }
        const int row = at.row + t * kRows;
        M::template load_rows<kLdQuery>(row_of<T>(p.query, at.batch, at.head + h, row), p.query.token,
                                        at.row + at.rows - row, p.head_dim, LogitScale::query_factor(p.scale), m.query);
        int col = begin / M::kStep * M::kStep;
        for (const int stop = static_cast<int>(round_up(end, M::kStep)); col < stop; col += kPiece)
          visit_piece(which, first, keys.begin, col, smaller(col + kPiece, stop), depth, m);
      }
  }

  // The columns [begin, end) of a packed block, for the kRows rows from `first` on.
  void visit_piece(Range VisibleKeys::*which, int64_t first, int key, int begin, int end, int depth, Memory& m) const {
    const int64_t channels = M::depth_of(p.head_dim);
    M::template product<kLdQuery, M::kGroup, false>(m.query, m.keys, M::panel_size(channels), begin, end, channels,
                                                    m.logits, kLd);
    const int base = key + begin;
    float* sums = m.sums + first * out_cols;
    Operand* weights = M::weights(m.logits, m.weights);
    for (int r = 0; r < kRows; ++r) {
      const Range seen = m.visible[first + r].*which;
      const float shrink = softmax_row<V>(m.logits + r * kLd, weights + r * kLd, end - begin, seen.begin - base,
                                          seen.end - base, scale, m.states + first + r);
      if (shrink != 1.0f) {
        const auto factor = V::set1(shrink);
        for (int d = 0; d < out_cols; d += V::kLanes)
          V::store(sums + r * out_cols + d, V::mul(factor, V::load(sums + r * out_cols + d)));
      }
    }
    M::template product<kLd, M::kGroup, true>(weights, m.values + M::row_offset(begin), M::panel_size(depth), 0,
                                              out_cols, end - begin, sums, out_cols);
  }

  void finish(const Place& at, Memory& m) const {
    for (int h = 0; h < at.heads; ++h)
      for (int r = 0; r < at.rows; ++r) {
        const int64_t index = int64_t{h} * at.tiles() * kRows + r;
        store_result<V, T>(p, at.batch, at.head + h, at.row + r, m.states[index], m.sums + index * out_cols);
      }
  }
};

template <class M, typename T>
bool forward(const AttentionParams& params, ParallelFor parallel_for) {
  if (int64_t{params.batch} * params.heads * params.rows.num_queries == 0) return true;
  if (Decode<M, T>::serves(params)) return decode<M, T>(params, parallel_for);
  Forward<M, T> job(params);
  return run_tasks(job, job.part.tasks, parallel_for, job.part.rows * job.part.heads * params.head_dim * 64);
}

}  // namespace
}  // namespace longattn::cpu
