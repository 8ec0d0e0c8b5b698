// The band: which keys a query sees and which queries see a key, for every kernel, on host and device.
//
// A query at position p sees the keys lo(p) <= j <= hi(p) and, beside them, the first `sinks` keys up to hi(p). Both
// ends never decrease as p grows, so a tile of queries visits one range of keys (the sinks merged or before it), a tile
// of keys one range of queries, and only the tiles at the two edges need a mask. A key is seen by one interval of
// queries, sinks or not. Positions count from the first real token of a row or document.
// Values that lie in device memory (kv_start, kv_end, cu_seqlens) may be anything: every index returned is clamped to
// [0, num_keys] or [0, num_queries], and no loop depends on them for its end.
// Ranges are half open; empty where end <= begin.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LONGATTN_HD __host__ __device__ __forceinline__
#else
#define LONGATTN_HD inline
#endif

namespace longattn {

constexpr int64_t kFar = int64_t{1} << 60;  // beyond every position; the sum of two still fits

template <typename T>
LONGATTN_HD constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
LONGATTN_HD constexpr T larger(T a, T b) {
  return a > b ? a : b;
}

LONGATTN_HD int64_t floor_div(int64_t a, int64_t b) {
  if (((a | b) >> 31) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // far cheaper on a GPU
  return a / b - (a % b < 0);
}

// The document that a position is in, the nearest one where it is in none; cu_seqlens holds num_documents + 1 bounds.
LONGATTN_HD int document_of(const int32_t* cu_seqlens, int num_documents, int64_t position) {
  int low = 1, high = larger(num_documents, 1);  // the first bound above the position, among these
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (cu_seqlens[middle] > position)
      high = middle;
    else
      low = middle + 1;
  }
  return low - 1;
}

struct Range {
  int begin, end;
  LONGATTN_HD bool empty() const { return end <= begin; }
  LONGATTN_HD bool holds(int i) const {  // one compare; an empty range must have end >= begin
    return static_cast<unsigned>(i - begin) < static_cast<unsigned>(end - begin);
  }
  LONGATTN_HD bool covers(int from, int to) const { return begin <= from && to <= end; }
  LONGATTN_HD bool meets(int from, int to) const { return begin < to && from < end && from < to; }
  // Bit i says whether the range holds from + i: an edge mask of 32 keys without a compare for each.
  LONGATTN_HD uint32_t bits(int from) const {
    const int low = smaller(larger(begin - from, 0), 32), high = smaller(larger(end - from, low), 32);
    return static_cast<uint32_t>((uint64_t{1} << high) - (uint64_t{1} << low));
  }
};

// The two ends, and their inverse: a new pattern is a new set of these four.
struct Band {
  int64_t left, right;   // window: keys before and after the query's own, kFar for no bound
  int64_t group, shift;  // tokens of a group, 0 for a window; the first group is shortened by shift, 0 <= shift < group
  bool causal;           // of a group: no later key

  LONGATTN_HD int64_t group_begin(int64_t p) const { return floor_div(p + shift, group) * group - shift; }
  // The keys that position p sees, both ends included.
  LONGATTN_HD int64_t lo(int64_t p) const { return group ? group_begin(p) : p - left; }
  LONGATTN_HD int64_t hi(int64_t p) const {
    if (!group) return p + right;
    return causal ? p : group_begin(p) + group - 1;
  }
  // The positions that see key j, both ends included.
  LONGATTN_HD int64_t query_lo(int64_t j) const {
    if (!group) return j - right;
    return causal ? j : group_begin(j);
  }
  LONGATTN_HD int64_t query_hi(int64_t j) const { return group ? group_begin(j) + group - 1 : j + left; }
};

// left and right as users give them: -1 is no bound.
LONGATTN_HD Band window_band(int64_t left, int64_t right) {
  return {left < 0 ? kFar : smaller(left, kFar), right < 0 ? kFar : smaller(right, kFar), 0, 0, false};
}

// A group beyond every position is cut to 2 kFar with its only border that can be met kept where it is.
LONGATTN_HD Band group_band(int64_t size, int64_t shift, bool causal) {
  const int64_t cut = larger(int64_t{0}, size - 2 * kFar);
  return {0, 0, size - cut, larger(int64_t{0}, shift - cut), causal};
}

// What one query sees: two disjoint ranges, sinks.begin <= sinks.end <= band.begin <= band.end.
struct alignas(16) VisibleKeys {
  Range sinks, band;
  LONGATTN_HD bool sees(int key) const { return band.holds(key) || sinks.holds(key); }
  LONGATTN_HD uint32_t bits(int from) const { return band.bits(from) | sinks.bits(from); }
};

// The queries that see one key: by the band, and behind them those that see it as a sink alone.
struct alignas(16) VisibleQueries {
  Range band, sinks;  // band.end == sinks.begin
  LONGATTN_HD bool seen_by(int query) const { return Range{band.begin, sinks.end}.holds(query); }
};

// What the first queries of heads that share a tile see at least, and the last ones at most: for RowBand::tiles_of.
LONGATTN_HD VisibleKeys join_first(const VisibleKeys& a, const VisibleKeys& b) {
  return {{smaller(a.sinks.begin, b.sinks.begin), smaller(a.sinks.end, b.sinks.end)},
          {smaller(a.band.begin, b.band.begin), smaller(a.band.end, b.band.end)}};
}
LONGATTN_HD VisibleKeys join_last(const VisibleKeys& a, const VisibleKeys& b) {
  return {a.sinks, {larger(a.band.begin, b.band.begin), larger(a.band.end, b.band.end)}};
}

// The keys that a tile of queries visits: `sink_tiles` tiles from `sink_begin` on, then `band_tiles` from `band_begin`
// on. No key is in two of them. Tiles inside `common` are seen whole by every query and need no mask.
struct KeyTiles {
  int sink_begin, sink_tiles, band_begin, band_tiles;
  Range common;
  int size;  // keys of a tile

