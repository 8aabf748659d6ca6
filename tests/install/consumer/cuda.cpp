#include <tetromino/cuda.hpp>
#include <tetromino/cuda/moe.hpp>

#include <cstdio>
#include <cstring>

// Packs on the GPU without a CUDA compiler, with the kernels of tetromino::cuda. Where there is no GPU, the call's
// error says so.
int main() {
  tetromino::packed<tetromino::mxfp4> packed({}, 1, 1, 32);
  const float* x = nullptr;
  std::uint8_t* bytes = nullptr;
  if (cudaMalloc(reinterpret_cast<void**>(&bytes), 256) == cudaSuccess) {
    x = reinterpret_cast<const float*>(bytes);
    if (cudaMemset(bytes, 0, 256) != cudaSuccess) return 1;
  }
  const tetromino::packed_view<tetromino::mxfp4, std::uint8_t> out{
      {}, 1, 1, 32, {bytes + 128, packed.codes.size()}, {bytes + 192, packed.scales.size()}};
  tetromino::quantize_options options;
  options.special = tetromino::special_values::poison;
  const auto done = tetromino::try_quantize_to(tetromino::cuda::stream(),
                                               tetromino::batch_view<const float>(x, 1, 1, 32), out, options);
  if (bytes != nullptr) {
    const bool is_done = done && cudaDeviceSynchronize() == cudaSuccess;
    std::printf("packed on the GPU\n");
    return is_done ? 0 : 1;
  }
  if (done || done.error().code() != tetromino::errc::device) return 1;
  std::printf("no GPU: %s\n", done.error().what());
  return std::strstr(done.error().what(), "cudaError") != nullptr ? 0 : 1;
}
