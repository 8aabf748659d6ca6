#pragma once

/// What tetromino::cpu is made of: tables of kernels, one for each instruction set, and the choice between them.

#include "../../error.hpp"       // result
#include "../../options.hpp"     // special_values
#include "../cpu_matmul.hpp"     // float_product, integer_product, matmul_tile
#include "../rotation_part.hpp"  // rotation_part
#include "../row.hpp"            // row_rules, input_row, packed_row

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <span>         // std::span
#include <string_view>  // std::string_view
#include <tuple>        // std::tuple, std::get

namespace TETROMINO_NAMESPACE::detail {

/// The kernels for rows of one element type; see scalar_kernels and scalar_int8.
template <real T>
struct row_kernels {
  float (*amax)(const T*, std::size_t, special_values);
  std::size_t (*quantize)(const row_rules&, const input_row<T>&, const packed_row<std::uint8_t>&);
  void (*dequantize)(const any_format&, const packed_row<const std::uint8_t>&, std::size_t, T*);
  void (*dequantize_past_caches)(const any_format&, const packed_row<const std::uint8_t>&, std::size_t, T*);
  std::size_t (*quantize_int8)(const T*, std::size_t, std::int8_t*, float*);
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

/// The kernels of one instruction set, under the name that TETROMINO_FORCE_BACKEND knows.
struct cpu_kernels {
  std::string_view name;
  const quantize_table* quantize;
  const matmul_table* matmul;
};

/// The kernels that this CPU can run, from the slowest to the fastest; the scalar ones come first.
std::span<const cpu_kernels> supported_kernels();
/// The kernels of that name, or the fastest where `name` is null or empty. Errors: unknown_name; invalid_argument for a
/// name that is known but that this CPU, or this build, has not.
result<const cpu_kernels*> choose_kernels(const char* name);
/// Those that TETROMINO_FORCE_BACKEND names, or the fastest; decided once.
const result<const cpu_kernels*>& default_kernels();

inline namespace TETROMINO_ISA {

/// A table, in the shape in which quantize_cpu and matmul_cpu expect kernels.
struct dispatched_rows {
  const quantize_table* table;

  template <real T>
  const row_kernels<T>& of() const {
    return std::get<row_kernels<T>>(table->rows);
  }
  template <real T>
  float amax(const T* x, std::size_t n, special_values special) const {
    return of<T>().amax(x, n, special);
  }
  template <real T>
  std::size_t quantize_row(const row_rules& rules, const input_row<T>& in, const packed_row<std::uint8_t>& out) const {
    return of<T>().quantize(rules, in, out);
  }
  template <real T>
  void dequantize_row(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t cols,
                      T* out) const {
    of<T>().dequantize(format, in, cols, out);
  }
  template <real T>
  void dequantize_row_past_caches(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t cols,
                                  T* out) const {
    of<T>().dequantize_past_caches(format, in, cols, out);
  }
  template <real T>
  std::size_t quantize_int8_row(const T* x, std::size_t cols, std::int8_t* values, float* scales) const {
    return of<T>().quantize_int8(x, cols, values, scales);
  }
  void rotate(const rotation_part& part, float* row, std::size_t n) const { table->rotate(part, row, n); }
  void revert(const rotation_part& part, float* row, std::size_t n) const { table->revert(part, row, n); }
};
struct dispatched_matmul {
  static constexpr std::size_t tile_rows = 64, tile_cols = 128;
  const matmul_table* table;

  void multiply(const float_product& product, const matmul_tile& tile) const { table->multiply_floats(product, tile); }
  void multiply(const integer_product& product, const matmul_tile& tile) const {
    table->multiply_integers(product, tile);
  }
};

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
  template <real T, class Int8>
  static constexpr row_kernels<T> rows() {
    return {&Kernels::template amax<T>, &Kernels::template quantize_row<T>, &Kernels::template dequantize_row<T>,
            &table_of::dequantize_past_caches<T>, &Int8::template quantize_int8_row<T>};
  }
  /// `Int8` are the same backend's for 8-bit activations.
  template <class Int8>
  static constexpr quantize_table quantize(const char* isa) {
    return {isa, {rows<float, Int8>(), rows<half, Int8>(), rows<bfloat16, Int8>()}, &Kernels::rotate, &Kernels::revert};
  }
  static constexpr matmul_table matmul(const char* isa) { return {isa, &Kernels::multiply, &Kernels::multiply}; }
};

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail
