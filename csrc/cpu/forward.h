// Banded attention, forward: tiles of queries over the interval of keys that each row sees.
//
// A task is a chunk of queries of the query heads that share a KV head. It takes their keys a block at a time, as much
// as the second-level cache holds, and kRows queries after another: products with the block's keys, an exact online
// softmax, products with its values. Keys and values are packed when the first tile needs them, and what the next tile
// needs is fetched while this one computes. A row sees two disjoint intervals (sinks, band); both are handled alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "decode.h"
#include "fetch.h"
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
  static constexpr int kCols = 64;          // columns of logits between two requests of what comes later
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
    // Neighbours share keys, which the caches still hold if they follow one another; but where there is no left bound,
    // late chunks are the long ones and go first.
    const bool late_first = p.bands[0].group == 0 && p.bands[0].left >= p.rows.num_keys;
    const int64_t chunk = late_first ? part.chunks - 1 - index % part.chunks : index % part.chunks;
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
        visit_block(at, which, {begin, smaller(begin + block, hull.end)}, begin == hull.begin, m);
      if (which == &VisibleKeys::band && hull.empty())
        for (int i = 0; i < at.heads * at.tiles(); ++i) finish(tile_of(at, i, m));
    }
  }

  // What each row of a head's chunk sees; ends never decrease. Rows behind the last are like it, and not stored.
  void find_visible(const Place& at, int h, VisibleKeys* to) const {
    const RowBand band(p.bands[at.head + h], p.rows, at.batch);
    for (int r = 0; r < at.tiles() * kRows; ++r) to[r] = band.keys(at.row + smaller(r, at.rows - 1));
  }

  // kRows queries of one head.
  struct Tile {
    int batch, head, row, rows;  // the first of them; how many there are
    const VisibleKeys* visible;  // [kRows]
    RowState* states;            // [kRows]
    float* sums;                 // [kRows, out_cols]
  };

  Tile tile_of(const Place& at, int index, Memory& m) const {
    const int row = index % at.tiles() * kRows;
    const int64_t first = int64_t{index} * kRows;
    return {
        at.batch,         at.head + index / at.tiles(), at.row + row, smaller(kRows, at.rows - row), m.visible + first,
        m.states + first, m.sums + first * out_cols};
  }

  // The keys of one family within a block, packed as far as the tiles so far need them.
  struct Block {
    Range VisibleKeys::*which;
    Range keys;
    const T *key, *value;  // the first rows
    int depth;             // rows of the packed values
    int packed = 0, fetched = 0;

    Range of(const VisibleKeys& row) const { return row.*which; }
    int count() const { return keys.end - keys.begin; }
  };

  void visit_block(const Place& at, Range VisibleKeys::*which, Range keys, bool first, Memory& m) const {
    Block block{which, keys, row_of<T>(p.key, at.batch, at.kv_head, keys.begin),
                row_of<T>(p.value, at.batch, at.kv_head, keys.begin),
                static_cast<int>(round_up(keys.end - keys.begin, M::kPanel))};
    for (int i = 0; i < at.heads * at.tiles(); ++i) {
      const Tile tile = tile_of(at, i, m);
      const int begin = larger(keys.begin, block.of(tile.visible[0]).begin) - keys.begin;
      const int last = block.of(tile.visible[kRows - 1]).end, end = smaller(last, keys.end) - keys.begin;
      if (begin < end) {
        pack(block, end, m);
        Fetch ahead = fetch(at, i, block, m);
        M::template load_rows<kLdQuery>(row_of<T>(p.query, tile.batch, tile.head, tile.row), p.query.token, tile.rows,
                                        p.head_dim, LogitScale::query_factor(p.scale), m.query);
        int col = begin / M::kStep * M::kStep;
        const int stop = static_cast<int>(round_up(end, M::kStep));
        for (int pieces = static_cast<int>(divide_up(stop - col, kPiece)); pieces > 0; --pieces) {
          const int piece = static_cast<int>(round_up(divide_up(stop - col, pieces), M::kPanel));
          visit_piece(tile, block, col, smaller(col + piece, stop), ahead, m);
          col += piece;
        }
      }
      const bool done = last <= keys.end && (last > keys.begin || first);
      if (done && which == &VisibleKeys::band) finish(tile);
    }
  }

  // Packs keys and values of the block up to `end` at least.
  void pack(Block& b, int end, Memory& m) const {
    if (end <= b.packed) return;
    const int stop = smaller(b.depth, static_cast<int>(round_up(end, M::kPanel)));
    const int count = smaller(stop, b.count()) - b.packed;
    M::pack_transposed(b.key + b.packed * p.key.token, p.key.token, count, p.head_dim,
                       m.keys + b.packed / M::kPanel * M::panel_size(M::depth_of(p.head_dim)));
    M::pack_rows(b.value + b.packed * p.value.token, p.value.token, count, stop - b.packed, p.head_dim,
                 M::panel_size(b.depth), m.values + M::row_offset(b.packed));
    b.packed = stop;
  }

  // What comes after tile `index` and its keys.
  Fetch fetch(const Place& at, int index, Block& b, Memory& m) const {
    constexpr int kAhead = 64;  // keys
    const int bytes = p.head_dim * static_cast<int>(sizeof(T));
    Fetch ahead;
    const auto add = [&](const Tensor4& x, const T* row, int rows) {
      ahead.add(row, x.token * static_cast<int64_t>(sizeof(T)), bytes, rows);
    };
    const int begin = larger(b.packed, b.fetched);
    b.fetched = larger(begin, smaller(b.packed + kAhead, b.count()));
    add(p.key, b.key + begin * p.key.token, b.fetched - begin);
    add(p.value, b.value + begin * p.value.token, b.fetched - begin);
    const Tile tile = tile_of(at, index, m);
    add(p.out, row_of<T>(p.out, tile.batch, tile.head, tile.row), tile.rows);
    if (index + 1 < at.heads * at.tiles()) {
      const Tile next = tile_of(at, index + 1, m);
      add(p.query, row_of<T>(p.query, next.batch, next.head, next.row), next.rows);
    }
    return ahead;
  }

  // The columns [begin, end) of a packed block.
  void visit_piece(const Tile& tile, const Block& b, int begin, int end, Fetch& ahead, Memory& m) const {
    const int64_t channels = M::depth_of(p.head_dim);
    const int fetches = static_cast<int>(divide_up(ahead.rows(), divide_up(end - begin, kCols)));
    for (int col = begin, stop; col < end; col = stop) {
      stop = smaller(end, (col / kCols + 1) * kCols);
      M::template product<kLdQuery, M::kGroup, false>(m.query, m.keys, M::panel_size(channels), col, stop, channels,
                                                      m.logits + (col - begin), kLd);
      ahead.next(fetches);
    }
    const int base = b.keys.begin + begin;
    Range seen[kRows];
    for (int r = 0; r < kRows; ++r) {
      const Range keys = b.of(tile.visible[r]);
      seen[r] = {larger(0, keys.begin - base), smaller(end - begin, keys.end - base)};
    }
    Operand* weights = M::weights(m.logits, m.weights);
    float shrink[kRows];
    SoftmaxRows<V, Operand>{m.logits, weights, kLd, kRows, end - begin, seen, scale}(tile.states, shrink);
    for (int r = 0; r < kRows; ++r) {
      if (shrink[r] == 1.0f) continue;
      float* sums = tile.sums + r * out_cols;
      for (int d = 0; d < out_cols; d += V::kLanes) V::store(sums + d, V::mul(V::set1(shrink[r]), V::load(sums + d)));
    }
    M::template product<kLd, M::kGroup, true>(weights, m.values + M::row_offset(begin), M::panel_size(b.depth), 0,
                                              out_cols, end - begin, tile.sums, out_cols);
  }

  void finish(const Tile& tile) const {
    for (int r = 0; r < tile.rows; ++r)
      store_result<V, T>(p, tile.batch, tile.head, tile.row + r, tile.states[r], tile.sums + r * out_cols);
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
