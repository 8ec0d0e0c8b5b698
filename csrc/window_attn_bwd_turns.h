// In which order tiles of keys add to the gradient of a tile of queries, where one pass of the backward forms them all.
//
// The tiles of keys that meet a tile of queries are neighbours, as neither the first nor the last query of a key comes
// before that of the key before it. They take turns from the last key to the first. Walks of queries ascend, so that
// neighbours that start together come by in this order anyway, as many tiles of queries apart as a tile of keys is
// long. Who has the first turn and who the last follows from what the two neighbours meet. Tiles of queries lie on a
// grid that all tiles of keys share; one that merely touches the place where an empty span lies counts as met, so that
// no turn is left out between two others.
#pragma once

#include "band.h"

namespace longattn {

// The tiles of 2^bits queries that the keys [first, first + size) meet; first < num_keys.
LONGATTN_HD Range query_tiles_of_keys(const RowBand& band, int first, int size, int bits) {
  const int last = smaller(first + size, band.rows.num_keys) - 1;
  const int begin = band.queries(first).band.begin >> bits;
  return {begin, larger(begin, (band.queries(last).band.end + (1 << bits) - 1) >> bits)};
}

struct KeyTurns {
  int tile;                   // of keys
  Range own, later, earlier;  // tiles of queries that it meets, and those that its neighbours do

  // Sums of a tile of queries are begun, or done.
  LONGATTN_HD bool is_first(int query_tile) const { return !later.holds(query_tile); }
  LONGATTN_HD bool is_last(int query_tile) const { return !earlier.holds(query_tile); }
  // What is left behind each turn, never 0: what has been added is known by it.
  LONGATTN_HD int mark() const { return tile + 1; }
  LONGATTN_HD int mark_before() const { return tile + 2; }
  // Tiles of queries without any key: those between two spans belong to the earlier one, those before all to the first.
  LONGATTN_HD Range unmet_before() const { return {0, tile == 0 ? own.begin : 0}; }
  LONGATTN_HD Range unmet_behind() const { return {own.end, later.begin}; }
};

// What a tile's neighbours meet where there are none: nothing, before all or behind all.
LONGATTN_HD Range query_tiles_of_tile(const RowBand& band, int tile, int tiles, int size, int bits, int query_tiles) {
  if (tile < 0) return {0, 0};
  if (tile >= tiles) return {query_tiles, query_tiles};
  return query_tiles_of_keys(band, tile * size, size, bits);
}

}  // namespace longattn
