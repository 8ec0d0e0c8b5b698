// Runs an attention kernel in the emulator: reads a case, as tests/emulator/attention.py writes it, runs the launcher
// and writes its outputs and counters. A program of its own, so that the sanitizers watch it from the start.
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#ifdef DRIVER_D  // one kernel alone, for builds that take long
#include "window_attn_fwd.cuh"
#else
#include "window_attn_fwd.cu"
#endif

using namespace longattn;
using namespace longattn::cuda;

namespace {

// Buffers of exactly the given size on the heap, where the address sanitizer sees their ends.
struct Buffers {
  std::ifstream& in;
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<std::pair<char*, int64_t>> written;

  template <typename T>
  void read(T*& pointer, bool output = false) {
    int64_t bytes = 0;
    in.read(reinterpret_cast<char*>(&bytes), sizeof(bytes));
    pointer = nullptr;
    if (bytes < 0) return;
    memory.push_back(std::make_unique<char[]>(bytes));
    in.read(memory.back().get(), bytes);
    pointer = reinterpret_cast<T*>(memory.back().get());
    if (output) written.emplace_back(memory.back().get(), bytes);
  }
};

cudaError_t forward(const AttentionParams& p) {
#ifdef DRIVER_D
  return launch_forward<ForwardTraits<simt::Bf16, DRIVER_D, 64, 2, 1>>(p, nullptr);
#else
  return window_attn_forward(p, nullptr);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::ifstream in(argv[1], std::ios::binary);
  simt::schedule_seed = static_cast<unsigned>(std::stoul(argv[3]));
  AttentionParams p;
  in.read(reinterpret_cast<char*>(&p), sizeof(p));
  Buffers buffers{in, {}, {}};
  buffers.read(p.query.data);
  buffers.read(p.key.data);
  buffers.read(p.value.data);
  buffers.read(p.out.data, true);
  buffers.read(p.lse, true);
  buffers.read(p.sink_logits);
  buffers.read(p.rows.cu_seqlens);
  buffers.read(p.rows.kv_start);
  buffers.read(p.rows.kv_end);
  const cudaError_t error = forward(p);
  std::ofstream out(argv[2], std::ios::binary);
  for (const auto& [data, bytes] : buffers.written) out.write(data, bytes);
  const simt::Counters& c = simt::counters;
  printf(
      "{\"error\": %d, \"mma\": %ld, \"ldmatrix\": %ld, \"bank_conflicts\": %ld, \"bytes_read\": %ld, "
      "\"bytes_written\": %ld}\n",
      error, static_cast<long>(c.mma), static_cast<long>(c.ldmatrix), static_cast<long>(c.bank_conflicts),
      static_cast<long>(c.bytes_read), static_cast<long>(c.bytes_written));
  return 0;
}
