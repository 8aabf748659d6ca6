#include "check.hpp"

#include <tetromino/dequantize.hpp>
#include <tetromino/thread_executor.hpp>

#include <tetromino/quantize.hpp>

#include "support/fastest.hpp"
#include "support/oracle.hpp"

#include <cmath>    // std::isnan, std::isinf
#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t, std::uint16_t
#include <span>     // std::span
#include <string>   // std::string
#include <vector>   // std::vector

namespace {

using namespace tetromino;
using tetromino_test::fastest;
using tetromino_test::first_difference;

/// The formats, all macro-block sizes among them.
std::vector<any_format> formats() {
  std::vector<any_format> out{mxfp4{}, mxfp4_16{}, nvfp4{}};
  for (const std::size_t block : {16u, 32u}) {
    for (const std::size_t macro : {32u, 64u, 128u, 256u}) out.push_back({scale_type::e8m0, block, macro});
    if (block == 32) out.insert(out.end(), {mbs<mxfp4, 8, 2>{}, mbs<mxfp4, 16, 2>{}});
  }
  return out;
}

/// Storage of random bytes: every code, scale (NaN and negative ones too), macro-block byte and any tensor scale.
packed<any_format> random_storage(const any_format& format, std::size_t matrices, std::size_t rows, std::size_t cols,
                                  reference::generator& random) {
  packed<any_format> out(format, matrices, rows, cols, random.below(2) == 0 ? 1 : matrices);
  for (auto* bytes : {&out.codes, &out.scales, &out.macros}) {
    for (std::uint8_t& byte : *bytes) byte = static_cast<std::uint8_t>(random.bits());
  }
  for (float& scale : out.tensor_scales)
    scale = std::ldexp(static_cast<float>(random.normal()), static_cast<int>(random.below(60)) - 30);
  return out;
}

std::vector<float> expected_values(const packed<any_format>& p) {
  reference::recipe r;
  r.nv = p.format.scale == scale_type::e4m3;
  r.block = p.format.block;
  r.macro = p.format.macro_block;
  r.fine = p.format.macro_bits == 2 ? p.format.macro_block / 4 : 0;
  reference::packed same{p.matrices, p.rows, p.cols, p.codes, p.scales, p.macros, {}};
  for (std::size_t e = 0; e < p.matrices; ++e) same.tensor_scales.push_back(p.view().tensor_scale(e));
  return reference::dequantize(r, same);
}

/// Unpacks into strided memory of type T and compares bit by bit; the gaps must stay as they were.
template <class T, class Policy>
std::string unpack_and_compare(const Policy& policy, const packed<any_format>& p, reference::generator& random) {
  std::vector<float> expected;
  for (const float x : expected_values(p)) {
    expected.push_back(tetromino_test::value_of(tetromino_test::number<T>(x)));
  }
  const std::size_t row_stride = p.cols + random.below(2) * random.below(9);
  const std::size_t matrix_stride = p.rows * row_stride + 1 + random.below(9);
  const std::size_t offset = random.below(9);
  const T gap = tetromino_test::number<T>(-12345.0f);
  std::vector<T> memory(offset + p.matrices * matrix_stride + 40, gap);
  dequantize_to(policy, p,
                batch_view<T>(memory.data() + offset, p.matrices, p.rows, p.cols, row_stride, matrix_stride));

  std::vector<float> got;
  std::size_t untouched = 0;
  for (std::size_t i = 0; i < memory.size(); ++i) {
    const std::size_t e = i < offset ? p.matrices : (i - offset) / matrix_stride;
    const std::size_t within = i < offset ? 0 : (i - offset) % matrix_stride;
    const bool is_element = e < p.matrices && within < p.rows * row_stride && within % row_stride < p.cols;
    if (is_element) got.push_back(tetromino_test::value_of(memory[i]));
    if (!is_element && tetromino_test::value_of(memory[i]) == tetromino_test::value_of(gap)) ++untouched;
  }
  if (untouched + got.size() != memory.size()) return "wrote outside the elements";
  for (std::size_t i = 0; i < got.size() && i < expected.size(); ++i) {
    if (expected[i] == 0 && got[i] == 0 && std::signbit(expected[i]) != std::signbit(got[i]))
      return "sign of zero at " + std::to_string(i);
  }
  return first_difference("elements", expected, got);
}

/// Every code under every scale and, in a format that has them, every macro-block byte.
void check_all_codes(const any_format& format) {
  reference::generator random(tetromino_test::seed());
  // One row for each scale byte; a macro block for each macro-block byte, 16 codes in each block.
  const std::size_t cols = format.macro_block == 0 ? format.block : 256 * format.macro_block;
  packed<any_format> p(format, 1, 256, cols);
  for (std::size_t i = 0; i < p.codes.size(); ++i) p.codes[i] = static_cast<std::uint8_t>(i % 8 * 0x22 + 0x10);
  for (std::size_t i = 0; i < p.scales.size(); ++i)
    p.scales[i] = static_cast<std::uint8_t>(i / p.shape().blocks_per_row());
  for (std::size_t i = 0; i < p.macros.size(); ++i) p.macros[i] = static_cast<std::uint8_t>(i);
  for (float& scale : p.tensor_scales) scale = 0.0123f;
  INFO("block " << format.block << ", macro block " << format.macro_block);
  CHECK(unpack_and_compare<float>(scalar, p, random) == "");
  CHECK(unpack_and_compare<float>(fastest, p, random) == "");
  CHECK(unpack_and_compare<half>(fastest, p, random) == "");
  CHECK(unpack_and_compare<bfloat16>(fastest, p, random) == "");
}

}  // namespace

