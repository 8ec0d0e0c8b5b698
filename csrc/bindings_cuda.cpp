// The CUDA kernels registered with torch's dispatcher through the LibTorch stable ABI; beside bindings.cpp the only
// file that sees torch. Compiles and imports with a torch that has no CUDA too.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "rope.h"
#include "window_attn.h"
#include "window_attn_sm90.h"

// Absent from a torch without CUDA, and from its headers: weak, so that one binary loads with either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using longattn::cuda::AttentionParams;
using longattn::cuda::BackwardParams;
using longattn::cuda::TensorView;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The stream that torch runs on now, with its device made current for as long as this lives.
struct CurrentStream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit CurrentStream(const Tensor& x) : guard(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// A (B, H, S, D) tensor of an attention call; batch, D and dtype are the query's.
TensorView view(const char* name, const Tensor& x, const Tensor& query, int64_t heads, int64_t tokens) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == query.scalar_type() && x.size(0) == query.size(0) &&
                      x.size(1) == heads && x.size(2) == tokens && x.size(3) == query.size(3),
                  "attention: ", name, " must be (", query.size(0), ", ", heads, ", ", tokens, ", ", query.size(3),
                  ") in query's dtype");
  STD_TORCH_CHECK(x.get_device_index() == query.get_device_index(), "attention: ", name, " must be on query's device");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, "attention: ", name, " must have contiguous channels");
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
T* contiguous(const char* name, const MaybeTensor& x, ScalarType dtype, int64_t size, const Tensor& query) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == dtype && x->is_contiguous() && x->numel() == size &&
                      x->get_device_index() == query.get_device_index(),
                  "attention: ", name, " must be contiguous, of ", size, " elements, on query's device");
  return const_cast<T*>(static_cast<const T*>(x->const_data_ptr()));
}

struct Options {
  double scale, softcap;
  int64_t sink_tokens;
  const MaybeTensor &sink_logits, &cu_seqlens, &kv_start, &kv_end;
  int64_t query_start, key_start;
};

struct Bands {
  longattn::Band band;
  std::vector<int64_t> shifts;
};

Bands window_bands(int64_t left, int64_t right) { return {longattn::window_band(left, right), {}}; }

Bands group_bands(int64_t group_size, const std::vector<int64_t>& shifts, bool causal) {
  STD_TORCH_CHECK(group_size > 0, "attention: group_size must be at least 1");
  Bands bands{longattn::group_band(group_size, 0, causal), {}};
  for (const int64_t shift : shifts) {
    STD_TORCH_CHECK(0 <= shift && shift < group_size, "attention: shift must lie in the group");
    bands.shifts.push_back(longattn::group_band(group_size, shift, causal).shift);
  }
  return bands;
}

// Shapes are checked here too: a wrong one would read outside the tensors.
AttentionParams params_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                          const Tensor& lse, const Options& options, const Bands& bands) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), dim = query.size(3);
  const int64_t kv_heads = key.size(1), keys = key.size(2);
  const bool bf16 = query.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bf16 || query.scalar_type() == ScalarType::Half, "attention: compiled for bfloat16 and float16 only");
  STD_TORCH_CHECK(1 <= dim && dim <= longattn::cuda::kMostChannels, "attention: head_dim must be at most ",
                  longattn::cuda::kMostChannels, ", got ", dim);
  STD_TORCH_CHECK(heads <= longattn::cuda::kMaxHeads, "attention: at most ", longattn::cuda::kMaxHeads, " query heads");
  STD_TORCH_CHECK(batch <= longattn::cuda::kMostIndex && queries <= longattn::cuda::kMostIndex &&
                      keys <= longattn::cuda::kMostIndex,
                  "attention: sizes must lie below 2^31 - 1024");
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
                  "attention: query must have a multiple of key's heads");
  STD_TORCH_CHECK(bands.band.group == 0 || static_cast<int64_t>(bands.shifts.size()) == heads,
                  "attention: one shift a query head");
  AttentionParams p{};
  p.query = view("query", query, query, heads, queries);
  p.key = view("key", key, query, kv_heads, keys);
  p.value = view("value", value, query, kv_heads, keys);
  p.out = view("out", out, query, heads, queries);
  p.lse = contiguous<float>("lse", lse, ScalarType::Float, batch * heads * queries, query);
  p.sink_logits = contiguous<float>("sink_logits", options.sink_logits, ScalarType::Float, heads, query);
  const int64_t bounds = options.cu_seqlens ? options.cu_seqlens->numel() : 1;
  STD_TORCH_CHECK(bounds >= 1, "attention: cu_seqlens must hold at least one bound");
  p.rows = {static_cast<int>(queries),
            static_cast<int>(keys),
            options.query_start,
            options.key_start,
            longattn::smaller(options.sink_tokens, longattn::kFar),
            contiguous<int32_t>("cu_seqlens", options.cu_seqlens, ScalarType::Int, bounds, query),
            static_cast<int>(bounds - 1),
            contiguous<int32_t>("kv_start", options.kv_start, ScalarType::Int, batch, query),
            contiguous<int32_t>("kv_end", options.kv_end, ScalarType::Int, batch, query)};
  p.band = bands.band;
  for (size_t head = 0; head < bands.shifts.size(); ++head) p.shifts[head] = bands.shifts[head];
  p.batch = static_cast<int>(batch);
  p.heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(dim);
  p.scale = static_cast<float>(options.scale);
  p.softcap = static_cast<float>(options.softcap);
  p.bf16 = bf16;
  p.aligned = dim % 8 == 0;
  for (const TensorView* x : {&p.query, &p.key, &p.value, &p.out}) p.aligned &= longattn::cuda::chunks_fit(*x);
  return p;
}