  LONGATTN_HD int count() const { return sink_tiles + band_tiles; }
  LONGATTN_HD int begin(int tile) const {
    return tile < sink_tiles ? sink_begin + tile * size : band_begin + (tile - sink_tiles) * size;
  }
  LONGATTN_HD bool interior(int tile) const { return common.covers(begin(tile), begin(tile) + size); }

  // How many tiles begin, or end, before a key: they come in the order of their keys.
  LONGATTN_HD int begun_before(int key) const { return before(key + size - 1); }
  LONGATTN_HD int ended_before(int key) const { return before(key); }
  // The tiles that hold some of these keys, or none but these.
  LONGATTN_HD Range touched_by(const Range& keys) const {
    if (keys.empty()) return {0, 0};
    return {ended_before(keys.begin), begun_before(keys.end)};
  }
  LONGATTN_HD Range within(const Range& keys) const {
    const int from = begun_before(keys.begin);
    return {from, larger(from, ended_before(keys.end))};
  }

 private:
  LONGATTN_HD int whole_tiles(int keys, int most) const { return smaller(larger(keys, 0) / size, most); }
  LONGATTN_HD int before(int key) const {
    return whole_tiles(key - sink_begin, sink_tiles) + whole_tiles(key - band_begin, band_tiles);
  }
};

// The queries that a tile of keys meets: `band`, whose queries may see any of its keys, and behind it `sinks`, whose
// queries see just its sink keys. Queries in `common` see all of its keys.
struct QuerySpan {
  Range band, sinks, common;
};

// A document's queries, and those of its keys that are sinks.
struct Document {
  Range queries, sinks;
};

// What the rows of a batch share. Pointers lie in the memory of whoever asks: device memory in a kernel.
struct Rows {
  int num_queries, num_keys;
  int64_t query_start, key_start;  // positions of the first query and key
  int64_t sinks;                   // at most kFar
  const int32_t* cu_seqlens;       // [num_documents + 1] or null
  int num_documents;
  const int32_t* kv_start;  // [B] or null
  const int32_t* kv_end;    // [B] or null
};

// One row of the batch under the band of one head.
struct RowBand {
  Band band;
  Rows rows;
  int64_t offset;       // position of query 0
  int64_t start, stop;  // positions of the row's real keys; of all documents, where they are packed

  LONGATTN_HD RowBand(const Band& head_band, const Rows& all, int batch) : band(head_band), rows(all) {
    offset = rows.query_start;
    start = 0;
    stop = rows.key_start + rows.num_keys;
    if (rows.cu_seqlens) {
      start = rows.cu_seqlens[0];
      stop = rows.cu_seqlens[rows.num_documents];
    }
    if (rows.kv_start) start = larger<int64_t>(rows.kv_start[batch], 0);
    if (rows.kv_end) {
      stop = smaller<int64_t>(larger<int64_t>(rows.kv_end[batch], 0), rows.num_keys);
      offset = stop - rows.num_queries;
    }
  }

  // The keys that a query sees.
  LONGATTN_HD VisibleKeys keys(int query) const {
    const int64_t p = query + offset;
    const Span span = span_of(p);
    if (p < span.start || (rows.cu_seqlens && p >= span.stop)) {  // before the first real token, or in no document
      const int at = key_index(p < span.start ? smaller(span.start, span.stop) : span.stop);
      return {{at, at}, {at, at}};
    }
    const int end = key_index(smaller(span.start + band.hi(p - span.start) + 1, span.stop));
    const int begin = smaller(end, key_index(larger(span.start + band.lo(p - span.start), span.start)));
    const int sink_end = smaller(begin, key_index(span.start + rows.sinks));
    return {{smaller(key_index(span.start), sink_end), sink_end}, {begin, end}};
  }

