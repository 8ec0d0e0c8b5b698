// Runs an attention kernel in the emulator: reads a case, as tests/emulator/attention.py writes it, runs the launcher
// and writes its outputs and counters. A program of its own, so that the sanitizers watch it from the start.
#include <algorithm>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#ifdef LONGATTN_DRIVE_SM90  // 1: the forward alone
#include "window_attn_fwd_sm90.cu"
#if LONGATTN_DRIVE_SM90 == 2
#include "window_attn_bwd.cu"
#include "window_attn_bwd_single_sm90.cu"
#include "window_attn_bwd_sm90.cu"
#endif
#else
#include "window_attn_bwd.cu"
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

  // NaNs, as freshly allocated memory may hold.
  void* scratch(int64_t bytes) {
    memory.push_back(std::make_unique<char[]>(bytes));
    std::fill_n(memory.back().get(), bytes, '\xff');
    return memory.back().get();
  }
};

void read_forward(Buffers& buffers, AttentionParams& p, bool output) {
  buffers.read(p.query.data);
  buffers.read(p.key.data);
  buffers.read(p.value.data);
  buffers.read(p.out.data, output);
  buffers.read(p.lse, output);
  buffers.read(p.sink_logits);
  buffers.read(p.rows.cu_seqlens);
  buffers.read(p.rows.kv_start);
  buffers.read(p.rows.kv_end);
}

ForwardPlan plan{};  // of a forward

cudaError_t forward(std::ifstream& in, Buffers& buffers) {
  AttentionParams p;
  in.read(reinterpret_cast<char*>(&p), sizeof(p));
  read_forward(buffers, p, true);
#ifdef LONGATTN_DRIVE_SM90
  return window_attn_forward_sm90(p, nullptr);
#else
  const cudaError_t error = plan_forward(p, plan);
  if (error != cudaSuccess) return error;
  return window_attn_forward(p, plan, buffers.scratch(plan.scratch_bytes), nullptr);
#endif
}

cudaError_t only_plan([[maybe_unused]] std::ifstream& in) {
#ifdef LONGATTN_DRIVE_SM90
  return cudaErrorInvalidValue;
#else
  AttentionParams p;
  in.read(reinterpret_cast<char*>(&p), sizeof(p));
  return plan_forward(p, plan);
#endif
}

#if defined(LONGATTN_DRIVE_SM90) && LONGATTN_DRIVE_SM90 == 1
cudaError_t backward(std::ifstream&, Buffers&) { return cudaErrorInvalidValue; }
#else
cudaError_t backward(std::ifstream& in, Buffers& buffers) {
  BackwardParams b;
  in.read(reinterpret_cast<char*>(&b), sizeof(b));
  read_forward(buffers, b.forward, false);
  buffers.read(b.grad_out.data);
  buffers.read(b.grad_lse);
  buffers.read(b.grad_query.data, true);
  buffers.read(b.grad_key.data, true);
  buffers.read(b.grad_value.data, true);
  buffers.read(b.grad_sink_logits, true);
  const BackwardScratch scratch = backward_scratch(b.forward);
  b.sink_keys = scratch.sink_keys;
  b.sink_chunks = scratch.sink_chunks;
  b.stats = static_cast<RowStats*>(buffers.scratch(scratch.stats_bytes));
  b.sink_sums = static_cast<float*>(buffers.scratch(scratch.sink_sums_bytes));
#ifdef LONGATTN_DRIVE_SM90
  if (const SinglePassScratch single = single_pass_scratch(b); single.sums_bytes > 0) {
    b.query_sums = static_cast<float*>(buffers.scratch(single.sums_bytes));
    b.query_flags = static_cast<int32_t*>(buffers.scratch(single.flags_bytes));
    std::fill_n(reinterpret_cast<char*>(b.query_flags), single.flags_bytes, '\0');
  }
  return window_attn_backward_sm90(b, nullptr);
#else
  return window_attn_backward(b, nullptr);
#endif
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  std::ifstream in(argv[2], std::ios::binary);
  simt::schedule_seed = static_cast<unsigned>(std::stoul(argv[4]));
  simt::multiprocessors = std::stoi(argv[5]);
  Buffers buffers{in, {}, {}};
  const std::string which = argv[1];
  const cudaError_t error = which == "backward"  ? backward(in, buffers)
                            : which == "forward" ? forward(in, buffers)
                                                 : only_plan(in);
  std::ofstream out(argv[3], std::ios::binary);
  for (const auto& [data, bytes] : buffers.written) out.write(data, bytes);
  const simt::Counters& c = simt::counters;
  const std::pair<const char*, int64_t> facts[] = {
      {"error", error},
      {"mma", c.mma},
      {"most_mma", c.most_mma},
      {"ldmatrix", c.ldmatrix},
      {"bank_conflicts", c.bank_conflicts},
      {"bytes_read", c.bytes_read},
      {"bytes_written", c.bytes_written},
      {"splits", plan.splits},
      {"scratch", plan.scratch_bytes},
  };
  const char* separator = "{";
  for (const auto& [name, value] : facts) {
    printf("%s\"%s\": %ld", separator, name, static_cast<long>(value));
    separator = ", ";
  }
  printf("}\n");
  return 0;
}
