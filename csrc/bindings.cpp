// The compiled kernels registered with torch's dispatcher through the LibTorch stable ABI, and the pybind11 module
// longattn._C, which holds facts about the build. The only file that sees torch; schemas are defined in Python.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "cpu/clones.h"
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longattn, CPU, m) { m.impl("_rope_fwd", TORCH_BOX(&rope_fwd)); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled longattn kernels; importing this module registers them with torch.ops.longattn.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
#ifdef __clang__
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
    info["cpu"] = LONGATTN_CPU_TARGETS;
    info["cuda"] = pybind11::none();
    return info;
  });
}
