// The CUDA rotary kernel in the emulator, for test_emulated_rope.py.
#include "rope.cu"

extern "C" int emulated_rope(const longattn::cuda::RopeParams* params, int64_t* bytes) {
  simt::counters = {};
  const cudaError_t error = longattn::cuda::rope_forward(*params, nullptr);
  bytes[0] = simt::counters.bytes_read;
  bytes[1] = simt::counters.bytes_written;
  return error;
}

extern "C" void emulated_cos_sin(const int64_t* positions, const double* inv_freq, int64_t count, float* cos,
                                 float* sin) {
  for (int64_t i = 0; i < count; ++i) {
    const longattn::cuda::CosSin turn = longattn::cuda::cos_sin_at(positions[i], inv_freq[i]);
    cos[i] = turn.cos;
    sin[i] = turn.sin;
  }
}