  // The queries that see a key. Of neighbouring keys no range of the band begins or ends before the other's.
  LONGATTN_HD VisibleQueries queries(int key) const {
    const int64_t j = key + rows.key_start, real = larger(smaller(j, stop - 1), start);
    if (stop <= start) return {{0, 0}, {0, 0}};
    const Span span = span_of(real);
    const int begin = query_index(first_query(span, real));
    const int band_end = larger(begin, query_index(last_query(span, band_reach(span, real))));
    const int end = real - span.start < rows.sinks ? larger(band_end, query_index(last_query(span, kFar))) : band_end;
    if (j < real) return {{begin, begin}, {begin, begin}};
    if (j > real || key >= rows.num_keys) return {{band_end, band_end}, {band_end, band_end}};
    return {{begin, band_end}, {band_end, end}};
  }

  // The document of a position, or the row where none are packed; the nearest one of a position in none.
  LONGATTN_HD Document document_at(int64_t position) const {
    const Span span = span_of(position);
    const int end = rows.cu_seqlens ? query_index(span.stop) : rows.num_queries;
    const int sink_end = key_index(smaller(span.start + rows.sinks, larger(span.start, span.stop)));
    return {{smaller(query_index(span.start), end), end}, {smaller(key_index(span.start), sink_end), sink_end}};
  }

  // The tiles of `size` keys that the queries [from, to) visit; from < to <= num_queries.
  LONGATTN_HD KeyTiles key_tiles(int from, int to, int size) const {
    return tiles_of(keys(from), keys(to - 1), rows.sinks > 0, size);
  }

  // The queries that the keys [from, to) meet; from < num_keys.
  LONGATTN_HD QuerySpan query_span(int from, int to) const {
    const int64_t a = larger(from + rows.key_start, start);
    const int64_t b = smaller(smaller(to, rows.num_keys) + rows.key_start, stop) - 1;
    if (b < a) return {{0, 0}, {0, 0}, {0, 0}};
    const Span first = span_of(a), last = span_of(b);
    const int begin = query_index(first_query(first, a));
    const int end = larger(begin, query_index(last_query(last, band_reach(last, b))));
    // Documents before the last end among these keys, so that all of their queries are in the range above.
    const bool holds_sinks = last.start + rows.sinks > larger(a, last.start);
    const int sink_end = holds_sinks ? larger(end, query_index(last_query(last, kFar))) : end;
    QuerySpan span{{begin, end}, {end, sink_end}, {0, 0}};
    if (a == from + rows.key_start && b + 1 == to + rows.key_start)
      span.common = {query_index(first_query(last, b)), query_index(last_query(first, band_reach(first, a)))};
    return span;
  }

  // As key_tiles, from what the first and the last query see. Heads that share a tile join theirs before.
  LONGATTN_HD static KeyTiles tiles_of(const VisibleKeys& first, const VisibleKeys& last, bool sinks, int size) {
    const Range hull{first.band.begin, larger(first.band.begin, last.band.end)};
    const Range before = sinks ? first.sinks : Range{hull.begin, hull.begin};
    KeyTiles tiles{before.begin, 0, hull.begin, 0, {last.band.begin, first.band.end}, size};
    tiles.band_tiles = tiles_in(hull, size);
    tiles.sink_tiles = tiles_in(before, size);
    const Range joined{before.begin, hull.end};
    if (!before.empty() && !hull.empty() && tiles_in(joined, size) <= tiles.count()) {
      tiles.band_begin = joined.begin;
      tiles.band_tiles = tiles_in(joined, size);
      tiles.sink_tiles = 0;
    }
    return tiles;
  }

 private:
  struct Span {
    int64_t start, stop;
  };

  LONGATTN_HD static int tiles_in(const Range& range, int size) {
    return range.empty() ? 0 : (range.end - range.begin + size - 1) / size;
  }

  LONGATTN_HD static int index(int64_t i, int size) {
    return static_cast<int>(larger(int64_t{0}, smaller(i, int64_t{size})));
  }
  LONGATTN_HD int key_index(int64_t position) const { return index(position - rows.key_start, rows.num_keys); }
  LONGATTN_HD int query_index(int64_t position) const { return index(position - offset, rows.num_queries); }

  // The document of a position (the nearest one where it is in none), or the row.
  LONGATTN_HD Span span_of(int64_t position) const {
    if (!rows.cu_seqlens || rows.num_documents == 0) return {start, stop};
    const int document = document_of(rows.cu_seqlens, rows.num_documents, position);
    return {rows.cu_seqlens[document], rows.cu_seqlens[document + 1]};
  }

  LONGATTN_HD int64_t first_query(const Span& span, int64_t key) const {
    return larger(span.start + band.query_lo(key - span.start), span.start);
  }
  LONGATTN_HD int64_t band_reach(const Span& span, int64_t key) const {
    return span.start + band.query_hi(key - span.start);
  }
  // One behind the last query at or before position p; documents end where they end.
  LONGATTN_HD int64_t last_query(const Span& span, int64_t p) const {
    return rows.cu_seqlens ? smaller(p + 1, span.stop) : p + 1;
  }
};

}  // namespace longattn
