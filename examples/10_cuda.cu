// The same verbs on a GPU: only the policy and where memory lies are others.
#include <tetromino/cuda.hpp>
#include <tetromino/cuda/repacked.hpp>
#include <tetromino/tetromino.hpp>

#include <cuda_runtime.h>

#include <cstdio>

template <class T>
std::span<T> managed(std::size_t count) {  // memory that both sides can read, to keep this short
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) std::exit(1);
  return {static_cast<T*>(memory), count};
}

int main() {
  namespace tt = tetromino;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return std::puts("skipped: there is no GPU"), 77;
  const std::size_t outputs = 256, cols = 1024, tokens = 8;
  const auto weights = managed<tt::bfloat16>(outputs * cols), activations = managed<tt::bfloat16>(tokens * cols);
  const auto products = managed<tt::bfloat16>(tokens * outputs);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = tt::bfloat16(float(i * 2654435761u % 2001) / 1000 - 1);
  for (std::size_t i = 0; i < activations.size(); ++i) activations[i] = tt::bfloat16(float(i * 40503u % 199) / 100 - 1);
  const tt::matrix_view<const tt::bfloat16> w(weights.data(), outputs, cols), x(activations.data(), tokens, cols);

  cudaStream_t handle = nullptr;
  cudaStreamCreate(&handle);
  const tt::cuda::stream stream(handle);  // calls only launch, and can be captured into a graph

  const tt::packed_shape shape{tt::mxfp4{}, 1, outputs, cols};
  tt::packed_view<tt::mxfp4, std::uint8_t> packed{.matrices = 1, .rows = outputs, .cols = cols};
  packed.codes = managed<std::uint8_t>(shape.code_bytes());
  packed.scales = managed<std::uint8_t>(shape.scale_bytes());
  tt::quantize_options options;
  options.special = tt::special_values::poison;  // reject needs a place to report to: see cuda::rejections
  tt::quantize_to(stream, w, packed, options);

  const tt::cuda::repacked_shape order{shape.format, 1, outputs, cols};  // once, into the order in which products read
  const tt::cuda::repacked_view<tt::bfloat16, std::byte> fast{order, managed<std::byte>(order.bytes())};
  tt::repack_to(stream, packed, fast);
  tt::matmul(stream, x, fast, tt::matrix_view<tt::bfloat16>(products.data(), tokens, outputs));
  if (cudaStreamSynchronize(handle) != cudaSuccess) return 1;

  const auto on_host = tt::quantize<tt::mxfp4>(tt::automatic, w);
  const bool same = std::equal(packed.codes.begin(), packed.codes.end(), on_host.codes.begin());
  std::printf("the bytes of the CPU: %s; first product %g\n", same ? "yes" : "no", double(products[0]));
  return same ? 0 : 1;
}
