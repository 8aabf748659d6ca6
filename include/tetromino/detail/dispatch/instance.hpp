#pragma once

/// One table of kernels for tetromino::cpu. A translation unit of that library consists of the inclusion of this
/// header, is compiled for one instruction set, and says what it is to hold:
///   TETROMINO_CPU_INSTANCE                     the name of its namespace, such as cpu_avx2
///   TETROMINO_CPU_ROWS, TETROMINO_CPU_MATMUL   1 for the table that it defines
/// Code outside that namespace must not be compiled into it: linkers keep one copy of an inline function, and it could
/// be one that the CPU at hand cannot run. Compile with optimization; tests/cpu_symbols.cmake looks at the outcome.

#include "../../config.hpp"  // TETROMINO_ISA

#if defined(TETROMINO_CPU_INSTANCE)
#include "../simd/isa.hpp"  // checked_set
#include "tables.hpp"       // quantize_table, matmul_table
#if TETROMINO_CPU_ROWS
#include "../simd/activations.hpp"       // simd_int8
#include "../simd/e4m3_activations.hpp"  // simd_e4m3
#include "../simd/quantize.hpp"          // simd_kernels
#else
#include "../simd/matmul.hpp"  // simd_matmul_kernels
#endif

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

template struct checked_set<this_set>;

#if TETROMINO_CPU_ROWS
extern const quantize_table rows_table;
constinit const quantize_table rows_table = table_of<simd_kernels>::quantize<simd_int8, simd_e4m3>(isa_name);
#else
extern const matmul_table products_table;
constinit const matmul_table products_table = table_of<simd_matmul_kernels>::matmul(isa_name);
#endif

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
