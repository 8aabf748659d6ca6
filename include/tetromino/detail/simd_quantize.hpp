#pragma once

#include "scalar_quantize.hpp"  // scalar_kernels

namespace tetromino::detail {

/// Row kernels on vectors; byte for byte what scalar_kernels give.
struct simd_kernels : scalar_kernels {};

}  // namespace tetromino::detail
