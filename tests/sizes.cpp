#include "check.hpp"

/// Sizes whose products wrap: every door refuses them before it reads or allocates anything.

#include <tetromino/block_scaled.hpp>
#include <tetromino/e4m3_activations.hpp>
#include <tetromino/layout.hpp>
#include <tetromino/matmul.hpp>
#include <tetromino/repacked.hpp>
#include <tetromino/tetromino.hpp>

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t

using namespace tetromino;

namespace {

constexpr std::size_t huge = std::size_t{1} << 62;

template <class Result>
void check_refused(const Result& result) {
  REQUIRE(!result);
  CHECK(result.error().code() == errc::shape_mismatch);
  CHECK_THAT(result.error().what(), tetromino_test::contains("expected at most 281474976710656 elements, got ["));
}
/// Products count rows in 32 bits, and look at that first.
template <class Result>
void check_rows(const Result& result) {
  REQUIRE(!result);
  CHECK_THAT(result.error().what(), tetromino_test::contains("expected fewer than 2^32 rows, got"));
}
template <class F>
void check_thrown(const F& f) {
  const auto refused = [&]() -> result<void> {
    try {
      f();
    } catch (const error& e) {
      return e;
    }
    return {};
  };
  check_refused(refused());
}

}  // namespace

TEST_CASE("storage of more elements than there can be is not made") {
  check_thrown([] { matrix<float> m(huge, 4); });
  check_thrown([] { matrix<half> m(huge, huge, 0); });
  check_thrown([] { packed<mxfp4> p(mxfp4{}, 1, huge, 128); });
  check_thrown([] { packed<nvfp4> p(nvfp4{}, huge, 16, 1); });
  check_thrown([] { int8_matrix x(huge, 32); });
  check_thrown([] { e4m3_matrix x(huge, 32); });
  CHECK_NOTHROW(matrix<float>(std::size_t{1} << 48, 0));
}

TEST_CASE("rows without columns take no time, however many there are") {
  const std::size_t most = std::size_t{1} << 48;
  float number = 0;
  const batch_view<float> x(&number, 1, most, 0);
  CHECK(try_quantize_to(scalar, x, packed_view<any_format, std::uint8_t>{mxfp4{}, 1, most, 0, {}, {}, {}, {}}));
  CHECK(try_dequantize_to(scalar, packed_view<any_format>{mxfp4{}, 1, most, 0, {}, {}, {}, {}}, x));
  CHECK(try_quantize(scalar, x, recipe::parse("mxfp4-32/oas/mbs-search/hadamard-32")));
  CHECK(amax(scalar, x) == 0.0f);
}

TEST_CASE("no room is made for what storage only claims") {
  const packed_view<any_format> claims{mxfp4{}, 1, std::size_t{1} << 41, 64, {}, {}, {}, {}};
  CHECK(layout::try_to_ggml(claims).error().code() == errc::shape_mismatch);
  CHECK(layout::try_swizzled_scales(claims).error().code() == errc::shape_mismatch);
  CHECK(try_dequantize<float>(scalar, claims).error().code() == errc::shape_mismatch);
  CHECK(try_repack(scalar, claims).error().code() == errc::shape_mismatch);
}

TEST_CASE("storage that claims them is refused") {
  const packed_view<any_format> linear{mxfp4{}, 1, huge, 128, {}, {}, {}, {}};
  const repacked_view ordered{mxfp4{}, 1, huge, 128, {}, {}};
  const int8_view<> activations{huge, 128, {}, {}};
  float number = 0;
  const batch_view<float> out(&number, 1, huge, 128);
  check_refused(try_dequantize_to(scalar, linear, out));
  check_refused(try_dequantize<float>(scalar, linear));
  check_refused(try_repack(scalar, linear));
  check_refused(try_to_packed(scalar, ordered));
  const packed<mxfp4> w(mxfp4{}, 1, 1, 128);
  check_rows(try_matmul(scalar, activations, w, matrix_view<float>(&number, huge, 1)));
  check_rows(try_matmul(scalar, linear, w, matrix_view<float>(&number, huge, 1)));
  check_refused(
      try_matmul(scalar, matrix_view<const float>(&number, 1, 128), ordered, matrix_view<float>(&number, 1, huge)));
  check_refused(layout::try_to_ggml(linear));
  check_refused(layout::try_as_gpt_oss(linear));
  check_refused(layout::try_as_compressed_tensors(linear));
  check_refused(layout::try_from_modelopt({}, 1, huge, 128));
  check_refused(try_repack(scalar, linear, block_scaled_kind::e8m0_32));
}

TEST_CASE("matrices that claim them are refused") {
  float number = 0;
  const matrix_view<float> x(&number, huge, 128);
  check_refused(try_quantize(scalar, x, recipe::parse("mxfp4-32/oas")));
  check_refused(try_quantize<nvfp4>(scalar, x));
  check_refused(try_quantize_to(scalar, x, packed_view<mxfp4, std::uint8_t>{mxfp4{}, 1, huge, 128, {}, {}, {}, {}}));
  check_refused(try_fake_quantize(scalar, x, recipe::parse("mxfp4-32/oas"), x));
  check_refused(try_rotate(scalar, x, hadamard{}, x));
  check_refused(try_quantize_int8(scalar, x));
  check_refused(try_quantize_e4m3(scalar, x));
  check_refused(try_quantize_e4m3_to(scalar, x, e4m3_view<std::uint8_t>{huge, 128, {}, {}}));
  const packed<mxfp4> w(mxfp4{}, 1, 1, 128);
  check_rows(try_matmul(scalar, x, w, matrix_view<float>(&number, huge, 1)));
}
