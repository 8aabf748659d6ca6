#pragma once

/// A slot for other libraries in the tables of bench_quantize. Write a file that defines bench::contenders and name it,
/// and what it must be linked with, when you configure:
///
///   cmake -D TETROMINO_BENCHMARKS=ON -D TETROMINO_BENCH_CONTENDER="ggml.cpp;libggml-cpu.a;libggml-base.a" ...
///
/// For ggml, built from its own sources with -D BUILD_SHARED_LIBS=OFF, such a file is
///
///   #include "contender.hpp"
///   extern "C" void quantize_row_mxfp4_ref(const float*, void*, std::int64_t);
///   std::vector<bench::contender> bench::contenders(const std::vector<float>& x) {
///     const std::size_t n = std::min<std::size_t>(x.size(), 2 << 20);  // slow work gets a part of the input
///     const auto blocks = std::make_shared<std::vector<char>>(n / 32 * 17);
///     return {{"(ggml mxfp4)", n, [&x, n, blocks] {
///                quantize_row_mxfp4_ref(x.data(), blocks->data(), static_cast<std::int64_t>(n)); }}};
///   }
///
/// and so on for quantize_row_nvfp4_ref, quantize_row_q8_0 (34 bytes for 32 values; beside quantize_int8, which writes
/// 36), dequantize_row_mxfp4, dequantize_row_nvfp4 and, after ggml_cpu_init(),
/// ggml_vec_dot_mxfp4_q8_0 and ggml_vec_dot_nvfp4_q8_0, whose cycles for 32 weights stand beside those of bench_matmul
/// with one row.

#include <cstddef>     // std::size_t
#include <functional>  // std::function
#include <string>      // std::string
#include <vector>      // std::vector

namespace bench {

struct contender {
  std::string work;      ///< in parentheses, so that --only keeps it
  std::size_t elements;  ///< how many elements of x one call handles
  std::function<void()> f;
};

/// What to time beside our own work on x, which outlives the answer.
std::vector<contender> contenders(const std::vector<float>& x);

}  // namespace bench
