// Banded attention, backward: blocks of keys over the interval of queries that see them, all five products in one pass.
//
// Everything is formed transposed, keys by queries: with P = exp(S - lse) and delta = rowsum(dO O) - dlse
//   S^T = K Q^T,  dP^T = V dO^T,  dS^T = P^T (dP^T - delta),  dV += P^T dO,  dK += dS^T Q,  dQ += dS K
// (Dao et al., 2022, arXiv:2205.14135, algorithm 4). A task is a strip of queries with the query heads of a KV head: it
// owns their dQ, and sums its share of dK and dV in float32. Keys that one strip alone sees are written by its task;
// shares of the others (the edges of strips, the sinks) are kept, and added up in the order of the strips afterwards.
#pragma once

#include <cmath>
#include <cstdint>

#include "forward.h"
#include "scratch.h"
#include "softmax.h"
#include "strips.h"
#include "tasks.h"

namespace longattn::cpu {
namespace {

template <class M, typename T>
struct Backward {
  using V = typename M::V;
  using Vec = typename V::Vec;
  using Operand = typename M::Operand;
  static constexpr int kRows = M::kRows;
  static constexpr int kKeys = M::kKeyBlock;     // keys of a block, a multiple of kRows
  static constexpr int kPiece = M::kQueryPiece;  // queries of a piece, a multiple of kRows and of kStep
  static constexpr int kLd = kPiece + 32;
  static constexpr int kLdChannels = kMaxHeadDim + 16;
  static constexpr int kLdKeys = kKeys + 32;
  static constexpr int kQueries = 1024;                    // packed at a time
  static constexpr int kQueryRows = kQueries + 2 * kRows;  // with rows that only padding reaches

  const AttentionParams& p;
  const AttentionGrads& g;
  const Strips& strips;
  float* shares;        // [strips.shared_rows, 2, cols]: of dK and dV
  double* sink_grads;   // [tasks, heads of a KV head], or null
  float factor, inner;  // logit = factor * product, or factor * tanh(inner * product) under a soft cap, in log 2 units
  int cols;             // of the accumulators

  Backward(const AttentionParams& params, const AttentionGrads& grads, const Strips& cut)
      : p(params),
        g(grads),
        strips(cut),
        shares(nullptr),
        sink_grads(nullptr),
        factor((params.softcap != 0 ? params.softcap : params.scale) * kLog2E),
        inner(params.softcap != 0 ? params.scale / params.softcap : 0.0f),
        cols(static_cast<int>(round_up(params.head_dim, M::kStep))) {}

  int group() const { return p.heads / p.kv_heads; }
  int64_t tasks() const { return int64_t{p.batch} * p.kv_heads * strips.count; }

  struct Buffers {
    Operand *query_t, *query, *grad_t, *grad;  // queries and gradients of the output, packed both ways
    Operand *key_rows, *value_rows;            // [kKeys, kLdChannels]
    Operand* key;                              // for dQ: packed, or [cols, kLdKeys]
    float *logits, *slopes;                    // [kRows, kLd]: S^T; dP^T
    Operand *weights, *slope_rows;             // [kRows, kLd]: P^T; dS^T, where narrower than float32
    Operand* dlogits;                          // [kKeys / kGroup, kLd, kGroup]: dS^T
    float *lse, *delta;                        // [kQueryRows]
    int *begin, *end;                          // [kQueryRows]: the keys that each query sees
    float* grad_query;                         // [kQueryRows, cols], or [cols, kQueryRows]
    float* sums[2];                            // [keys + kRows, 2, cols]: dK and dV of each family

    template <class Take>
    void lay_out(const Backward& b, Take take) {
      const int64_t transposed = M::panels(kQueries) * M::panel_size(M::depth_of(b.p.head_dim));
      const int64_t packed = M::panels(b.p.head_dim) * M::panel_size(kQueries);
      take(query_t, transposed);
      take(query, packed);
      take(grad_t, transposed);
      take(grad, packed);
      take(key_rows, int64_t{kKeys} * kLdChannels);
      take(value_rows, int64_t{kKeys} * kLdChannels);
      take(key, M::panels(b.p.head_dim) * M::kPanel * kLdKeys);
      take(logits, int64_t{kRows} * kLd);
      take(slopes, int64_t{kRows} * kLd);
      take(weights, M::kNarrow ? int64_t{kRows} * kLd : 0);
      take(slope_rows, M::kNarrow ? int64_t{kRows} * kLd : 0);
      take(dlogits, int64_t{kKeys} * kLd);
      take(lse, kQueryRows);
      take(delta, kQueryRows);
      take(begin, kQueryRows);
      take(end, kQueryRows);
      take(grad_query, int64_t{kQueryRows} * b.cols);
      for (int family = 0; family < 2; ++family) take(sums[family], (b.strips.most_keys[family] + kRows) * 2 * b.cols);
    }
  };
  using Memory = Scratch<Backward, Buffers>;
  using Session = typename M::Session;

  // Some queries of one head.
  struct Place {
    int batch, kv_head, head, row, rows;
  };

  void task(int64_t index, Memory& m) const {
    const int strip = static_cast<int>(strips.count - 1 - index % strips.count);  // the long ones first
    const int set = static_cast<int>(index / strips.count);
    const int64_t width = 2 * cols;
    for (int family = 0; family < 2; ++family) {
      const Range keys = strips.keys(set, strip, family);
      fill(m.sums[family], (keys.end - keys.begin + kRows) * width, 0.0f);
    }
    const int stop = smaller((strip + 1) * strips.rows, p.rows.num_queries);
    for (int h = 0; h < group(); ++h) {
      double sink_grad = 0.0;
      for (int row = strip * strips.rows; row < stop; row += kQueries) {
        const int kv_head = set % p.kv_heads;
        const Place at{set / p.kv_heads, kv_head, kv_head * group() + h, row, smaller(kQueries, stop - row)};
        sink_grad += load_queries(at, m);
        for (int family = 0; family < 2; ++family) visit_family(at, family, strips.keys(set, strip, family).begin, m);
        store_query_grads(at, m);
      }
      if (sink_grads) sink_grads[(int64_t{set} * strips.count + strip) * group() + h] = sink_grad;
    }
    for (int family = 0; family < 2; ++family) store_keys(set, strip, family, m.sums[family]);
  }

  template <typename E>
  static void fill(E* x, int64_t count, E value) {
    for (int64_t i = 0; i < count; ++i) x[i] = value;
  }

  // Packs queries and gradients, forms delta, clears dQ; returns the sink logit's gradient.
  double load_queries(const Place& at, Memory& m) const {
    const T* query = row_of<T>(p.query, at.batch, at.head, at.row);
    const T* grad = row_of<T>(g.grad_out, at.batch, at.head, at.row);
    const T* out = row_of<T>(p.out, at.batch, at.head, at.row);
    const int depth = static_cast<int>(round_up(at.rows, M::kStep));
    M::pack_transposed(query, p.query.token, at.rows, p.head_dim, m.query_t);
    M::pack_rows(query, p.query.token, at.rows, depth, p.head_dim, M::panel_size(depth), m.query);
    M::pack_transposed(grad, g.grad_out.token, at.rows, p.head_dim, m.grad_t);
    M::pack_rows(grad, g.grad_out.token, at.rows, depth, p.head_dim, M::panel_size(depth), m.grad);
    fill(m.grad_query, int64_t{M::kTransposedQueryGrads ? kQueryRows : at.rows + kRows} * cols, 0.0f);
    const int64_t first = (int64_t{at.batch} * p.heads + at.head) * p.rows.num_queries + at.row;
    double sink_grad = 0.0;
    for (int i = 0; i < kQueryRows; ++i) {
      const bool real = i < at.rows;
      const float lse = real ? p.lse[first + i] : -INFINITY;
      m.lse[i] = lse == -INFINITY ? INFINITY : lse * kLog2E;
      m.delta[i] = 0.0f;
      if (!real) continue;
      Vec sum = V::zero();
      for (int d = 0; d < p.head_dim; d += V::kLanes)
        sum = V::fma(M::load_part(grad + i * g.grad_out.token + d, p.head_dim - d),
                     M::load_part(out + i * p.out.token + d, p.head_dim - d), sum);
      m.delta[i] = V::sum(sum) - (g.grad_lse ? g.grad_lse[first + i] : 0.0f);
      if (sink_grads && lse != -INFINITY)
        sink_grad -= std::exp2(p.sink_logits[at.head] * kLog2E - m.lse[i]) * m.delta[i];
    }
    return sink_grad;
  }

  // `base` is the first key of the sums.
  void visit_family(const Place& at, int family, int base, Memory& m) const {
    const RowBand band(p.bands[at.head], p.rows, at.batch);
    int begin = 0, end = 0;
    for (int i = 0; i < kQueryRows; ++i) {
      if (i < at.rows) {
        const Range seen = band.keys(at.row + i).*kFamilies[family];
        begin = seen.begin;
        end = seen.end;
      } else {
        begin = end;
      }
      m.begin[i] = begin;
      m.end[i] = end;
    }
    for (int key = m.begin[0]; key < end; key += kKeys)
      visit_block(at, family, {key, smaller(key + kKeys, end)}, base, m);
  }

