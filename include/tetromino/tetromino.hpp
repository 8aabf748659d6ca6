#pragma once

#include "detail/macros_off.hpp"

/// Packing, unpacking, layouts and errors, on the `scalar`, `simd` and `automatic` policies. By name: simd.hpp
/// (products too), cpu.hpp, matmul.hpp, block_scaled.hpp, thread_executor.hpp, moe/…, and what needs more than the
/// standard library and xsimd: eigen.hpp, fmt.hpp, gptq.hpp, io/safetensors.hpp, comm/mpi.hpp, comm/nccl.hpp.

#include "dequantize.hpp"               // dequantize
#include "detail/simd/quantize_on.hpp"  // simd
#include "layout.hpp"                   // layout::to_ggml, layout::as_gpt_oss
#include "metrics.hpp"                  // qsnr, compare
#include "quantize.hpp"                 // quantize, fake_quantize
#include "version.hpp"                  // TETROMINO_VERSION_MAJOR

#include "detail/macros_back.hpp"
