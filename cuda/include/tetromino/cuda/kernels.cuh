#pragma once

/// All kernels as templates, for those who compile CUDA themselves. Without it, link the target tetromino::cuda.

#include "block_scaled.cuh"   // operand_kernel, block_scaled_kernel
#include "dequantize.cuh"     // unpack_kernel
#include "matmul.cuh"         // prepare_kernel
#include "matmul_launch.cuh"  // hopper_kernel, portable_kernel
#include "moe.cuh"            // route_kernel, permute_kernel, combine_kernel
#include "quantize.cuh"       // pack_kernel