  // The queries that may see one of the keys.
  static Range queries_of(const Range& keys, int rows, const Memory& m) {
    return {first_above(m.end, rows, keys.begin), first_above(m.begin, rows, keys.end - 1)};
  }
  static int first_above(const int* x, int count, int value) {
    int low = 0;
    while (low < count) {
      const int middle = low + (count - low) / 2;
      if (x[middle] > value)
        count = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  void visit_block(const Place& at, int family, Range keys, int base, Memory& m) const {
    const Range queries = queries_of(keys, at.rows, m);
    if (queries.empty()) return;
    const int count = keys.end - keys.begin;
    const T* key = row_of<T>(p.key, at.batch, at.kv_head, keys.begin);
    const T* value = row_of<T>(p.value, at.batch, at.kv_head, keys.begin);
    for (int r = 0; r < count; r += kRows) {
      M::template load_rows<kLdChannels>(key + r * p.key.token, p.key.token, count - r, p.head_dim, 1.0f,
                                         m.key_rows + r * kLdChannels);
      M::template load_rows<kLdChannels>(value + r * p.value.token, p.value.token, count - r, p.head_dim, 1.0f,
                                         m.value_rows + r * kLdChannels);
    }
    if constexpr (M::kTransposedQueryGrads)
      M::template pack_columns<kLdKeys>(key, p.key.token, count, kKeys, p.head_dim, m.key);
    else
      M::pack_rows(key, p.key.token, count, kKeys, p.head_dim, M::panel_size(kKeys), m.key);
    const int stop = static_cast<int>(round_up(queries.end, M::kStep));
    const int depth = static_cast<int>(round_up(at.rows, M::kStep));
    for (int col = queries.begin / M::kStep * M::kStep; col < stop; col += kPiece) {
      const Range piece{col, smaller(col + kPiece, stop)};
      for (int r = 0; r < count; r += kRows) {
        const Range rows{keys.begin + r, smaller(keys.begin + r + kRows, keys.end)};
        visit_keys(at, rows, piece, r, depth, m.sums[family] + int64_t{rows.begin - base} * 2 * cols, m);
      }
      add_query_grads(at, keys, piece, m);
    }
  }

  // kRows keys over a piece of the queries: dK and dV, and dS^T into the rows of m.dlogits from `row` on.
  void visit_keys(const Place& at, Range keys, Range piece, int row, int depth, float* sums, Memory& m) const {
    Range seen = queries_of(keys, at.rows, m);
    seen.begin = larger(seen.begin / M::kStep * M::kStep, piece.begin);
    seen.end = smaller(static_cast<int>(round_up(seen.end, M::kStep)), piece.end);
    Operand* dlogits = m.dlogits + int64_t{row} * kLd;
    if (seen.empty()) seen = {piece.begin, piece.begin};
    const int first = seen.begin - piece.begin, last = seen.end - piece.begin;
    const int width = static_cast<int>(round_up(piece.end - piece.begin, kRows));
    for (int r = 0; r < kRows; r += M::kGroup) {
      fill(dlogits + r * kLd, M::kGroup * first, Operand{});
      fill(dlogits + r * kLd + M::kGroup * last, M::kGroup * (width - last), Operand{});
    }
    if (first == last) return;
    const int64_t channels = M::depth_of(p.head_dim), panel = M::panel_size(channels);
    M::template product<kLdChannels, M::kGroup, false>(m.key_rows + int64_t{row} * kLdChannels, m.query_t, panel,
                                                       seen.begin, seen.end, channels, m.logits, kLd);
    M::template product<kLdChannels, M::kGroup, false>(m.value_rows + int64_t{row} * kLdChannels, m.grad_t, panel,
                                                       seen.begin, seen.end, channels, m.slopes, kLd);
    dlogits += M::kGroup * first;
    Operand* slopes = M::weights(nullptr, m.slope_rows);
    if constexpr (!M::kNarrow) slopes = dlogits;
    Operand* weights = M::weights(m.logits, m.weights);
    if (p.softcap != 0)
      form_logit_grads<true>(keys.begin, seen, weights, slopes, dlogits, m);
    else
      form_logit_grads<false>(keys.begin, seen, weights, slopes, dlogits, m);
    const int64_t count = seen.end - seen.begin, grad_panel = M::panel_size(depth), rows = M::row_offset(seen.begin);
    M::template product<kLd, M::kGroup, true>(slopes, m.query + rows, grad_panel, 0, cols, count, sums, 2 * cols);
    M::template product<kLd, M::kGroup, true>(weights, m.grad + rows, grad_panel, 0, cols, count, sums + cols,
                                              2 * cols);
  }

  // P^T from S^T, and dS^T without the scale: row by row in `slopes`, and in groups for dQ in `dlogits`.
  template <bool kCap>
  void form_logit_grads(int key, Range seen, Operand* weights, Operand* slopes, Operand* dlogits, Memory& m) const {
    const Vec scale = V::set1(factor), inside = V::set1(inner), one = V::set1(1.0f);
    for (int q = seen.begin; q < seen.end; q += V::kLanes) {
      const Vec lse = V::load(m.lse + q), delta = V::load(m.delta + q);
      const bool whole = m.begin[q + V::kLanes - 1] <= key && m.end[q] >= key + kRows;
      const int col = q - seen.begin;
      for (int pair = 0; pair < kRows; pair += 2) {
        Vec both[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int r = pair + i;
          Vec logit = V::load(m.logits + r * kLd + col);
          if (kCap) logit = tanh<V>(V::mul(logit, inside));
          // at most 1: logits beyond 2^24 differ from their log-sum-exp by its rounding
          Vec weight = V::exp2(V::min(V::zero(), V::sub(V::mul(logit, scale), lse)));
          if (!whole) weight = V::keep(V::holds(m.begin + q, m.end + q, key + r), weight);
          Vec slope = V::mul(weight, V::sub(V::load(m.slopes + r * kLd + col), delta));
          if (kCap) slope = V::mul(slope, V::sub(one, V::mul(logit, logit)));
          V::store(weights + r * kLd + col, weight);
          V::store(slopes + r * kLd + col, slope);
          both[i] = slope;
        }
        if constexpr (M::kNarrow) V::store_pairs(dlogits + pair * kLd + 2 * col, both[0], both[1]);
      }
    }
  }

  // dQ += dS K over a block of keys, kRows queries at a time, each over the keys that they see.
  void add_query_grads(const Place& at, Range keys, Range piece, Memory& m) const {
    for (int q = piece.begin; q < smaller(piece.end, at.rows); q += kRows) {
      int begin = larger(m.begin[q], keys.begin) - keys.begin;
      int end = smaller(m.end[smaller(q + kRows, at.rows) - 1], keys.end) - keys.begin;
      if (end <= begin) continue;
      begin = begin / M::kDepthStep * M::kDepthStep;  // within the kRows keys that were formed together
      end = static_cast<int>(round_up(end, M::kDepthStep));
      const Operand* dlogits = m.dlogits + int64_t{begin} * kLd + M::kGroup * (q - piece.begin);
      if constexpr (M::kTransposedQueryGrads) {
        for (int d = 0; d < cols; d += kRows)
          M::template tiles<kLdKeys, kLd, true>(m.key + int64_t{d} * kLdKeys + begin, dlogits, end - begin,
                                                m.grad_query + int64_t{d} * kQueryRows + q, kQueryRows);
      } else {
        M::template product<M::kGroup, M::kGroup * kLd, true>(dlogits, m.key + M::row_offset(begin),
                                                              M::panel_size(kKeys), 0, cols, end - begin,
                                                              m.grad_query + int64_t{q} * cols, cols);
      }
    }
  }

  void store_query_grads(const Place& at, Memory& m) const {
    if constexpr (M::kTransposedQueryGrads) {
      constexpr int kLanes = V::kLanes;
      alignas(kAlignment) float rows[kLanes * (kMaxHeadDim + kLanes)];
      for (int q = 0; q < at.rows; q += kLanes) {
        for (int d = 0; d < cols; d += kLanes) {
          Vec block[kLanes];
          for (int i = 0; i < kLanes; ++i) block[i] = V::load(m.grad_query + int64_t{d + i} * kQueryRows + q);
          V::transpose(block);
          for (int i = 0; i < kLanes; ++i) V::store(rows + i * (kMaxHeadDim + kLanes) + d, block[i]);
        }
        store_rows(rows, kMaxHeadDim + kLanes, p.scale, g.grad_query, at.batch, at.head, at.row + q,
                   smaller(kLanes, at.rows - q));
      }
    } else {
      store_rows(m.grad_query, cols, p.scale, g.grad_query, at.batch, at.head, at.row, at.rows);
    }
  }

  void store_rows(const float* x, int64_t ld, float scale, const Tensor4& to, int batch, int head, int row,
                  int rows) const {
    const Vec s = V::set1(scale);
    for (int r = 0; r < rows; ++r) {
      T* at = row_of<T>(to, batch, head, row + r);
      int d = 0;
      for (; d + V::kLanes <= p.head_dim; d += V::kLanes) V::store(at + d, V::mul(s, V::load(x + r * ld + d)));
      if (d < p.head_dim) V::store_eight(at + d, V::mul(s, V::load(x + r * ld + d)));
    }
  }

  // A strip's sums of dK and dV: where no other strip sees a key they are its gradients, else a share of them.
  void store_keys(int set, int strip, int family, const float* sums) const {
    const Range keys = strips.keys(set, strip, family);
    const int64_t width = 2 * cols;
    for (int key = keys.begin; key < keys.end; ++key) {
      const float* x = sums + (key - keys.begin) * width;
      if (strips.cover(set, key) == 1) {
        store_key(set, key, x);
        continue;
      }
      float* share = shares + strips.share_row(set, strip, family, key) * width;
      for (int64_t d = 0; d < width; d += V::kLanes) V::store(share + d, V::load(x + d));
    }
  }

  void store_key(int set, int key, const float* x) const {
    const int batch = set / p.kv_heads, head = set % p.kv_heads;
    store_rows(x, 0, p.scale, g.grad_key, batch, head, key, 1);
    store_rows(x + cols, 0, 1.0f, g.grad_value, batch, head, key, 1);
  }
};

// Adds up the shares, and writes zeros where no query sees a key. A task is a block of keys.
template <class M, typename T>
struct AddShares {
  static constexpr int kBlock = 256;
  const Backward<M, T>& b;

  struct Buffers {
    float* sum;
    template <class Take>
    void lay_out(const AddShares& job, Take take) {
      take(sum, 2 * int64_t{job.b.cols});
    }
  };
  using Memory = Scratch<AddShares, Buffers>;
  struct Session {};

  int64_t blocks() const { return divide_up(b.p.rows.num_keys, kBlock); }
  int64_t tasks() const { return int64_t{b.p.batch} * b.p.kv_heads * blocks(); }

  void task(int64_t index, Memory& m) const {
    using V = typename M::V;
    const int set = static_cast<int>(index / blocks());
    const int first = static_cast<int>(index % blocks()) * kBlock;
    const int64_t width = 2 * b.cols;
    for (int key = first; key < smaller(first + kBlock, b.p.rows.num_keys); ++key) {
      if (b.strips.cover(set, key) == 1) continue;
      b.fill(m.sum, width, 0.0f);
      for (int strip = 0; strip < b.strips.count; ++strip)
        for (int family = 0; family < 2; ++family) {
          const Range& keys = b.strips.keys(set, strip, family);
          if (key < keys.begin || key >= keys.end) continue;
          const float* share = b.shares + b.strips.share_row(set, strip, family, key) * width;
          for (int64_t d = 0; d < width; d += V::kLanes)
            V::store(m.sum + d, V::add(V::load(m.sum + d), V::load(share + d)));
        }
      b.store_key(set, key, m.sum);
    }
  }
};

template <class M, typename T>
bool backward(const AttentionParams& params, const AttentionGrads& grads, ParallelFor parallel_for) {
  if (grads.grad_sink_logits)
    for (int h = 0; h < params.heads; ++h) grads.grad_sink_logits[h] = 0.0f;
  if (int64_t{params.batch} * params.heads == 0) return true;
  const Strips strips(params, sizeof(T));
  Backward<M, T> job(params, grads, strips);
  std::vector<double> sink_grads(grads.grad_sink_logits ? job.tasks() * job.group() : 0);
  job.sink_grads = sink_grads.empty() ? nullptr : sink_grads.data();
  const int64_t bytes = aligned_bytes<float>(larger<int64_t>(strips.shared_rows * 2 * job.cols, 1));
  const std::unique_ptr<void, decltype(&std::free)> shares(std::aligned_alloc(kAlignment, bytes), &std::free);
  if (!shares) return false;
  job.shares = static_cast<float*>(shares.get());
  if (!run_tasks(job, job.tasks(), parallel_for, int64_t{strips.rows} * job.group() * params.head_dim * 64))
    return false;
  AddShares<M, T> rest{job};
  if (!run_tasks(rest, rest.tasks(), parallel_for, AddShares<M, T>::kBlock * int64_t{2} * job.cols)) return false;
  for (int64_t i = 0; i < static_cast<int64_t>(sink_grads.size()); ++i) {
    const int64_t set = i / (int64_t{strips.count} * job.group());
    grads.grad_sink_logits[set % params.kv_heads * job.group() + i % job.group()] += sink_grads[i];
  }
  return true;
}

}  // namespace
}  // namespace longattn::cpu
