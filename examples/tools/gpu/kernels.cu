#include "kernels.hpp"

#include "device_array.hpp"

#include <cuda_runtime.h>

namespace {

using tetromino::bfloat16;

/// A sum of four uniform numbers from a counter.
__device__ float normal(std::uint64_t seed, std::uint64_t i, float size) {
  std::uint64_t z = seed * 0x9E3779B97F4A7C15u + (i + 1) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  const auto part = [&](int s) { return static_cast<float>(z >> s & 0xFFFF) * 0x1p-16f; };
  return (part(0) + part(16) + part(32) + part(48) - 2.0f) * 1.7320508f * size;
}

template <class T>
__global__ void fill_kernel(T* to, std::size_t n, std::uint64_t seed, float size) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    to[i] = T(normal(seed, i, size));
  }
}

template <class T>
void fill_with(cudaStream_t stream, T* to, std::size_t n, std::uint64_t seed, float size) {
  fill_kernel<<<1024, 256, 0, stream>>>(to, n, seed, size);
  check(cudaGetLastError(), "fill");
}

/// One warp for each sum.
template <class Sum, class X>
__global__ void multiply_kernel(const X* x, const float* w, Sum* out, std::size_t outputs, std::size_t cols) {
  const std::size_t n = blockIdx.x * std::size_t{blockDim.x / 32} + threadIdx.x / 32, row = blockIdx.y;
  if (n >= outputs) return;
  Sum sum = 0;
  for (std::size_t k = threadIdx.x % 32; k < cols; k += 32) {
    sum += static_cast<Sum>(x[row * cols + k]) * static_cast<Sum>(w[n * cols + k]);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, step);
  if (threadIdx.x % 32 == 0) out[row * outputs + n] = sum;
}

template <class Sum, class X>
void multiply(cudaStream_t stream, const X* x, std::size_t rows, const float* w, Sum* out, std::size_t outputs,
              std::size_t cols) {
  const dim3 grid(static_cast<unsigned>((outputs + 7) / 8), static_cast<unsigned>(rows));
  multiply_kernel<Sum, X><<<grid, 256, 0, stream>>>(x, w, out, outputs, cols);
  check(cudaGetLastError(), "multiply_slowly");
}

__global__ void gate_kernel(const double* both, double* out, std::size_t inner) {
  const std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x;
  if (i < inner) out[i] = both[i] / (1.0 + exp(-both[i])) * both[inner + i];
}

}  // namespace

void fill(cudaStream_t stream, float* to, std::size_t n, std::uint64_t seed, float size) {
  fill_with(stream, to, n, seed, size);
}
void fill(cudaStream_t stream, bfloat16* to, std::size_t n, std::uint64_t seed, float size) {
  fill_with(stream, to, n, seed, size);
}

void multiply_slowly(cudaStream_t stream, const bfloat16* x, std::size_t rows, const float* w, float* out,
                     std::size_t outputs, std::size_t cols) {
  multiply(stream, x, rows, w, out, outputs, cols);
}
void multiply_slowly(cudaStream_t stream, const bfloat16* x, std::size_t rows, const float* w, double* out,
                     std::size_t outputs, std::size_t cols) {
  multiply(stream, x, rows, w, out, outputs, cols);
}
void multiply_slowly(cudaStream_t stream, const double* x, std::size_t rows, const float* w, double* out,
                     std::size_t outputs, std::size_t cols) {
  multiply(stream, x, rows, w, out, outputs, cols);
}

void gate_slowly(cudaStream_t stream, const double* both, double* out, std::size_t inner) {
  gate_kernel<<<static_cast<unsigned>((inner + 255) / 256), 256, 0, stream>>>(both, out, inner);
  check(cudaGetLastError(), "gate_slowly");
}
