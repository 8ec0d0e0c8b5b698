// The compiled kernels registered with torch's dispatcher through the LibTorch stable ABI, and the pybind11 module
// longattn._C, which holds facts about the build. The only file that sees torch; schemas are defined in Python.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/rope.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel_for(int64_t end, int64_t grain, longattn::cpu::RangeBody body, void* context) {
  torch::stable::parallel_for(0, end, grain, [&](int64_t from, int64_t to) { body(from, to, context); });
}

// Query or key with its output. Shapes are checked here too: a wrong one would read outside the tensors.
longattn::cpu::RopeTensor rope_tensor(const Tensor& x, Tensor& out, const Tensor& query) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == query.scalar_type(),
                  "apply_rope: query and key must be (B, H, S, D) of one dtype");
  for (const int dim : {0, 2, 3})
    STD_TORCH_CHECK(x.size(dim) == query.size(dim),
                    "apply_rope: key must have query's B, S and D, got another size in dim ", dim);
  STD_TORCH_CHECK(out.dim() == 4 && out.scalar_type() == x.scalar_type(),
                  "apply_rope: an output must be like its input");
  for (int dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(out.size(dim) == x.size(dim), "apply_rope: an output must have its input's shape");
  STD_TORCH_CHECK(x.size(3) <= 1 || (x.stride(3) == 1 && out.stride(3) == 1),
                  "apply_rope: channels must be contiguous");
  return {x.const_data_ptr(),
          out.mutable_data_ptr(),
          x.size(1),
          {x.stride(0), x.stride(1), x.stride(2)},
          {out.stride(0), out.stride(1), out.stride(2)}};
}

// cos or sin, (S, half) or (B or 1, S, half): its strides along the batch and the tokens.
void table_strides(const Tensor& table, const Tensor& query, int64_t half, int64_t (&stride)[2]) {
  const int64_t dims = table.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 3, "apply_rope: cos and sin must be (S, w) or (B, S, w)");
  const int64_t rows = dims == 3 ? table.size(0) : 1;
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.size(dims - 1) == half &&
                      table.size(dims - 2) == query.size(2) && (rows == 1 || rows == query.size(0)),
                  "apply_rope: cos and sin must be float32 (S, w) or (B, S, w)");
  STD_TORCH_CHECK(half <= 1 || table.stride(dims - 1) == 1, "apply_rope: cos and sin must have contiguous columns");
  stride[0] = rows == 1 ? 0 : table.stride(0);
  stride[1] = table.stride(dims - 2);
}

void rope_fwd(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved,
              bool inverse, Tensor query_out, Tensor key_out) {
  const int64_t half = cos.size(cos.dim() - 1);
  longattn::cpu::RopeParams p{{rope_tensor(query, query_out, query), rope_tensor(key, key_out, query)}};
  STD_TORCH_CHECK(2 * half <= query.size(3), "apply_rope: cos must have at most D / 2 columns, got ", half);
  table_strides(cos, query, half, p.cos_stride);
  table_strides(sin, query, half, p.sin_stride);
  p.cos = cos.const_data_ptr<float>();
  p.sin = sin.const_data_ptr<float>();
  p.batch = query.size(0);
  p.tokens = query.size(2);
  p.head_dim = query.size(3);
  p.half = half;
  p.interleaved = interleaved;
  p.inverse = inverse;
  if (query.scalar_type() == ScalarType::Float) return longattn::cpu::rope_float32(p, &parallel_for);
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::BFloat16, "apply_rope: compiled for float32 and bfloat16 only");
  longattn::cpu::rope_bfloat16(p, &parallel_for);
}

namespace cpu = longattn::cpu;

// A (B, H, S, D) tensor of an attention call; D and the dtype are the query's.
cpu::Tensor4 tensor4(const char* name, const Tensor& x, const Tensor& query, int64_t heads, int64_t tokens) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == query.scalar_type() && x.size(0) == query.size(0) &&
                      x.size(1) == heads && x.size(2) == tokens && x.size(3) == query.size(3),
                  "attention: ", name, " must be (", query.size(0), ", ", heads, ", ", tokens, ", ", query.size(3),
                  ") in query's dtype");
  STD_TORCH_CHECK(x.stride(3) == 1, "attention: ", name, " must have contiguous channels");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

const int32_t* row_values(const char* name, const std::optional<Tensor>& x, int64_t size) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Int && x->dim() == 1 && x->is_contiguous() && x->size(0) == size,
                  "attention: ", name, " must be contiguous int32 (", size, ",)");
  return x->const_data_ptr<int32_t>();
}

float* rows_float32(const char* name, const Tensor& x, const Tensor& query) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 3 &&
                      x.size(0) == query.size(0) && x.size(1) == query.size(1) && x.size(2) == query.size(2),
                  "attention: ", name, " must be contiguous float32 (B, Hq, Sq)");
  return static_cast<float*>(x.mutable_data_ptr());
}

cpu::Element element_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return cpu::Element::kFloat32;
  if (x.scalar_type() == ScalarType::BFloat16) return cpu::Element::kBFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "attention: compiled for float32, bfloat16 and float16 only");
  return cpu::Element::kFloat16;
}

// What the attention ops share behind the arguments of their band.
struct AttentionOptions {
  double scale, softcap;
  int64_t sink_tokens;
  const std::optional<Tensor>&sink_logits, &cu_seqlens, &kv_start, &kv_end;
  int64_t query_start, key_start;
};

// Shapes are checked here too: a wrong one would read outside the tensors. `bands` has one a query head.
cpu::AttentionParams attention_params(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                      const Tensor& lse, const AttentionOptions& options,
                                      const std::vector<longattn::Band>& bands) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), dim = query.size(3);
  const int64_t kv_heads = key.size(1), keys = key.size(2);
  constexpr int64_t kLargest = int64_t{1} << 30;
  STD_TORCH_CHECK(dim >= 8 && dim % 8 == 0 && dim <= cpu::kMaxHeadDim,
                  "attention: head_dim must be a multiple of 8 up to ", cpu::kMaxHeadDim, ", got ", dim);
  STD_TORCH_CHECK(batch < kLargest && heads < kLargest && queries < kLargest && keys < kLargest,
                  "attention: sizes must lie below 2^30");
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
                  "attention: query must have a multiple of key's heads");
  STD_TORCH_CHECK(static_cast<int64_t>(bands.size()) == heads, "attention: one band a query head");
  cpu::AttentionParams p{};
  p.query = tensor4("query", query, query, heads, queries);
  p.key = tensor4("key", key, query, kv_heads, keys);
  p.value = tensor4("value", value, query, kv_heads, keys);
  p.out = tensor4("out", out, query, heads, queries);
  p.lse = rows_float32("lse", lse, query);
  p.batch = static_cast<int>(batch);
  p.heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(dim);
  const int64_t documents = options.cu_seqlens ? options.cu_seqlens->size(0) - 1 : 0;
  p.rows = {static_cast<int>(queries),
            static_cast<int>(keys),
            options.query_start,
            options.key_start,
            longattn::smaller(options.sink_tokens, longattn::kFar),
            row_values("cu_seqlens", options.cu_seqlens, documents + 1),
            static_cast<int>(documents),
            row_values("kv_start", options.kv_start, batch),
            row_values("kv_end", options.kv_end, batch)};
  p.bands = bands.data();
  if (options.sink_logits) {
    const Tensor& logits = *options.sink_logits;
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && logits.is_contiguous() && logits.numel() == heads,
                    "attention: sink_logits must be contiguous float32 (", heads, ",)");
    p.sink_logits = logits.const_data_ptr<float>();
  }
  p.scale = static_cast<float>(options.scale);
  p.softcap = static_cast<float>(options.softcap);
  p.element = element_of(query);
  return p;
}

const cpu::AttentionKernels& attention_kernels(const cpu::AttentionParams& p) {
  const cpu::AttentionKernels* kernels = cpu::attention_kernels(p.element);
  STD_TORCH_CHECK(kernels != nullptr, "attention: no kernel for this processor");
  return *kernels;
}

std::vector<longattn::Band> window_bands(const Tensor& query, int64_t left, int64_t right) {
  return std::vector<longattn::Band>(query.size(1), longattn::window_band(left, right));
}

std::vector<longattn::Band> group_bands(int64_t group_size, const std::vector<int64_t>& shifts, bool causal) {
  std::vector<longattn::Band> bands;
  for (const int64_t shift : shifts) {
    STD_TORCH_CHECK(group_size > 0 && 0 <= shift && shift < group_size, "attention: shift must lie in the group");
    bands.push_back(longattn::group_band(group_size, shift, causal));
  }
  return bands;
}

void attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options,
                   const std::vector<longattn::Band>& bands, const Tensor& out, const Tensor& lse) {
  const cpu::AttentionParams p = attention_params(query, key, value, out, lse, options, bands);
  STD_TORCH_CHECK(attention_kernels(p).forward(p, &parallel_for), "attention: no memory for scratch");
}

using MaybeTensor = std::optional<Tensor>;

// The tensors of a backward op around its inputs and options.
struct AttentionGradTensors {
  const Tensor& grad_out;
  const MaybeTensor& grad_lse;
  const Tensor &query, &key, &value, &out, &lse;
  const Tensor &grad_query, &grad_key, &grad_value, &grad_sink_logits;
};

void attention_bwd(const AttentionGradTensors& t, const AttentionOptions& options,
                   const std::vector<longattn::Band>& bands) {
  const cpu::AttentionParams p = attention_params(t.query, t.key, t.value, t.out, t.lse, options, bands);
  cpu::AttentionGrads grads{};
  grads.grad_out = tensor4("grad_out", t.grad_out, t.query, p.heads, p.rows.num_queries);
  if (t.grad_lse) grads.grad_lse = rows_float32("grad_lse", *t.grad_lse, t.query);
  grads.grad_query = tensor4("grad_query", t.grad_query, t.query, p.heads, p.rows.num_queries);
  grads.grad_key = tensor4("grad_key", t.grad_key, t.query, p.kv_heads, p.rows.num_keys);
  grads.grad_value = tensor4("grad_value", t.grad_value, t.query, p.kv_heads, p.rows.num_keys);
  if (p.sink_logits) {
    STD_TORCH_CHECK(t.grad_sink_logits.scalar_type() == ScalarType::Float && t.grad_sink_logits.is_contiguous() &&
                        t.grad_sink_logits.numel() == p.heads,
                    "attention: grad_sink_logits must be contiguous float32 (", p.heads, ",)");
    grads.grad_sink_logits = static_cast<float*>(t.grad_sink_logits.mutable_data_ptr());
  }
  STD_TORCH_CHECK(attention_kernels(p).backward(p, grads, &parallel_for), "attention: no memory for scratch");
}

void window_fwd(const Tensor& query, const Tensor& key, const Tensor& value, int64_t left, int64_t right, double scale,
                double softcap, int64_t sink_tokens, MaybeTensor sink_logits, MaybeTensor cu_seqlens,
                MaybeTensor kv_start, MaybeTensor kv_end, int64_t query_start, int64_t key_start, Tensor out,
                Tensor lse) {
  const AttentionOptions options{scale,    softcap, sink_tokens, sink_logits, cu_seqlens,
                                 kv_start, kv_end,  query_start, key_start};
  attention_fwd(query, key, value, options, window_bands(query, left, right), out, lse);
}

void group_fwd(const Tensor& query, const Tensor& key, const Tensor& value, int64_t group_size,
               std::vector<int64_t> shifts, bool causal, double scale, double softcap, int64_t sink_tokens,
               MaybeTensor sink_logits, MaybeTensor cu_seqlens, MaybeTensor kv_start, MaybeTensor kv_end,
               int64_t query_start, int64_t key_start, Tensor out, Tensor lse) {
  const AttentionOptions options{scale,    softcap, sink_tokens, sink_logits, cu_seqlens,
                                 kv_start, kv_end,  query_start, key_start};
  attention_fwd(query, key, value, options, group_bands(group_size, shifts, causal), out, lse);
}

