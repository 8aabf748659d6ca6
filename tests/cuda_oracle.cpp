#include "check.hpp"

/// The numbers against the CUDA toolkit's own conversions, on the host: they are plain C++ there. Where the two differ
/// on purpose, a test says how.
#if __has_include( \
    <cuda_fp4.h>) && __has_include(<cuda_fp8.h>) && __has_include(<cuda_fp16.h>) && __has_include(<cuda_bf16.h>)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <tetromino/e2m1.hpp>
#include <tetromino/e4m3.hpp>
#include <tetromino/e8m0.hpp>
#include <tetromino/float16.hpp>
#include <tetromino/scaling.hpp>

#include "reference/floats.hpp"

#include <cmath>    // std::isnan, std::isfinite, std::ldexp
#include <cstdint>  // std::uint8_t, std::uint16_t, std::uint32_t
#include <limits>   // std::numeric_limits

namespace {

using reference::bits_of;
using reference::disagreements;
using tetromino::carry_of;
using tetromino::e2m1;
using tetromino::e4m3;
using tetromino::e8m0;
using tetromino::mx_exponent;
using tetromino::scale_rule;

/// One count for each conversion.
struct all_conversions {
  disagreements to_e2m1, to_e4m3, to_half, to_bfloat16, to_e8m0;

  void compare(float x) {
    const std::uint32_t bits = bits_of(x);
    to_e2m1.compare(bits, __nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest), e2m1::encode(x).bits);
    to_e8m0.compare(bits, __nv_cvt_float_to_e8m0(x, __NV_SATFINITE, cudaRoundZero), e8m0::encode(x).bits);
    if (std::isnan(x)) return;  // the signs and payloads of NaNs differ, see below
    to_e4m3.compare(bits, __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3), e4m3::encode(x).bits);
    to_half.compare(bits, __half_as_ushort(__float2half_rn(x)), tetromino::half(x).bits);
    to_bfloat16.compare(bits, __bfloat16_as_ushort(__float2bfloat16_rn(x)), tetromino::bfloat16(x).bits);
  }
  void check() const {
    for (const disagreements* found : {&to_e2m1, &to_e4m3, &to_half, &to_bfloat16, &to_e8m0}) {
      INFO(*found);
      CHECK(found->none());
    }
  }
};

/// Calls f(a) for finite floats a > 0 around each power of two times 1, 1.5, 1.75.
template <class F>
void block_maxima(F&& f) {
  for (int exponent = -149; exponent < 128; ++exponent) {
    for (const double mantissa : {1.0, 1.5, 1.75}) {
      reference::near(std::ldexp(mantissa, exponent), 64, [&](float a) {
        if (a > 0 && std::isfinite(a)) f(a);
      });
    }
  }
}

std::uint32_t scale_code(float a, scale_rule rule) { return e8m0::from_exponent(mx_exponent(a, carry_of(rule))).bits; }

}  // namespace

TEST_CASE("encoders agree with the CUDA toolkit: sampled floats, halves, bfloat16s") {
  all_conversions conversions;
  const auto compare = [&](float x) { conversions.compare(x); };
  reference::sampled_floats(reference::e2m1_table(), compare);
  reference::sampled_floats(reference::e4m3_table(), compare);
  reference::sampled_floats(reference::half_table(), compare);
  reference::sampled_floats(reference::bfloat16_table(), compare);
  reference::sixteen_bit_floats(compare);
  block_maxima(compare);
  conversions.check();
}

TEST_CASE("encoders agree with the CUDA toolkit: every float", "[.slow]") {
  all_conversions conversions;
  std::uint32_t bits = 0;
  do {
    conversions.compare(reference::float_of(bits));
  } while (++bits != 0);
  conversions.check();
}

