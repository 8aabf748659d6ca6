#pragma once

/// All kernels as templates, for those who compile CUDA themselves. Without it, link the target tetromino::cuda.

#include "gemm/block_scaled_operand.cuh"  // operand_kernel
#include "gemm/e4m3_launch.cuh"           // e4m3_rows_kernel
#include "gemm/launch.cuh"                // many_rows_kernel ...
#include "gemm/matmul.cuh"                // repack_kernel
#include "gemm/sm120a_block_scaled.cuh"   // block_scaled_kernel
#include "pack/dequantize.cuh"            // unpack_kernel
#include "pack/e4m3_rows.cuh"             // e4m3_rows_kernel
#include "pack/quantize.cuh"              // pack_kernel
#include "route/group.cuh"                // group_kernel
#include "route/move.cuh"                 // permute_kernel, combine_kernel
#include "route/route.cuh"                // token_per_warp_kernel ...
