#pragma once

/// Tables of kernels, which tetromino::cpu has for each instruction set.

#include "../../options.hpp"     // special_values
#include "../cpu_matmul.hpp"     // float_product, integer_product, matmul_tile
#include "../rotation_part.hpp"  // rotation_part
#include "../row.hpp"            // row_rules, input_row, packed_row

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t
#include <tuple>    // std::tuple

namespace TETROMINO_NAMESPACE::detail {

/// The kernels for rows of one element type; see scalar_kernels, scalar_int8 and scalar_e4m3.
template <real T>
struct row_kernels {
  float (*amax)(const T*, std::size_t, special_values);
  std::size_t (*quantize)(const row_rules&, const input_row<T>&, const packed_row<std::uint8_t>&);
  void (*dequantize)(const any_format&, const packed_row<const std::uint8_t>&, std::size_t, T*);
  void (*dequantize_past_caches)(const any_format&, const packed_row<const std::uint8_t>&, std::size_t, T*);
  std::size_t (*quantize_int8)(const T*, std::size_t, std::int8_t*, float*);
  std::size_t (*quantize_e4m3)(const T*, std::size_t, std::uint8_t*, float&);
};
struct quantize_table {
  const char* isa;  ///< what the compiler was told to use where this table was made
  std::tuple<row_kernels<float>, row_kernels<half>, row_kernels<bfloat16>> rows;
  void (*rotate)(const rotation_part&, float*, std::size_t);
  void (*revert)(const rotation_part&, float*, std::size_t);
};

struct matmul_table {
  const char* isa;
  void (*multiply_floats)(const float_product&, const matmul_tile&);
  void (*multiply_integers)(const integer_product&, const matmul_tile&);
};

inline namespace TETROMINO_ISA {

/// Tables of the kernels of one backend.
template <class Kernels>
struct table_of {
  template <real T>
  static void dequantize_past_caches(const any_format& format, const packed_row<const std::uint8_t>& in,
                                     std::size_t cols, T* out) {
    if constexpr (requires { Kernels::dequantize_row_past_caches(format, in, cols, out); }) {
      Kernels::dequantize_row_past_caches(format, in, cols, out);
    } else {
      Kernels::dequantize_row(format, in, cols, out);
    }
  }
  template <real T, class Int8, class E4m3>
  static constexpr row_kernels<T> rows() {
    return {&Kernels::template amax<T>,           &Kernels::template quantize_row<T>,
            &Kernels::template dequantize_row<T>, &table_of::dequantize_past_caches<T>,
            &Int8::template quantize_int8_row<T>, &E4m3::template quantize_e4m3_row<T>};
  }
  /// `Int8` and `E4m3` are the same backend's for 8-bit activations.
  template <class Int8, class E4m3>
  static constexpr quantize_table quantize(const char* isa) {
    return {isa,
            {rows<float, Int8, E4m3>(), rows<half, Int8, E4m3>(), rows<bfloat16, Int8, E4m3>()},
            &Kernels::rotate,
            &Kernels::revert};
  }
  static constexpr matmul_table matmul(const char* isa) { return {isa, &Kernels::multiply, &Kernels::multiply}; }
};

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail
