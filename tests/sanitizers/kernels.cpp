// Every compiled CPU kernel over random shapes, patterns and options, for a sanitizer to watch: tensors are blocks of
// their own of exactly their size, and several threads take the tasks. Results are what pytest checks; here they only
// have to be finite, and equal to those of one thread. Usage: kernels SEEDS. LONGATTN_CPU_ISA caps the instruction set.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/attention.h"
#include "../../csrc/cpu/rope.h"

using namespace longattn;
using namespace longattn::cpu;

namespace {

int num_threads = 1;

void threads_for(int64_t end, int64_t grain, RangeBody body, void* context) {
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(num_threads, end / std::max<int64_t>(grain, 1)));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i)
    threads.emplace_back([=] { body(end * i / count, end * (i + 1) / count, context); });
  for (std::thread& thread : threads) thread.join();
}

uint16_t narrow(float x, Element element) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (element == Element::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t exponent = (bits >> 23 & 0xff) - 112;  // of a number in half precision's normal range, or 0
  return exponent >= 31 ? 0 : static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
}

struct Memory {
  std::vector<char> bytes;
  Memory(int64_t count, Element element, std::mt19937* random) {
    const int64_t size = element == Element::kFloat32 ? 4 : 2;
    bytes.resize(count * size);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; random && i < count; ++i) {
      const float x = normal(*random);
      const uint16_t low = narrow(x, element);
      std::memcpy(&bytes[i * size], size == 4 ? static_cast<const void*>(&x) : &low, size);
    }
  }
};

struct Shape {
  int batch, heads, kv_heads, queries, keys, dim;
  bool token_major;
  Element element;

  int64_t count(int of_heads, int tokens) const { return int64_t{batch} * of_heads * tokens * dim; }
  Tensor4 tensor(Memory& memory, int of_heads, int tokens) const {
    const int64_t batch_stride = int64_t{of_heads} * tokens * dim;
    if (token_major) return {memory.bytes.data(), batch_stride, dim, int64_t{of_heads} * dim};
    return {memory.bytes.data(), batch_stride, int64_t{tokens} * dim, dim};
  }
};

bool finite(const std::vector<float>& values) {
  for (const float x : values)
    if (std::isnan(x)) return false;
  return true;
}

// One forward and backward; the bytes of all results.
std::vector<char> attend(unsigned seed) {
  std::mt19937 random(seed);
  const auto choose = [&](auto... of) {
    const int values[] = {of...};
    return values[random() % sizeof...(of)];
  };
  const int kv_heads = choose(1, 2), group = choose(1, 1, 3, 5), keys = choose(1, 7, 33, 64, 97, 300, 700);
  const bool decode = random() % 3 == 0;
  const Shape s{choose(1, 2),
                kv_heads * group,
                kv_heads,
                decode ? 1 : keys,
                keys,
                choose(8, 40, 64, 72, 128, 256),
                random() % 2 == 0,
                static_cast<Element>(random() % 3)};
  Memory query(s.count(s.heads, s.queries), s.element, &random), grad(s.count(s.heads, s.queries), s.element, &random);
  Memory key(s.count(kv_heads, keys), s.element, &random), value(s.count(kv_heads, keys), s.element, &random);
  Memory out(s.count(s.heads, s.queries), s.element, nullptr), grad_query = out;
  Memory grad_key(s.count(kv_heads, keys), s.element, nullptr), grad_value = grad_key;
  std::vector<float> lse(int64_t{s.batch} * s.heads * s.queries), sinks(s.heads, 0.25f), grad_sinks(s.heads);
  std::vector<float> grad_lse(lse.size(), 0.5f);
  std::vector<Band> bands;
  const int size = choose(1, 17, 64, 200), pattern = choose(0, 1, 2);
  for (int h = 0; h < s.heads; ++h)
    bands.push_back(pattern == 0   ? window_band(choose(-1, 0, 30, 130), 0)
                    : pattern == 1 ? window_band(size, choose(-1, 0, 5))
                                   : group_band(size, h % 2 ? size / 2 : 0, random() % 2 == 0));
  std::vector<int32_t> start(s.batch), end(s.batch), documents;
  for (int b = 0; b < s.batch; ++b) {
    start[b] = static_cast<int32_t>(random() % (2 * keys)) - keys / 2;  // any value may stand in a tensor
    end[b] = static_cast<int32_t>(random() % (2 * keys)) - keys / 2;
  }
  AttentionParams p{};
  p.query = s.tensor(query, s.heads, s.queries);
  p.key = s.tensor(key, kv_heads, keys);
  p.value = s.tensor(value, kv_heads, keys);
  p.out = s.tensor(out, s.heads, s.queries);
  p.lse = lse.data();
  p.batch = s.batch;
  p.heads = s.heads;
  p.kv_heads = kv_heads;
  p.head_dim = s.dim;
  p.rows = {s.queries, keys, keys - s.queries, 0, choose(0, 0, 3, 70), nullptr, 0, nullptr, nullptr};
  if (const int rows = choose(0, 1, 2, 3); rows == 1) {
    p.rows.kv_start = start.data();
  } else if (rows == 2) {
    p.rows.kv_end = end.data();
  } else if (rows == 3 && s.batch == 1 && s.queries == keys) {
    documents = {0, keys / 3, keys / 3, keys};
    p.rows.cu_seqlens = documents.data();
    p.rows.num_documents = 3;
  }
  p.bands = bands.data();
  p.sink_logits = random() % 2 ? sinks.data() : nullptr;
  p.scale = random() % 4 ? 0.2f : -0.2f;
  p.softcap = random() % 3 ? 0.0f : 2.0f;
  p.element = s.element;
  AttentionGrads g{};
  g.grad_out = s.tensor(grad, s.heads, s.queries);
  g.grad_lse = random() % 2 ? grad_lse.data() : nullptr;
  g.grad_query = s.tensor(grad_query, s.heads, s.queries);
  g.grad_key = s.tensor(grad_key, kv_heads, keys);
  g.grad_value = s.tensor(grad_value, kv_heads, keys);
  g.grad_sink_logits = p.sink_logits ? grad_sinks.data() : nullptr;
  const AttentionKernels* kernels = attention_kernels(s.element);
  if (!kernels->forward(p, &threads_for) || !kernels->backward(p, g, &threads_for) || !finite(lse)) {
    std::printf("seed %u failed\n", seed);
    std::exit(1);
  }
  std::vector<char> all;
  for (const Memory* memory : {&out, &grad_query, &grad_key, &grad_value})
    all.insert(all.end(), memory->bytes.begin(), memory->bytes.end());
  const char* lse_bytes = reinterpret_cast<const char*>(lse.data());
  all.insert(all.end(), lse_bytes, lse_bytes + lse.size() * sizeof(float));
  return all;
}

