// Which queries the keys of a block meet, in the pass for dK and dV of every family of kernels.
//
// Keys that hold sinks meet every later query of their row or document. Queries are cut into chunks of kSinkChunk. What
// those of a chunk add to the sinks of the document that its first query is in, beyond the band, is formed by blocks of
// their own (kSinks), as sums in scratch: one document a chunk, whatever the documents are. The sums are added in the
// order of the chunks and reach the block of the keys, which walks by itself the queries before the document's first
// chunk, fewer than kSinkChunk of them.
#pragma once

#include "window_attn_logits.cuh"

namespace longattn::cuda {

// Which keys and queries a block takes.
struct KeyPassPlace {
  int batch, kv_head, first_key, chunk;  // chunk of queries, where sinks are summed
};

// The first chunk whose first query is in a document; whether it is one of the document's is for the caller to see.
__device__ __forceinline__ int first_chunk(const Document& document) {
  return (document.queries.begin + kSinkChunk - 1) / kSinkChunk;
}

__device__ __forceinline__ Document document_of_chunk(const RowBand& band, int chunk) {
  const Document document = band.document_at(chunk * kSinkChunk + band.offset);
  return document.queries.holds(chunk * kSinkChunk) ? document : Document{{0, 0}, {0, 0}};
}

// The queries of one head that meet the block's keys. Sink keys are tiled from their document's first one on.
template <int kRows, bool kSinks>
struct KeyPassBand {
  const AttentionParams& p;
  KeyPassPlace place;
  Range sinks{0, 0};  // of the chunk's document

  __device__ __forceinline__ KeyPassBand(const AttentionParams& p, const KeyPassPlace& at) : p(p), place(at) {
    if (!kSinks || p.rows.sinks == 0) return;
    sinks = document_of_chunk(row_band(p, place.batch, 0), place.chunk).sinks;
    place.first_key += sinks.begin;
  }
  // Whether no row of keys begins or ends before the one above: sinks that this block walks are not ordered.
  __device__ __forceinline__ bool is_ordered() const {
    if (kSinks || p.rows.sinks == 0) return true;
    const RowBand band = row_band(p, place.batch, 0);  // the documents are those of every head
    const int end = smaller(place.first_key + kRows, p.rows.num_keys);
    bool ordered = true;
    for (const int key : {place.first_key, end - 1}) {
      const Document document = band.document_at(key + p.rows.key_start);
      ordered &= first_chunk(document) == 0 || !document.sinks.meets(place.first_key, end);
    }
    return ordered;
  }
  // One behind the last query that the block of a key walks of those that see it as a sink alone.
  __device__ __forceinline__ int walked_end(const RowBand& band, int key, const Range& seen_as_sink) const {
    if (seen_as_sink.empty()) return seen_as_sink.begin;
    const Document document = band.document_at(key + p.rows.key_start);
    return larger(seen_as_sink.begin, smaller(seen_as_sink.end, first_chunk(document) * kSinkChunk));
  }
  __device__ __forceinline__ Range queries_of(const RowBand& band, int key) const {
    const VisibleQueries queries = band.queries(smaller(key, p.rows.num_keys));
    if (kSinks) {
      const Range chunk{place.chunk * kSinkChunk, (place.chunk + 1) * kSinkChunk};
      const int begin = larger(queries.sinks.begin, chunk.begin);
      if (key >= sinks.end) return {chunk.end, chunk.end};  // none, behind all others
      return {begin, larger(begin, smaller(queries.sinks.end, chunk.end))};
    }
    return {queries.band.begin, walked_end(band, key, queries.sinks)};
  }
  // The queries to walk.
  __device__ __forceinline__ Range span(const RowBand& band) const {
    const int first = place.first_key, end = first + kRows;
    if (kSinks) {
      const int last = smaller(end, sinks.end) - 1;
      if (last < first) return {0, 0};
      return {queries_of(band, first).begin, queries_of(band, last).end};
    }
    const QuerySpan span = band.query_span(first, end);
    return {span.band.begin, walked_end(band, smaller(end, p.rows.num_keys) - 1, span.sinks)};
  }
  // Where the sums of a row's key lie in scratch: {chunk, sink}, {-1, 0} where it has none.
  __device__ __forceinline__ Range sums_of(int key) const {
    if (kSinks) return sinks.holds(key) ? Range{place.chunk, key - sinks.begin} : Range{-1, 0};
    const Document document = row_band(p, place.batch, 0).document_at(key + p.rows.key_start);
    const int chunk = first_chunk(document);
    if (!document.sinks.holds(key) || !document.queries.holds(chunk * kSinkChunk)) return {-1, 0};
    return {chunk, key - document.sinks.begin};
  }
};

}  // namespace longattn::cuda
