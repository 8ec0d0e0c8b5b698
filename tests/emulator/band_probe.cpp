// What csrc/band.h answers for one row of a batch and one head, written out pair by pair: for test_emulated_band.py.
#include <algorithm>

#include "band.h"

using namespace longattn;

namespace {

Band make_band(const int64_t* ends) {  // {0, left, right} or {size, shift, causal}
  return ends[0] == 0 ? window_band(ends[1], ends[2]) : group_band(ends[0], ends[1], ends[2] != 0);
}

bool inside(const Range& range, int size) { return 0 <= range.begin && range.begin <= range.end && range.end <= size; }

}  // namespace

// Every table is [num_queries, num_keys]. Returns how many ranges were malformed or reached outside.
extern "C" int band_probe(const int64_t* ends, const Rows* rows, int batch, bool ordered, int tile_queries,
                          int tile_keys, uint8_t* seen_by_query, uint8_t* seen_by_key, int32_t* visits,
                          uint8_t* interior, int32_t* meetings, uint8_t* common, int32_t* tile_count) {
  const RowBand row(make_band(ends), *rows, batch);
  const int num_queries = rows->num_queries, num_keys = rows->num_keys;
  const auto at = [&](int query, int key) { return static_cast<int64_t>(query) * num_keys + key; };
  int bad = 0;
  *tile_count = 0;
  for (int i = 0; i < num_queries; ++i) {
    const VisibleKeys keys = row.keys(i);
    bad += !inside(keys.sinks, num_keys) || !inside(keys.band, num_keys) || keys.sinks.end > keys.band.begin;
    for (int j = 0; j < num_keys; ++j) {
      seen_by_query[at(i, j)] = keys.sees(j);
      for (const int before : {0, 5, 31}) bad += keys.sees(j) != (keys.bits(j - before) >> before & 1);
    }
  }
  for (int j = 0; j < num_keys; ++j) {
    const VisibleQueries queries = row.queries(j), after = row.queries(std::min(j + 1, num_keys - 1));
    bad += !inside(queries.band, num_queries) || !inside(queries.sinks, num_queries);
    bad += queries.band.end != queries.sinks.begin;
    if (ordered) bad += queries.band.begin > after.band.begin || queries.band.end > after.band.end;
    for (int i = 0; i < num_queries; ++i) {
      seen_by_key[at(i, j)] = queries.seen_by(i);
      if (ordered) bad += queries.sinks.holds(i) != row.keys(i).sinks.holds(j);
    }
  }
  for (int from = 0; from < num_queries; from += tile_queries) {
    const int to = std::min(from + tile_queries, num_queries);
    const KeyTiles tiles = row.key_tiles(from, to, tile_keys);
    *tile_count += tiles.count();
    for (int t = 0; t < tiles.count(); ++t) {
      const int begin = tiles.begin(t), end = begin + tile_keys;
      bad += begin < 0 || begin >= num_keys || (tiles.interior(t) && end > num_keys);
      for (int i = from; i < to; ++i)
        for (int j = begin; j < std::min(end, num_keys); ++j) {
          visits[at(i, j)] += 1;
          interior[at(i, j)] |= tiles.interior(t);
        }
    }
  }
  for (int from = 0; from < num_keys; from += tile_keys) {
    const QuerySpan span = row.query_span(from, from + tile_keys);
    bad += !inside(span.band, num_queries) || !inside(span.sinks, num_queries);
    bad += from + tile_keys > num_keys && !span.common.empty();
    for (int j = from; j < std::min(from + tile_keys, num_keys); ++j)
      for (int i = 0; i < num_queries; ++i) {
        meetings[at(i, j)] += span.band.holds(i) + span.sinks.holds(i);
        common[at(i, j)] |= span.common.begin <= i && i < span.common.end;
      }
  }
  return bad;
}

// The visits and interior tiles of a tile that several heads share, one shift each. Returns malformed tiles.
extern "C" int shared_tile_probe(int64_t size, bool causal, const int64_t* shifts, int num_heads, const Rows* rows,
                                 int from, int to, int tile_keys, int32_t* visits, uint8_t* interior) {
  VisibleKeys first{}, last{};
  for (int h = 0; h < num_heads; ++h) {
    const RowBand row(group_band(size, shifts[h], causal), *rows, 0);
    first = h ? join_first(first, row.keys(from)) : row.keys(from);
    last = h ? join_last(last, row.keys(to - 1)) : row.keys(to - 1);
  }
  const KeyTiles tiles = RowBand::tiles_of(first, last, rows->sinks > 0, tile_keys);
  int bad = 0;
  for (int t = 0; t < tiles.count(); ++t) {
    const int begin = tiles.begin(t);
    bad += begin < 0 || begin >= rows->num_keys || (tiles.interior(t) && begin + tile_keys > rows->num_keys);
    for (int j = begin; j < std::min(begin + tile_keys, rows->num_keys); ++j) {
      visits[j] += 1;
      interior[j] |= tiles.interior(t);
    }
  }
  return bad;
}
