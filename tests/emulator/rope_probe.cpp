// The CUDA rotary kernel in the emulator, for test_emulated_rope.py.
#include "rope.cu"

extern "C" int emulated_rope(const longattn::cuda::RopeParams* params, int64_t* bytes) {
  simt::counters = {};
  const cudaError_t error = longattn::cuda::rope_forward(*params, nullptr);
  bytes[0] = simt::counters.bytes_read;
  bytes[1] = simt::counters.bytes_written;
  return error;
}
