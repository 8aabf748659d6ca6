#pragma once

/// Everything that needs the standard library alone (and xsimd for the `simd` policy). Opt-in headers, which need more,
/// are included by name: eigen.hpp, fmt.hpp, gptq.hpp, io/safetensors.hpp, comm/mpi.hpp, comm/nccl.hpp.

#include "dequantize.hpp"  // dequantize
#include "layout.hpp"      // layout::to_ggml, layout::as_gpt_oss
#include "metrics.hpp"     // qsnr, compare
#include "quantize.hpp"    // quantize, fake_quantize
#include "version.hpp"     // TETROMINO_VERSION_MAJOR
