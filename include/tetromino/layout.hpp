#pragma once

#include "detail/macros_off.hpp"

/// How other engines store the same 4-bit blocks. gpt-oss, compressed-tensors and ModelOpt keep the bytes of the linear
/// layout, so those are views, without a copy; ggml, interleaved rows and swizzled scales are other orders of the same
/// bytes, into storage that must not overlap the source. Nothing is ever rounded: the way there and back gives the same
/// bytes, and what a layout cannot hold is an error:
///   - formats that it does not have, and rows that do not end with a whole block
///   - block scales that its readers take for another value: NaN (made by the `poison` policy), negative ones
///   - tensor scales without an exact inverse, for compressed-tensors alone: see `invertible`
/// After an error, what the output holds is unspecified.

#include "layout/compressed_tensors.hpp"  // as_compressed_tensors, from_compressed_tensors
#include "layout/ggml.hpp"                // to_ggml, from_ggml
#include "layout/gpt_oss.hpp"             // as_gpt_oss, from_gpt_oss, interleave_rows
#include "layout/modelopt.hpp"            // as_modelopt, from_modelopt
#include "layout/swizzle.hpp"             // swizzle_scales, unswizzle_scales

#include "detail/macros_back.hpp"
