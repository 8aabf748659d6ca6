#pragma once

/// What tetromino::cpu does with a table of kernels, whatever their instruction set. select.hpp compiles the calls.

#include "../cpu_backend.hpp"  // quantize_cpu
#include "kernels.hpp"         // cpu_kernels
#include "tables.hpp"          // quantize_table, matmul_table

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t, std::uint32_t
#include <span>     // std::span
#include <tuple>    // std::get

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// A table, in the shape in which quantize_cpu and multiply_tiles expect kernels.
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
  template <real T>
  std::size_t quantize_e4m3_row(const T* x, std::size_t cols, std::uint8_t* values, float& scale) const {
    return of<T>().quantize_e4m3(x, cols, values, scale);
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

}  // namespace TETROMINO_ISA

#if defined(TETROMINO_CPU_SELECT)

template <class T>
result<void> quantize_with(const cpu_kernels& kernels, executor_ref executor, const quantize_job<T>& job) {
  return quantize_cpu(executor, job, dispatched_rows{kernels.quantize});
}
template <class T>
result<void> fake_quantize_with(const cpu_kernels& kernels, executor_ref executor, const fake_quantize_job<T>& job) {
  return fake_quantize_cpu(executor, job, dispatched_rows{kernels.quantize});
}
template <class T>
void amax_with(const cpu_kernels& kernels, executor_ref executor, const batch_view<const T>& in, special_values special,
               std::span<float> out) {
  const dispatched_rows rows{kernels.quantize};
  const auto row_amax = [&](const T* x, std::size_t cols) { return rows.amax(x, cols, special); };
  amax_cpu<T>(executor, in, row_amax, out);
}
template <class T>
void rotate_with(const cpu_kernels& kernels, executor_ref executor, const rotate_job<T>& job) {
  rotate_cpu(executor, job, dispatched_rows{kernels.quantize});
}
template <class T>
result<void> dequantize_with(const cpu_kernels& kernels, executor_ref executor, const dequantize_job<T>& job) {
  return dequantize_cpu(executor, job, dispatched_rows{kernels.quantize});
}
template <class T>
result<void> quantize_int8_with(const cpu_kernels& kernels, executor_ref executor, const quantize_int8_job<T>& job) {
  return quantize_int8_cpu(executor, job, dispatched_rows{kernels.quantize});
}
template <class T>
result<void> quantize_e4m3_with(const cpu_kernels& kernels, executor_ref executor, const quantize_e4m3_job<T>& job) {
  return quantize_e4m3_cpu(executor, job, dispatched_rows{kernels.quantize});
}
void multiply_with(const cpu_kernels& kernels, executor_ref executor, const float_product& product,
                   std::span<const std::uint32_t> row_offsets) {
  multiply_tiles(executor, product, row_offsets, dispatched_matmul{kernels.matmul});
}
void multiply_with(const cpu_kernels& kernels, executor_ref executor, const integer_product& product,
                   std::span<const std::uint32_t> row_offsets) {
  multiply_tiles(executor, product, row_offsets, dispatched_matmul{kernels.matmul});
}

#define TETROMINO_CPU_JOBS_OF(T)                                                                           \
  template result<void> quantize_with(const cpu_kernels&, executor_ref, const quantize_job<T>&);           \
  template result<void> fake_quantize_with(const cpu_kernels&, executor_ref, const fake_quantize_job<T>&); \
  template void amax_with(const cpu_kernels&, executor_ref, const batch_view<const T>&, special_values,    \
                          std::span<float>);                                                               \
  template void rotate_with(const cpu_kernels&, executor_ref, const rotate_job<T>&);                       \
  template result<void> dequantize_with(const cpu_kernels&, executor_ref, const dequantize_job<T>&);       \
  template result<void> quantize_int8_with(const cpu_kernels&, executor_ref, const quantize_int8_job<T>&); \
  template result<void> quantize_e4m3_with(const cpu_kernels&, executor_ref, const quantize_e4m3_job<T>&);
TETROMINO_CPU_JOBS_OF(float)
TETROMINO_CPU_JOBS_OF(half)
TETROMINO_CPU_JOBS_OF(bfloat16)
#undef TETROMINO_CPU_JOBS_OF

#endif

}  // namespace TETROMINO_NAMESPACE::detail