void window_bwd(const Tensor& grad_out, MaybeTensor grad_lse, const Tensor& query, const Tensor& key,
                const Tensor& value, const Tensor& out, const Tensor& lse, int64_t left, int64_t right, double scale,
                double softcap, int64_t sink_tokens, MaybeTensor sink_logits, MaybeTensor cu_seqlens,
                MaybeTensor kv_start, MaybeTensor kv_end, int64_t query_start, int64_t key_start, Tensor grad_query,
                Tensor grad_key, Tensor grad_value, Tensor grad_sink_logits) {
  const AttentionOptions options{scale,    softcap, sink_tokens, sink_logits, cu_seqlens,
                                 kv_start, kv_end,  query_start, key_start};
  attention_bwd({grad_out, grad_lse, query, key, value, out, lse, grad_query, grad_key, grad_value, grad_sink_logits},
                options, window_bands(query, left, right));
}

void group_bwd(const Tensor& grad_out, MaybeTensor grad_lse, const Tensor& query, const Tensor& key,
               const Tensor& value, const Tensor& out, const Tensor& lse, int64_t group_size,
               std::vector<int64_t> shifts, bool causal, double scale, double softcap, int64_t sink_tokens,
               MaybeTensor sink_logits, MaybeTensor cu_seqlens, MaybeTensor kv_start, MaybeTensor kv_end,
               int64_t query_start, int64_t key_start, Tensor grad_query, Tensor grad_key, Tensor grad_value,
               Tensor grad_sink_logits) {
  const AttentionOptions options{scale,    softcap, sink_tokens, sink_logits, cu_seqlens,
                                 kv_start, kv_end,  query_start, key_start};
  attention_bwd({grad_out, grad_lse, query, key, value, out, lse, grad_query, grad_key, grad_value, grad_sink_logits},
                options, group_bands(group_size, shifts, causal));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longattn, CPU, m) {
  m.impl("_rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("_window_fwd", TORCH_BOX(&window_fwd));
  m.impl("_window_bwd", TORCH_BOX(&window_bwd));
  m.impl("_group_fwd", TORCH_BOX(&group_fwd));
  m.impl("_group_bwd", TORCH_BOX(&group_bwd));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled longattn kernels; importing this module registers them with torch.ops.longattn.";
  m.def("cpu_isa", [] { return std::string(cpu::attention_isa()); });
  // Operations between registers, done once by each of `threads` of torch's threads: the ceiling of products of a
  // dtype.
  m.def("cpu_peak", [](const std::string& dtype, int64_t rounds, int64_t threads) -> int64_t {
    const auto element = dtype == "bfloat16"  ? cpu::Element::kBFloat16
                         : dtype == "float16" ? cpu::Element::kFloat16
                                              : cpu::Element::kFloat32;
    const cpu::AttentionKernels* kernels = cpu::attention_kernels(element);
    if (!kernels || !kernels->peak) return 0;
    struct Context {
      int64_t (*peak)(int64_t), rounds;
      std::atomic<int64_t> operations;
    } context{kernels->peak, rounds, {0}};
    const cpu::RangeBody body = [](int64_t begin, int64_t end, void* opaque) {
      auto& c = *static_cast<Context*>(opaque);
      for (; begin < end; ++begin) c.operations += c.peak(c.rounds);
    };
    parallel_for(threads, 1, body, &context);
    return context.operations;
  });
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
    info["cpu"] = LONGATTN_CPU_TARGETS;
#ifdef LONGATTN_CUDA_ARCHS
    info["cuda"] = LONGATTN_CUDA_ARCHS;
#else
    info["cuda"] = pybind11::none();
#endif
    return info;
  });
}