void forward(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options, const Bands& bands,
             const Tensor& out, const Tensor& lse) {
  const AttentionParams p = params_of(query, key, value, out, lse, options, bands);
  const CurrentStream current(query);
  if (longattn::cuda::sm90_takes(p)) {
    check(longattn::cuda::window_attn_forward_sm90(p, current.stream), "attention forward");
    return;
  }
  longattn::cuda::ForwardPlan plan{};
  check(longattn::cuda::plan_forward(p, plan), "attention forward");
  Tensor scratch = torch::stable::new_empty(query, {plan.scratch_bytes}, ScalarType::Byte);
  check(longattn::cuda::window_attn_forward(p, plan, scratch.mutable_data_ptr(), current.stream), "attention forward");
}

// The tensors of a backward op around its inputs and options.
struct GradTensors {
  const Tensor& grad_out;
  const MaybeTensor& grad_lse;
  const Tensor &query, &key, &value, &out, &lse;
  const Tensor &grad_query, &grad_key, &grad_value, &grad_sink_logits;
};

void backward(const GradTensors& t, const Options& options, const Bands& bands) {
  BackwardParams b{};
  AttentionParams& p = b.forward;
  p = params_of(t.query, t.key, t.value, t.out, t.lse, options, bands);
  const int64_t queries = t.query.size(2), keys = t.key.size(2);
  b.grad_out = view("grad_out", t.grad_out, t.query, p.heads, queries);
  b.grad_query = view("grad_query", t.grad_query, t.query, p.heads, queries);
  b.grad_key = view("grad_key", t.grad_key, t.query, p.kv_heads, keys);
  b.grad_value = view("grad_value", t.grad_value, t.query, p.kv_heads, keys);
  for (const TensorView* x : {&b.grad_out, &b.grad_query, &b.grad_key, &b.grad_value})
    p.aligned &= longattn::cuda::chunks_fit(*x);
  b.grad_lse = contiguous<float>("grad_lse", t.grad_lse, ScalarType::Float, t.lse.numel(), t.query);
  if (p.sink_logits)
    b.grad_sink_logits = contiguous<float>("grad_sink_logits", t.grad_sink_logits, ScalarType::Float, p.heads, t.query);
  const longattn::cuda::BackwardScratch sizes = longattn::cuda::backward_scratch(p);
  b.sink_keys = sizes.sink_keys;
  b.sink_chunks = sizes.sink_chunks;
  const CurrentStream current(t.query);
  Tensor stats = torch::stable::new_empty(t.query, {sizes.stats_bytes}, ScalarType::Byte);
  Tensor sums = torch::stable::new_empty(t.query, {sizes.sink_sums_bytes}, ScalarType::Byte);
  b.stats = static_cast<longattn::cuda::RowStats*>(stats.mutable_data_ptr());
  b.sink_sums = static_cast<float*>(sums.mutable_data_ptr());
  const bool sm90 = longattn::cuda::sm90_takes(b);
  const longattn::cuda::SinglePassScratch single =
      sm90 ? longattn::cuda::single_pass_scratch(b) : longattn::cuda::SinglePassScratch{};
  std::optional<Tensor> query_sums, query_flags;  // two calls of torch that other backwards need not pay for
  if (single.sums_bytes > 0) {
    query_sums = torch::stable::new_empty(t.query, {single.sums_bytes}, ScalarType::Byte);
    query_flags = torch::stable::new_zeros(t.query, {single.flags_bytes}, ScalarType::Byte);
    b.query_sums = static_cast<float*>(query_sums->mutable_data_ptr());
    b.query_flags = static_cast<int32_t*>(query_flags->mutable_data_ptr());
  }
  const auto run = sm90 ? longattn::cuda::window_attn_backward_sm90 : longattn::cuda::window_attn_backward;
  check(run(b, current.stream), "attention backward");
}

// Query or key with its output.
longattn::cuda::RopeTensor rope_tensor(const Tensor& x, const Tensor& out, const Tensor& query) {
  for (const Tensor* each : {&x, &out}) {
    STD_TORCH_CHECK(each->dim() == 4 && each->scalar_type() == query.scalar_type() &&
                        each->get_device_index() == query.get_device_index() && each->size(0) == query.size(0) &&
                        each->size(1) == x.size(1) && each->size(2) == query.size(2) && each->size(3) == query.size(3),
                    "apply_rope: query, key and outputs must be (B, H, S, D) of one dtype on one device");
    STD_TORCH_CHECK(each->size(3) <= 1 || each->stride(3) == 1, "apply_rope: channels must be contiguous");
  }
  return {x.const_data_ptr(),
          out.mutable_data_ptr(),
          x.size(1),
          {x.stride(0), x.stride(1), x.stride(2)},
          {out.stride(0), out.stride(1), out.stride(2)}};
}

// cos or sin, (S, half) or (B or 1, S, half): its strides along the batch and the tokens.
const float* rope_table(const Tensor& table, const Tensor& query, int64_t half, int64_t (&stride)[2]) {
  const int64_t dims = table.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 3, "apply_rope: cos and sin must be (S, w) or (B, S, w)");
  const int64_t rows = dims == 3 ? table.size(0) : 1;
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.size(dims - 1) == half &&
                      table.size(dims - 2) == query.size(2) && (rows == 1 || rows == query.size(0)) &&
                      table.get_device_index() == query.get_device_index() &&
                      (half <= 1 || table.stride(dims - 1) == 1),
                  "apply_rope: cos and sin must be float32 (S, w) or (B, S, w) with contiguous columns");
  stride[0] = rows == 1 ? 0 : table.stride(0);
  stride[1] = table.stride(dims - 2);
  return table.const_data_ptr<float>();
}

longattn::cuda::RopeElement rope_element(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return longattn::cuda::RopeElement::kFloat32;
  if (x.scalar_type() == ScalarType::BFloat16) return longattn::cuda::RopeElement::kBFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half,
                  "apply_rope: compiled for float32, bfloat16 and float16 only on CUDA");
  return longattn::cuda::RopeElement::kFloat16;
}

// Query and key with their outputs, where `half` pairs of a row rotate.
longattn::cuda::RopeParams rope_params(const Tensor& query, const Tensor& key, int64_t half, bool interleaved,
                                       bool inverse, const Tensor& query_out, const Tensor& key_out) {
  longattn::cuda::RopeParams p{};
  p.tensors[0] = rope_tensor(query, query_out, query);
  p.tensors[1] = rope_tensor(key, key_out, query);
  STD_TORCH_CHECK(2 * half <= query.size(3), "apply_rope: at most D / 2 pairs of a row rotate, got ", half);
  p.half = half;
  p.batch = query.size(0);
  p.tokens = query.size(2);
  p.head_dim = query.size(3);
  p.element = rope_element(query);
  p.interleaved = interleaved;
  p.inverse = inverse;
  return p;
}

void rope_fwd(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved,
              bool inverse, Tensor query_out, Tensor key_out) {
  longattn::cuda::RopeParams p =
      rope_params(query, key, cos.size(cos.dim() - 1), interleaved, inverse, query_out, key_out);
  p.cos = rope_table(cos, query, p.half, p.cos_stride);
  p.sin = rope_table(sin, query, p.half, p.sin_stride);
  const CurrentStream current(query);
  check(longattn::cuda::rope_forward(p, current.stream), "apply_rope");
}

void rope_positions_fwd(const Tensor& query, const Tensor& key, MaybeTensor positions, MaybeTensor cu_seqlens,
                        const Tensor& inv_freq, double scaling, bool interleaved, bool inverse, Tensor query_out,
                        Tensor key_out) {
  constexpr const char* kOp = "apply_rope_positions: ";
  longattn::cuda::RopeParams p = rope_params(query, key, inv_freq.numel(), interleaved, inverse, query_out, key_out);
  const auto on_device = [&](const Tensor& x) { return x.get_device_index() == query.get_device_index(); };
  STD_TORCH_CHECK(inv_freq.scalar_type() == ScalarType::Double && inv_freq.is_contiguous() && on_device(inv_freq) &&
                      1 <= p.half && p.half <= longattn::cuda::kMostFormedPairs,
                  kOp, "inv_freq must be contiguous float64 of 1 to ", longattn::cuda::kMostFormedPairs, " pairs");
  STD_TORCH_CHECK(positions.has_value() != cu_seqlens.has_value(), kOp, "positions or cu_seqlens, not both");
  p.phases.inv_freq = inv_freq.const_data_ptr<double>();
  p.phases.scaling = static_cast<float>(scaling);
  if (positions) {
    const int64_t dims = positions->dim(), rows = dims == 2 ? positions->size(0) : 1;
    STD_TORCH_CHECK((dims == 1 || dims == 2) && positions->scalar_type() == ScalarType::Long &&
                        positions->size(dims - 1) == p.tokens && (rows == 1 || rows == p.batch) &&
                        on_device(*positions),
                    kOp, "positions must be int64 (S,) or (B, S)");
    p.phases.positions = positions->const_data_ptr<int64_t>();
    p.phases.position_stride[0] = rows == 1 ? 0 : positions->stride(0);
    p.phases.position_stride[1] = positions->stride(dims - 1);
  } else {
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->is_contiguous() &&
                        cu_seqlens->numel() >= 1 && cu_seqlens->numel() <= longattn::cuda::kMostIndex &&
                        on_device(*cu_seqlens),
                    kOp, "cu_seqlens must be contiguous int32 (documents + 1,)");
    p.phases.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
    p.phases.num_documents = static_cast<int>(cu_seqlens->numel() - 1);
  }
  const CurrentStream current(query);
  check(longattn::cuda::rope_forward(p, current.stream), "apply_rope_positions");
}

void window_fwd(const Tensor& query, const Tensor& key, const Tensor& value, int64_t left, int64_t right, double scale,
                double softcap, int64_t sink_tokens, MaybeTensor sink_logits, MaybeTensor cu_seqlens,
                MaybeTensor kv_start, MaybeTensor kv_end, int64_t query_start, int64_t key_start, Tensor out,
                Tensor lse) {
  const Options options{scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end, query_start, key_start};
  forward(query, key, value, options, window_bands(left, right), out, lse);
}

void group_fwd(const Tensor& query, const Tensor& key, const Tensor& value, int64_t group_size,
               std::vector<int64_t> shifts, bool causal, double scale, double softcap, int64_t sink_tokens,
               MaybeTensor sink_logits, MaybeTensor cu_seqlens, MaybeTensor kv_start, MaybeTensor kv_end,
               int64_t query_start, int64_t key_start, Tensor out, Tensor lse) {
  const Options options{scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end, query_start, key_start};
  forward(query, key, value, options, group_bands(group_size, shifts, causal), out, lse);
}

void window_bwd(const Tensor& grad_out, MaybeTensor grad_lse, const Tensor& query, const Tensor& key,
                const Tensor& value, const Tensor& out, const Tensor& lse, int64_t left, int64_t right, double scale,
                double softcap, int64_t sink_tokens, MaybeTensor sink_logits, MaybeTensor cu_seqlens,
                MaybeTensor kv_start, MaybeTensor kv_end, int64_t query_start, int64_t key_start, Tensor grad_query,
                Tensor grad_key, Tensor grad_value, Tensor grad_sink_logits) {
  const Options options{scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end, query_start, key_start};
  backward({grad_out, grad_lse, query, key, value, out, lse, grad_query, grad_key, grad_value, grad_sink_logits},
           options, window_bands(left, right));
}

void group_bwd(const Tensor& grad_out, MaybeTensor grad_lse, const Tensor& query, const Tensor& key,
               const Tensor& value, const Tensor& out, const Tensor& lse, int64_t group_size,
               std::vector<int64_t> shifts, bool causal, double scale, double softcap, int64_t sink_tokens,
               MaybeTensor sink_logits, MaybeTensor cu_seqlens, MaybeTensor kv_start, MaybeTensor kv_end,
               int64_t query_start, int64_t key_start, Tensor grad_query, Tensor grad_key, Tensor grad_value,
               Tensor grad_sink_logits) {
  const Options options{scale, softcap, sink_tokens, sink_logits, cu_seqlens, kv_start, kv_end, query_start, key_start};
  backward({grad_out, grad_lse, query, key, value, out, lse, grad_query, grad_key, grad_value, grad_sink_logits},
           options, group_bands(group_size, shifts, causal));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longattn, CUDA, m) {
  m.impl("_rope_fwd", TORCH_BOX(&rope_fwd));
  m.impl("_rope_positions_fwd", TORCH_BOX(&rope_positions_fwd));
  m.impl("_window_fwd", TORCH_BOX(&window_fwd));
  m.impl("_window_bwd", TORCH_BOX(&window_bwd));
  m.impl("_group_fwd", TORCH_BOX(&group_fwd));
  m.impl("_group_bwd", TORCH_BOX(&group_bwd));
}