TEST_CASE("decoders agree with the CUDA toolkit: every code") {
  disagreements found;
  for (unsigned code = 0; code < 16; ++code) {
    const __half expected(__nv_cvt_fp4_to_halfraw(static_cast<__nv_fp4_storage_t>(code), __NV_E2M1));
    found.compare(code, bits_of(__half2float(expected)),
                  bits_of(e2m1::from_bits(static_cast<std::uint8_t>(code)).value()));
  }
  for (unsigned code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    const float from_e4m3 = __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
    const float from_e8m0 = __bfloat162float(__nv_bfloat16(__nv_cvt_e8m0_to_bf16raw(byte)));
    if (std::isnan(from_e4m3)) {
      found.compare(code, 1, std::isnan(e4m3::from_bits(byte).value()) ? 1 : 0);
    } else {
      found.compare(code, bits_of(from_e4m3), bits_of(e4m3::from_bits(byte).value()));
    }
    if (std::isnan(from_e8m0)) {
      found.compare(code, 1, e8m0::from_bits(byte).is_nan() ? 1 : 0);
    } else {
      found.compare(code, bits_of(from_e8m0), bits_of(e8m0::from_bits(byte).value()));
    }
  }
  for (unsigned code = 0; code < 0x10000; ++code) {
    const auto bits = static_cast<std::uint16_t>(code);
    const float from_half = __half2float(__ushort_as_half(bits));
    const float from_bfloat16 = __bfloat162float(__ushort_as_bfloat16(bits));
    if (!std::isnan(from_half))
      found.compare(code, bits_of(from_half), bits_of(static_cast<float>(tetromino::half::from_bits(bits))));
    if (!std::isnan(from_bfloat16)) {
      found.compare(code, bits_of(from_bfloat16), bits_of(static_cast<float>(tetromino::bfloat16::from_bits(bits))));
    }
  }
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("where NaNs differ: the toolkit drops their sign, tetromino keeps it outside E2M1") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(__nv_cvt_float_to_fp8(-nan, __NV_SATFINITE, __NV_E4M3) == 0x7F);
  CHECK(e4m3::encode(-nan).bits == 0xFF);
  CHECK(__half_as_ushort(__float2half_rn(-nan)) == 0x7FFF);
  CHECK(tetromino::half(-nan).bits == 0xFE00);
  CHECK(__bfloat16_as_ushort(__float2bfloat16_rn(-nan)) == 0x7FFF);
  CHECK(tetromino::bfloat16(-nan).bits == 0xFFC0);
}

TEST_CASE("infinite scales: saturated here, NaN in the toolkit's unsaturated mode") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(__nv_cvt_float_to_e8m0(infinity, __NV_SATFINITE, cudaRoundZero) == e8m0::encode(infinity).bits);
  CHECK(__nv_cvt_float_to_e8m0(infinity, __NV_NOSAT, cudaRoundZero) == e8m0::nan_bits);
}

TEST_CASE("the floor and round_up rules are the toolkit's conversions of a / 4 and a / 6") {
  // Below 2^-123 the toolkit's callers divide into subnormals, which rounds before the scale is chosen; the rules here
  // compare exactly. Elsewhere both forms are one function.
  disagreements floor, round_up, floor_at_bottom, round_up_at_bottom;
  block_maxima([&](float a) {
    const bool bottom = a < 0x1p-123f;
    (bottom ? floor_at_bottom : floor)
        .compare(bits_of(a), __nv_cvt_float_to_e8m0(a / 4, __NV_SATFINITE, cudaRoundZero),
                 scale_code(a, scale_rule::floor));
    (bottom ? round_up_at_bottom : round_up)
        .compare(bits_of(a), __nv_cvt_float_to_e8m0(a / 6, __NV_SATFINITE, cudaRoundPosInf),
                 scale_code(a, scale_rule::round_up));
  });
  INFO(floor << "; " << round_up << "; at the bottom " << floor_at_bottom << "; " << round_up_at_bottom);
  CHECK(floor.none());
  CHECK(round_up.none());
  CHECK(floor_at_bottom.count == 1);     // the float before 2^-124: a / 4 rounds up to 2^-126
  CHECK(round_up_at_bottom.count == 1);  // the float after 6 · 2^-127: a / 6 rounds down to 2^-127
}

#else

TEST_CASE("the CUDA toolkit is not there, so there is nothing to compare with") {
  WARN("skipped: the headers of the CUDA toolkit are not installed");
}

TEST_CASE("nor with every float", "[.slow]") { WARN("skipped: the headers of the CUDA toolkit are not installed"); }

#endif
