#pragma once

/// Slow kernels that the example programs fill and check a layer with. They are in kernels.cu, so that nvcc reads them
/// alone and the programs are plain C++. Each call starts work in a stream. Errors: std::runtime_error if a launch
/// fails.

#include <tetromino/float16.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

/// to[n]: about N(0, size), from the seed and the place alone.
void fill(cudaStream_t stream, float* to, std::size_t n, std::uint64_t seed, float size);
void fill(cudaStream_t stream, tetromino::bfloat16* to, std::size_t n, std::uint64_t seed, float size);

/// out[rows, outputs] = x[rows, cols] w[outputs, cols]ᵀ, summed in the type of `out`.
void multiply_slowly(cudaStream_t stream, const tetromino::bfloat16* x, std::size_t rows, const float* w, float* out,
                     std::size_t outputs, std::size_t cols);
void multiply_slowly(cudaStream_t stream, const tetromino::bfloat16* x, std::size_t rows, const float* w, double* out,
                     std::size_t outputs, std::size_t cols);
void multiply_slowly(cudaStream_t stream, const double* x, std::size_t rows, const float* w, double* out,
                     std::size_t outputs, std::size_t cols);

/// out[inner] = silu(both[i]) * both[inner + i].
void gate_slowly(cudaStream_t stream, const double* both, double* out, std::size_t inner);