void rotate(unsigned seed) {
  std::mt19937 random(seed);
  const int tokens = 1 + random() % 70, half = 1 + random() % 40, dim = 2 * half + static_cast<int>(random() % 9);
  const Shape s{1, 3, 2, tokens, tokens, dim, random() % 2 == 0, static_cast<Element>(random() % 2)};
  Memory query(s.count(3, tokens), s.element, &random), key(s.count(2, tokens), s.element, &random);
  Memory query_out(s.count(3, tokens), s.element, nullptr), key_out(s.count(2, tokens), s.element, nullptr);
  const bool in_place = random() % 2;
  std::vector<float> cos(tokens * half, 0.6f), sin(tokens * half, 0.8f);
  RopeParams p{};
  const auto tensor = [&](Memory& x, Memory& out, int heads) {
    const Tensor4 strides = s.tensor(x, heads, tokens);
    char* to = in_place ? x.bytes.data() : out.bytes.data();
    return RopeTensor{x.bytes.data(),
                      to,
                      heads,
                      {strides.batch, strides.head, strides.token},
                      {strides.batch, strides.head, strides.token}};
  };
  p.tensors[0] = tensor(query, query_out, 3);
  p.tensors[1] = tensor(key, key_out, 2);
  p.cos = cos.data();
  p.sin = sin.data();
  p.cos_stride[1] = p.sin_stride[1] = half;
  p.batch = 1;
  p.tokens = tokens;
  p.head_dim = dim;
  p.half = half;
  p.interleaved = random() % 2;
  p.inverse = random() % 2;
  (s.element == Element::kFloat32 ? rope_float32 : rope_bfloat16)(p, &threads_for);
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seeds = argc > 1 ? std::atoi(argv[1]) : 100;
  if (!attention_kernels(Element::kFloat32)) {
    std::printf("no attention kernels for this processor\n");
    return 0;
  }
  for (unsigned seed = 0; seed < seeds; ++seed) {
    num_threads = 1;
    const std::vector<char> alone = attend(seed);
    num_threads = 3;
    if (attend(seed) != alone) {
      std::printf("seed %u: other bits with 3 threads\n", seed);
      return 1;
    }
    rotate(seed);
  }
  std::printf("%u calls, %s\n", seeds, attention_isa());
}