TEST_CASE("random bytes unpack into what the oracle unpacks, K = 0 ... 300, every output type") {
  reference::generator random(tetromino_test::seed());
  for (const any_format& format : formats()) {
    for (std::size_t cols = 0; cols <= 300; ++cols) {
      const packed<any_format> p = random_storage(format, 1 + random.below(3), random.below(4), cols, random);
      INFO("block " << format.block << ", macro block " << format.macro_block << ", [" << p.matrices << ", " << p.rows
                    << ", " << cols << "]");
      REQUIRE(unpack_and_compare<float>(scalar, p, random) == "");
      REQUIRE(unpack_and_compare<half>(scalar, p, random) == "");
      REQUIRE(unpack_and_compare<bfloat16>(scalar, p, random) == "");
      REQUIRE(unpack_and_compare<float>(fastest, p, random) == "");
      REQUIRE(unpack_and_compare<half>(fastest, p, random) == "");
      REQUIRE(unpack_and_compare<bfloat16>(fastest, p, random) == "");
    }
  }
}

TEST_CASE("every code under every scale and every macro-block byte") {
  for (const any_format& format : formats()) {
    if (format.macro_block <= 32) check_all_codes(format);
  }
}

TEST_CASE("every code under every scale and every macro-block byte: large macro blocks", "[.slow]") {
  for (const any_format& format : formats()) {
    if (format.macro_block > 32) check_all_codes(format);
  }
}

TEST_CASE("NaN scales make NaN blocks, large ones overflow to infinity") {
  packed<mxfp4> p({}, 1, 1, 64);
  for (std::uint8_t& pair : p.codes) pair = 0x70;  // 0, 6, 0, 6 …
  p.scales[0] = e8m0::nan_bits;
  p.scales[1] = 254;
  const matrix<float> x = dequantize<float>(fastest, p);
  for (std::size_t k = 0; k < 32; ++k) CHECK(std::isnan(x(0, k)));
  for (std::size_t k = 32; k < 64; k += 2) {
    CHECK(x(0, k) == 0);
    CHECK(std::isinf(x(0, k + 1)));
  }
  const matrix<half> y = dequantize<half>(fastest, p);
  CHECK(std::isnan(float(y(0, 0))));
  CHECK(std::isinf(float(y(0, 33))));
}

TEST_CASE("unpacking what was packed gives the same elements again") {
  // Values that a format can hold are fixed points: packing them again changes nothing.
  reference::generator random(tetromino_test::seed());
  for (const char* name : {"mxfp4-32/floor", "mxfp4-16/floor", "mxfp4-32/min-error", "mxfp4-16/min-error"}) {
    const recipe r = recipe::parse(name);
    for (int i = 0; i < 50; ++i) {
      tetromino_test::sample<float> x(random, 1, 3, 1 + random.below(200));
      x.fill([&] { return static_cast<float>(random.normal()); });
      const matrix<float> once = dequantize<float>(fastest, quantize(fastest, x.view, r));
      const matrix<float> twice = dequantize<float>(fastest, quantize(fastest, once, r));
      INFO(name);
      REQUIRE(once.data == twice.data);
    }
  }
}

TEST_CASE("any split of the work unpacks the same") {
  reference::generator random(tetromino_test::seed());
  const thread_executor threads(3);
  for (const any_format& format : formats()) {
    const packed<any_format> p = random_storage(format, 2, 90, 1003, random);
    CHECK(unpack_and_compare<float>(fastest.on(threads), p, random) == "");
    CHECK(unpack_and_compare<bfloat16>(scalar.on(threads), p, random) == "");
  }
}

TEST_CASE("storage or output that does not fit is refused") {
  packed<mxfp4> p({}, 2, 3, 40);
  const auto code = [&](std::size_t matrices, std::size_t rows, std::size_t cols) {
    matrix<float> out(matrices, rows, cols);
    const auto done = try_dequantize_to(scalar, p, out.view());
    REQUIRE(!done);
    return done.error().code();
  };
  CHECK(code(1, 3, 40) == errc::shape_mismatch);
  CHECK(code(2, 2, 40) == errc::shape_mismatch);
  CHECK(code(2, 3, 41) == errc::shape_mismatch);
  p.scales.pop_back();
  CHECK(code(2, 3, 40) == errc::shape_mismatch);
  CHECK_THROWS_AS(dequantize<float>(fastest, p), tetromino::error);
  packed<any_format> odd(mxfp4{}, 1, 1, 32);
  odd.format.block = 8;
  CHECK_THROWS_WITH(dequantize<float>(fastest, odd), tetromino_test::contains("block 8"));
  odd.format.block = 0;
  CHECK_THROWS_WITH(dequantize<float>(fastest, odd), tetromino_test::contains("block 0"));
}
