// How attention is cut into tasks, from shapes alone, so that the bits do not depend on the number of threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "attention.h"

namespace longattn::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Runs task(0 .. count - 1), each once, on torch's threads: whoever is free takes the next one, so that tasks of
// unequal length balance. `work` is a task's multiply-adds, roughly: a few small ones are not worth waking threads for.
template <class Job>
bool run_tasks(Job& job, int64_t count, ParallelFor parallel_for, int64_t work) {
  constexpr int64_t kLeastWork = 1 << 17;
  struct Context {
    Job& job;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<bool> ok{true};
  } context{job, count};
  parallel_for(
      count, work * count < kLeastWork ? count : 1,
      [](int64_t, int64_t, void* opaque) {
        Context& shared = *static_cast<Context*>(opaque);
        int64_t task = shared.next.fetch_add(1);
        if (task >= shared.count) return;
        [[maybe_unused]] const typename Job::Session session;
        typename Job::Memory memory(shared.job);
        if (!memory.ok()) {
          shared.ok = false;
          return;
        }
        for (; task < shared.count; task = shared.next.fetch_add(1)) shared.job.task(task, memory);
      },
      &context);
  return context.ok;
}

// Query rows in chunks, and the query heads that share a KV head in parts: enough tasks to balance, each long enough
// that packing its keys costs little beside using them.
struct Partition {
  int64_t rows;    // query rows of a chunk, a multiple of the tile's
  int64_t chunks;  // of a row of the batch
  int heads;       // query heads of a part
  int parts;       // of a KV head
  int64_t tasks;

  static constexpr int64_t kEnough = 64;  // tasks

  Partition(const AttentionParams& p, int64_t tile_rows, int64_t wanted_rows) {
    const int group = p.heads / p.kv_heads;
    const int64_t queries = p.rows.num_queries;
    rows = round_up(wanted_rows, tile_rows);
    const int64_t whole = int64_t{p.batch} * p.kv_heads * divide_up(queries, rows);
    parts = static_cast<int>(smaller<int64_t>(group, divide_up(kEnough, whole)));
    heads = static_cast<int>(divide_up(group, parts));
    parts = static_cast<int>(divide_up(group, heads));
    const int64_t sets = int64_t{p.batch} * p.kv_heads * parts;
    if (sets * divide_up(queries, rows) < kEnough)
      rows = larger(4 * tile_rows, smaller(rows, round_up(divide_up(queries * sets, kEnough), tile_rows)));
    chunks = divide_up(queries, rows);
    tasks = sets * chunks;
  }
};

}  // namespace longattn::cpu
