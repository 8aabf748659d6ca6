#pragma once

/// A slot for other libraries' products in the tables of bench_matmul. Write a file that includes this one and defines
/// bench::product_contenders and name it, and what it must be linked with, when you configure:
///
///   cmake -D TETROMINO_BENCHMARKS=ON -D TETROMINO_BENCH_PRODUCT_CONTENDER="ggml.cpp;libggml-cpu.a;libggml-base.a" ...
///
/// All start from the same weights: layout::to_ggml (tetromino/layout/ggml.hpp) gives them as ggml's blocks, which the
/// other libraries' own functions put into their orders. Whatever is large must be in the pages that are asked for,
/// such as a std::vector with detail::page_allocator has; all lines are timed in turns of one run. Only the product
/// belongs into f: quantize activations before.
///
/// * ggml's dot product, after ggml_cpu_init(): for each output ggml_vec_dot_mxfp4_q8_0(cols, &out, 0, blocks of the
///   row, 0, x, 0, 1), with x from quantize_row_q8_0. With NVFP4 ggml_vec_dot_nvfp4_q8_0.
/// * ggml's repacked MXFP4, eight rows side by side with AVX2 and AVX-512: blocks of eight rows, their scales first and
///   then eight bytes of codes of each row in turn (ggml-cpu/repack.cpp puts them into that order);
///   ggml_gemv_mxfp4_8x8_q8_0(cols, out, 0, weights, x, 1, outputs) for one row, with x from quantize_row_q8_0, and
///   ggml_gemm_mxfp4_8x8_q8_0(cols, out, outputs, weights, x, rows, outputs) for multiples of four, with x from
///   ggml_quantize_mat_q8_0_4x8.
/// * ik_llama.cpp's MXFP4_R8 (iqk/iqk_quantize.cpp puts blocks of ggml into that order), the quickest where this was
///   written: iqk_mul_mat(outputs, rows, cols, GGML_TYPE_MXFP4_R8, weights, bytes of a row, GGML_TYPE_Q8_2_X4, x, bytes
///   of a row, out, outputs, 0, 1), with x from its quantization to that type.

#include <tetromino/matrix.hpp>    // matrix
#include <tetromino/packed.hpp>    // packed_view
#include <tetromino/repacked.hpp>  // memory_pages

#include <functional>  // std::function
#include <string>      // std::string
#include <vector>      // std::vector

namespace bench {

struct product_contender {
  std::string work;  ///< in parentheses, so that --only keeps it
  std::function<void()> f;
};

/// What to time beside our products of x [rows, cols] and weights w [1, outputs, cols], which outlive the answer. None
/// for formats that the others lack.
std::vector<product_contender> product_contenders(const tetromino::packed_view<tetromino::any_format>& w,
                                                  const tetromino::matrix<float>& x, tetromino::memory_pages pages);

}  // namespace bench
