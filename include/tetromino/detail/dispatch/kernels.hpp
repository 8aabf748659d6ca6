#pragma once

/// What tetromino::cpu holds for those who link it: the choice between tables of kernels, one for each instruction set,
/// and the calls that use them.

#include "../../activations.hpp"       // quantize_int8_job
#include "../../e4m3_activations.hpp"  // quantize_e4m3_job
#include "../../error.hpp"             // result
#include "../../hadamard.hpp"          // rotate_job
#include "../../options.hpp"           // quantize_job
#include "../cpu_matmul.hpp"           // float_product, integer_product

#include <cstdint>      // std::uint32_t
#include <span>         // std::span
#include <string_view>  // std::string_view

namespace TETROMINO_NAMESPACE::detail {

struct quantize_table;
struct matmul_table;

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

/// What hooks of policies do, with these kernels; see quantize.hpp. T is float, half or bfloat16: a concept here would
/// be part of the name for some compilers alone.
template <class T>
result<void> quantize_with(const cpu_kernels& kernels, executor_ref executor, const quantize_job<T>& job);
template <class T>
result<void> fake_quantize_with(const cpu_kernels& kernels, executor_ref executor, const fake_quantize_job<T>& job);
template <class T>
void amax_with(const cpu_kernels& kernels, executor_ref executor, const batch_view<const T>& in, special_values special,
               std::span<float> out);
template <class T>
void rotate_with(const cpu_kernels& kernels, executor_ref executor, const rotate_job<T>& job);
template <class T>
result<void> dequantize_with(const cpu_kernels& kernels, executor_ref executor, const dequantize_job<T>& job);
template <class T>
result<void> quantize_int8_with(const cpu_kernels& kernels, executor_ref executor, const quantize_int8_job<T>& job);
template <class T>
result<void> quantize_e4m3_with(const cpu_kernels& kernels, executor_ref executor, const quantize_e4m3_job<T>& job);
void multiply_with(const cpu_kernels& kernels, executor_ref executor, const float_product& product,
                   std::span<const std::uint32_t> row_offsets);
void multiply_with(const cpu_kernels& kernels, executor_ref executor, const integer_product& product,
                   std::span<const std::uint32_t> row_offsets);

}  // namespace TETROMINO_NAMESPACE::detail
