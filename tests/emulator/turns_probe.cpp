// Plays the turns of csrc/window_attn_bwd_turns.h for one row of a batch and one head: for test_emulated_turns.py.
#include <cstddef>
#include <vector>

#include "window_attn_bwd_turns.h"

using namespace longattn;

namespace {

struct Tile {  // of queries
  int mark = 0, begun = 0, done = 0, cleared = 0;
  std::vector<int> added;
};

struct Walk {  // of one block: its tiles of keys in the order in which it gets them
  std::vector<int> tiles;
  std::size_t which = 0;
  int at = -1;
};

}  // namespace

// Returns 0, or what is wrong: 1 a deadlock, 2 not one first and one last turn, 4 turns out of order or left out, 8
// queries that see a key but have no turn with its tile, 16 a tile of queries that is not cleared although nobody adds
// to it, or is although somebody does, 32 a range outside of the tiles.
extern "C" int turns_probe(const int64_t* ends, const Rows* rows, int batch, int size, int bits, int blocks) {
  const RowBand band(ends[0] == 0 ? window_band(ends[1], ends[2]) : group_band(ends[0], ends[1], ends[2] != 0), *rows,
                     batch);
  const int tiles = (rows->num_keys + size - 1) / size, query_tiles = (rows->num_queries + (1 << bits) - 1) >> bits;
  std::vector<KeyTurns> turns;
  int wrong = 0;
  for (int j = 0; j < tiles; ++j) {
    const auto met = [&](int tile) { return query_tiles_of_tile(band, tile, tiles, size, bits, query_tiles); };
    turns.push_back({j, met(j), met(j + 1), met(j - 1)});
    const Range own = turns[j].own;
    if (own.begin < 0 || own.end < own.begin || own.end > query_tiles) return 32;
  }
  std::vector<Tile> of_queries(query_tiles);
  std::vector<Walk> walks(blocks);
  for (int tile = tiles - 1; tile >= 0; --tile) walks[(tiles - 1 - tile) % blocks].tiles.push_back(tile);
  for (bool progress = true; progress;) {
    progress = false;
    for (Walk& walk : walks)
      while (walk.which < walk.tiles.size()) {
        const KeyTurns& turn = turns[walk.tiles[walk.which]];
        if (walk.at < turn.own.begin) walk.at = turn.own.begin;
        if (walk.at == turn.own.end) {
          ++walk.which;
          walk.at = -1;
          continue;
        }
        Tile& tile = of_queries[walk.at];
        const bool first = turn.is_first(walk.at), last = turn.is_last(walk.at);
        if (!first && tile.mark != turn.mark_before()) break;
        tile.begun += first;
        tile.done += last;
        tile.added.push_back(turn.tile);
        if (!last) tile.mark = turn.mark();
        ++walk.at;
        progress = true;
      }
  }
  for (const Walk& walk : walks)
    if (walk.which < walk.tiles.size()) return 1;
  for (const KeyTurns& turn : turns)
    for (const Range& unmet : {turn.unmet_before(), turn.unmet_behind()})
      for (int i = unmet.begin; i < unmet.end; ++i) ++of_queries[i].cleared;
  for (int i = 0; i < query_tiles; ++i) {
    const Tile& tile = of_queries[i];
    const bool met = !tile.added.empty();
    if (tile.begun != met || tile.done != met) wrong |= 2;
    for (std::size_t k = 1; k < tile.added.size(); ++k)
      if (tile.added[k] != tile.added[k - 1] - 1) wrong |= 4;
    if (tile.cleared != !met) wrong |= 16;
    for (int query = i << bits; query < (i + 1) << bits && query < rows->num_queries; ++query) {
      const Range keys = band.keys(query).band;
      for (int key = keys.begin; key < keys.end; ++key)
        if (!turns[key / size].own.holds(i)) wrong |= 8;
    }
  }
  return wrong;
}
