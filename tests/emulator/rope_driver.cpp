// Runs the CUDA rotary kernel in the emulator on buffers of exactly their size, for the sanitizers to watch: every
// element type and layout, rows that 16 bytes fit and that they don't, tables, positions and packed documents.
#include <cmath>
#include <string>
#include <vector>

#include "rope.cu"

using namespace longattn::cuda;

namespace {

struct Shape {
  int64_t head_dim, half;
};

void run(RopeElement element, bool interleaved, const Shape& shape, int phases) {
  constexpr int64_t kTokens = 7, kHeads[2] = {5, 2};
  const int64_t bytes = element == RopeElement::kFloat32 ? 4 : 2, batch = phases == 2 ? 1 : 2;
  RopeParams p{};
  std::vector<std::vector<char>> memory;
  for (int which = 0; which < 2; ++which) {
    const int64_t heads = kHeads[which], size = batch * heads * kTokens * shape.head_dim * bytes;
    const int64_t strides[3] = {heads * kTokens * shape.head_dim, shape.head_dim, heads * shape.head_dim};
    RopeTensor& t = p.tensors[which];
    memory.emplace_back(size, 0);
    t.x = memory.back().data();
    memory.emplace_back(size, 0);
    t.out = memory.back().data();
    t.heads = heads;
    for (int i = 0; i < 3; ++i) t.x_stride[i] = t.out_stride[i] = strides[i];
  }
  std::vector<float> table(kTokens * shape.half, 0.5f);
  std::vector<double> inv_freq(shape.half, 0.1);
  std::vector<int64_t> positions(batch * kTokens, 10'000'000);
  const std::vector<int32_t> documents = {0, 3, 3, -5, 1 << 30, static_cast<int32_t>(kTokens)};
  p.batch = batch;
  p.tokens = kTokens;
  p.head_dim = shape.head_dim;
  p.half = shape.half;
  p.element = element;
  p.interleaved = interleaved;
  if (phases == 0) {
    p.cos = p.sin = table.data();
    p.cos_stride[1] = p.sin_stride[1] = shape.half;
  } else {
    p.phases.inv_freq = inv_freq.data();
    p.phases.scaling = 1.0f;
    if (phases == 1) {
      p.phases.positions = positions.data();
      p.phases.position_stride[0] = kTokens;
      p.phases.position_stride[1] = 1;
    } else {
      p.phases.cu_seqlens = documents.data();
      p.phases.num_documents = static_cast<int>(documents.size()) - 1;
    }
  }
  if (rope_forward(p, nullptr) != cudaSuccess) simt::fail("rope_forward");
}

}  // namespace

int main(int, char** argv) {
  simt::schedule_seed = static_cast<unsigned>(std::stoul(argv[1]));
  for (const RopeElement element : {RopeElement::kFloat32, RopeElement::kBFloat16, RopeElement::kFloat16})
    for (const bool interleaved : {false, true})
      for (const Shape& shape : {Shape{64, 32}, Shape{96, 16}, Shape{34, 17}, Shape{10, 3}, Shape{1100, 512}})
        for (const int phases : {0, 1, 2}) run(element, interleaved, shape, phases);
  return 0;
}
