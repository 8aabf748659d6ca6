#include "check.hpp"

#include <tetromino/layout.hpp>
#include <tetromino/layout/ggml_rows.hpp>
#include <tetromino/thread_executor.hpp>

#include <tetromino/dequantize.hpp>
#include <tetromino/quantize.hpp>

#include "reference/layouts.hpp"
#include "support/fastest.hpp"

#include <algorithm>  // std::count, std::count_if
#include <bit>        // std::bit_cast
#include <cmath>      // std::fabs
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <limits>     // std::numeric_limits
#include <random>     // std::mt19937_64
#include <string>     // std::string
#include <vector>     // std::vector

namespace layout = tetromino::layout;
using bytes = std::vector<std::uint8_t>;
using tetromino::errc;
using tetromino::packed;
using tetromino::scalar;
using tetromino_test::contains;

namespace {

struct dims {
  std::size_t matrices, rows, cols;
};
const std::vector<dims> whole_shapes{{1, 1, 64},      {1, 3, 128}, {3, 5, 192}, {1, 129, 64}, {2, 7, 2880},
                                     {1, 2880, 2880}, {2, 0, 64},  {0, 3, 64},  {1, 4, 0}};

/// Storage with random codes and with random scale bytes up to `largest_scale`.
template <class Format>
packed<Format> random_storage(Format format, dims d, std::uint64_t salt, std::size_t tensor_scales = 1,
                              unsigned largest_scale = 0x7E) {
  std::mt19937_64 random(tetromino_test::seed() + salt);
  packed<Format> out(format, d.matrices, d.rows, d.cols, tensor_scales);
  for (auto& code : out.codes) code = static_cast<std::uint8_t>(random());
  for (auto& scale : out.scales) scale = static_cast<std::uint8_t>(random() % (largest_scale + 1));
  for (auto& macro : out.macros) macro = static_cast<std::uint8_t>(random());
  for (auto& scale : out.tensor_scales) scale = layout::invertible(1e-4f + static_cast<float>(random() % 4096) * 1e-6f);
  return out;
}

template <class Format>
bool same(const packed<Format>& a, const packed<Format>& b) {
  return a.codes == b.codes && a.scales == b.scales && a.macros == b.macros && a.tensor_scales == b.tensor_scales &&
         a.shape() == b.shape();
}

/// Builds a foreign layout's bytes from linear ones by formula, element by element.
template <class Format, class CodeAt, class ScaleAt>
bytes by_formula(const packed<Format>& in, std::size_t size, CodeAt code_at, ScaleAt scale_at) {
  bytes out(size);
  const std::size_t K = in.cols;
  for (std::size_t r = 0; r < in.matrices * in.rows; ++r) {
    for (std::size_t k = 0; k < K; ++k) {
      const unsigned code = reference::nibble_at(in.codes.data(), reference::linear_code(r, k, K));
      const auto to = code_at(r, k, K);
      out.at(to.byte) = static_cast<std::uint8_t>(out.at(to.byte) | code << (4 * to.half));
      out.at(scale_at(r, k, K)) = in.scales.at(reference::linear_scale(r, k, K, Format::block));
    }
  }
  return out;
}

template <class Result>
std::string refusal(const Result& outcome, errc code) {
  REQUIRE_FALSE(outcome);
  CHECK(outcome.error().code() == code);
  return outcome.error().what();
}

}  // namespace

TEST_CASE("ggml blocks hold every code and scale where the formula says, and come back the same") {
  for (const dims d : whole_shapes) {
    INFO("[" << d.matrices << ", " << d.rows << ", " << d.cols << "]");
    const std::size_t elements = d.matrices * d.rows * d.cols;
    {
      const auto in = random_storage(tetromino::mxfp4{}, d, 1, 1, 0xFE);
      REQUIRE(layout::ggml_bytes(in.shape()) == elements / 32 * 17);
      const bytes blocks = layout::to_ggml(in);
      CHECK(blocks == by_formula(in, elements / 32 * 17, reference::ggml_mxfp4_code, reference::ggml_mxfp4_scale));
      CHECK(same(layout::from_ggml(tetromino::mxfp4{}, blocks, d.matrices, d.rows, d.cols), in));
      CHECK(same(layout::from_ggml(tetromino::any_format(tetromino::mxfp4{}), blocks, d.matrices, d.rows, d.cols),
                 random_storage(tetromino::any_format(tetromino::mxfp4{}), d, 1, 1, 0xFE)));
    }
    for (const std::size_t tensor_scales : {std::size_t{1}, d.matrices}) {
      const auto in = random_storage(tetromino::nvfp4{}, d, 2, tensor_scales);
      REQUIRE(layout::ggml_bytes(in.shape()) == elements / 64 * 36);
      const bytes blocks = layout::to_ggml(in);
      CHECK(blocks == by_formula(in, elements / 64 * 36, reference::ggml_nvfp4_code, reference::ggml_nvfp4_scale));
      CHECK(same(layout::from_ggml(tetromino::nvfp4{}, blocks, d.matrices, d.rows, d.cols, in.tensor_scales), in));
      packed<tetromino::nvfp4> out(tetromino::nvfp4{}, d.matrices, d.rows, d.cols, tensor_scales);
      out.tensor_scales = in.tensor_scales;
      layout::from_ggml(blocks, out.view());
      CHECK(same(out, in));
    }
  }
}

TEST_CASE("ggml decodes its blocks to the values that they were made from") {
  std::mt19937_64 random(tetromino_test::seed());
  std::normal_distribution<float> normal;
  tetromino::matrix<float> x(2, 3, 128);
  for (float& value : x.data) value = normal(random);

  const auto mx = tetromino::quantize<tetromino::mxfp4>(tetromino::scalar, x);
  const auto mx_values = tetromino::dequantize<float>(tetromino::scalar, mx);
  const bytes mx_blocks = layout::to_ggml(mx);
  const auto nv = tetromino::quantize<tetromino::nvfp4>(tetromino::scalar, x);
  const auto nv_values = tetromino::dequantize<float>(tetromino::scalar, nv);
  const bytes nv_blocks = layout::to_ggml(nv);
  std::size_t wrong = 0;
  for (std::size_t r = 0; r < 6; ++r) {
    for (std::size_t k = 0; k < 128; ++k) {
      const double a =
          reference::ggml_mxfp4_value(reference::nibble_at(mx_blocks.data(), reference::ggml_mxfp4_code(r, k, 128)),
                                      mx_blocks[reference::ggml_mxfp4_scale(r, k, 128)]);
      wrong += a != static_cast<double>(mx_values.data[r * 128 + k]);
      const double b =
          reference::ggml_nvfp4_value(reference::nibble_at(nv_blocks.data(), reference::ggml_nvfp4_code(r, k, 128)),
                                      nv_blocks[reference::ggml_nvfp4_scale(r, k, 128)]);
      const double expected = static_cast<double>(nv_values.data[r * 128 + k]);
      wrong += std::fabs(b * static_cast<double>(nv.tensor_scales[0]) - expected) > 1e-6 * std::fabs(expected);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("gpt-oss and ModelOpt tensors are the linear bytes") {
  for (const dims d : whole_shapes) {
    INFO("[" << d.matrices << ", " << d.rows << ", " << d.cols << "]");
    const auto mx = random_storage(tetromino::mxfp4{}, d, 3, 1, 0xFE);
    const auto gpt_oss = layout::as_gpt_oss(mx);
    CHECK(gpt_oss.blocks.data() == mx.codes.data());
    const std::size_t elements = d.matrices * d.rows * d.cols;
    const bytes expected =
        by_formula(mx, elements / 2, reference::gpt_oss_code, [](auto...) { return std::size_t{0}; });
    if (elements > 0) CHECK(std::equal(gpt_oss.blocks.begin() + 1, gpt_oss.blocks.end(), expected.begin() + 1));
    std::size_t wrong = 0;
    for (std::size_t r = 0; r < d.matrices * d.rows; ++r) {
      for (std::size_t k = 0; k < d.cols; k += 32) {
        wrong += gpt_oss.scales[reference::gpt_oss_scale(r, k, d.cols)] !=
                 mx.scales[reference::linear_scale(r, k, d.cols, 32)];
      }
    }
    CHECK(wrong == 0);
    const auto back = layout::from_gpt_oss(gpt_oss, d.matrices, d.rows, d.cols);
    CHECK(back.shape() == mx.shape());
    CHECK(back.codes.data() == mx.codes.data());
    CHECK(back.scales.data() == mx.scales.data());

    for (const std::size_t tensor_scales : {std::size_t{1}, d.matrices}) {
      const auto nv = random_storage(tetromino::nvfp4{}, d, 4, tensor_scales, 0xFF);
      const auto modelopt = layout::as_modelopt(nv);
      const auto same_nv = layout::from_modelopt(modelopt, d.matrices, d.rows, d.cols);
      CHECK(modelopt.weight.data() == nv.codes.data());
      CHECK(modelopt.weight_scale.data() == nv.scales.data());
      CHECK(modelopt.weight_scale_2.data() == nv.tensor_scales.data());
      CHECK(modelopt.weight_scale_2.size() == tensor_scales);
      CHECK(same_nv.codes.data() == nv.codes.data());
      CHECK(same_nv.scales.size() == nv.scales.size());
      CHECK(same_nv.tensor_scales.data() == nv.tensor_scales.data());
    }
  }
}

TEST_CASE("compressed-tensors keeps the bytes and inverts the tensor scales, exactly or not at all") {
  const dims d{3, 5, 192};
  const auto nv = random_storage(tetromino::nvfp4{}, d, 5, 3, 0xFF);
  std::vector<float> global_scales(3), tensor_scales(3);
  const auto there = layout::as_compressed_tensors(nv, global_scales);
  CHECK(there.weight_packed.data() == nv.codes.data());
  CHECK(there.weight_scale.data() == nv.scales.data());
  for (std::size_t e = 0; e < 3; ++e) {
    CHECK(there.weight_global_scale[e] == 1.0f / nv.tensor_scales[e]);
    CHECK(there.weight_global_scale[e] > 100.0f);  // encode sense
  }
  const auto back = layout::from_compressed_tensors(tetromino::nvfp4{}, there, 3, 5, 192, tensor_scales);
  CHECK(tensor_scales == nv.tensor_scales);
  CHECK(back.tensor_scale(2) == nv.tensor_scales[2]);
  CHECK(back.codes.data() == nv.codes.data());
  CHECK(back.shape() == nv.shape());

  const auto mx = random_storage(tetromino::mxfp4{}, d, 6, 1, 0xFE);
  const auto mx_there = layout::as_compressed_tensors(mx);
  CHECK(mx_there.weight_global_scale.empty());
  CHECK(layout::from_compressed_tensors(tetromino::mxfp4{}, mx_there, 3, 5, 192).scales.data() == mx.scales.data());

  auto awkward = nv;
  awkward.tensor_scales[1] = std::bit_cast<float>(0x3FFFFFFDu);  // just below 2, no float's inverse
  REQUIRE_FALSE(layout::is_invertible(awkward.tensor_scales[1]));
  CHECK_THAT(refusal(layout::try_as_compressed_tensors(awkward, global_scales), errc::invalid_argument),
             contains("layout compressed-tensors: it stores the inverse of a tensor scale; expected a scale that its "
                      "inverse gives back (see layout::invertible), got 1.99999964"));
  awkward.tensor_scales[1] = layout::invertible(awkward.tensor_scales[1]);
  CHECK(layout::try_as_compressed_tensors(awkward, global_scales));
  for (const float bad : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::denorm_min()}) {
    awkward.tensor_scales[1] = bad;
    CHECK_FALSE(layout::try_as_compressed_tensors(awkward, global_scales));
    global_scales[0] = bad;
    CHECK_THAT(refusal(layout::try_from_compressed_tensors(tetromino::nvfp4{}, there, 3, 5, 192, tensor_scales),
                       errc::non_finite),
               contains("expected a positive, finite weight_global_scale with a finite inverse, got "));
  }
}

TEST_CASE("with invertible tensor scales every matrix can be stored with their inverses") {
  std::mt19937_64 random(tetromino_test::seed());
  std::size_t refused = 0;
  float global_scale = 0;
  for (int i = 0; i < 200; ++i) {
    std::vector<float> x(64);
    for (float& value : x) value = static_cast<float>(random() % 4001) / 997.0f - 2.0f;
    const tetromino::matrix_view view(x.data(), 2, 32);
    refused += !layout::try_as_compressed_tensors(quantize(scalar, view, "nvfp4"), {&global_scale, 1});
    const auto packed = quantize(scalar, view, "nvfp4", {.invertible_tensor_scales = true});
    REQUIRE(layout::try_as_compressed_tensors(packed, {&global_scale, 1}));
    REQUIRE(global_scale == Approx(1 / quantize(scalar, view, "nvfp4").tensor_scales[0]).epsilon(1e-6));
    REQUIRE(quantize(tetromino_test::fastest, view, "nvfp4", {.invertible_tensor_scales = true}).codes == packed.codes);
  }
  CHECK(refused > 10);  // what the option is for
  const std::vector<float> zeros(32);
  const auto nothing =
      quantize(scalar, tetromino::matrix_view(zeros.data(), 1, 32), "nvfp4", {.invertible_tensor_scales = true});
  CHECK(nothing.tensor_scales[0] == 1.0f);
}

TEST_CASE("ggml's blocks straight from rows are those of the packed rows") {
  std::mt19937_64 random(tetromino_test::seed());
  std::vector<float> x(3 * 70 * 448), weights(3 * 384);
  for (float& value : x) value = static_cast<float>(random() % 4001) / 997.0f - 2.0f;
  for (float& weight : weights) weight = static_cast<float>(random() % 7);
  const tetromino::batch_view view(x.data(), 3, 70, 384, 448, 70 * 448);  // with gaps
  const tetromino::thread_executor threads(3);
  const std::vector<float> given = {0.001f, 0.002f, 0.0015f};
  const auto same = [&](const char* recipe, const tetromino::quantize_options& options, std::size_t scale_count) {
    INFO(recipe);
    const auto format = tetromino::recipe::parse(recipe).format;
    tetromino::packed<tetromino::any_format> linear(format, 3, 70, 384, scale_count);
    quantize_to(scalar, view, recipe, linear, options);
    bytes blocks(layout::ggml_bytes(linear.shape()));
    std::vector<float> scales(linear.tensor_scales.size());
    quantize_to(tetromino_test::fastest.on(threads), view, recipe, layout::ggml_rows{blocks, scales}, options);
    CHECK(blocks == layout::to_ggml(linear));
    CHECK(scales == linear.tensor_scales);
  };
  same("mxfp4-32/oas", {}, 1);
  same("mxfp4-32/min-error", {.column_weights = weights}, 1);
  same("mxfp4-32/floor", {.rounding = tetromino::element_rounding::stochastic, .seed = 7, .first_index = 5}, 1);
  same("nvfp4/four-over-six", {}, 1);
  same("nvfp4/min-error", {.invertible_tensor_scales = true}, 3);
  same("nvfp4/amax", {.tensor_scales = given}, 3);
  same("nvfp4/amax/hadamard-64", {}, 3);

  bytes blocks(layout::ggml_bytes({tetromino::nvfp4{}, 3, 70, 384})), plain = blocks;
  const float one = 1.0f;
  quantize_to(scalar, view, "nvfp4", layout::ggml_rows{blocks});
  quantize_to(scalar, view, "nvfp4", layout::ggml_rows{plain}, {.tensor_scales = {&one, 1}});
  CHECK(blocks == plain);  // for a tensor scale of 1

  std::vector<float> two(2);
  CHECK_THAT(refusal(try_quantize_to(scalar, view, "nvfp4", layout::ggml_rows{blocks, two}), errc::shape_mismatch),
             contains("expected room for 1 tensor scale or 3"));
  CHECK_THAT(refusal(try_quantize_to(scalar, view, "nvfp4", layout::ggml_rows{blocks, {two.data(), 1}},
                                     {.tensor_scales = given}),
                     errc::shape_mismatch),
             contains("a tensor scale for each matrix"));
  CHECK_THAT(refusal(try_quantize_to(scalar, view, "mxfp4-32", layout::ggml_rows{blocks}), errc::shape_mismatch),
             contains("blocks"));
  CHECK(refusal(try_quantize_to(scalar, view, "mxfp4-16", layout::ggml_rows{blocks}), errc::invalid_argument) != "");
  x[(70 + 69) * 448 + 3] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THAT(refusal(try_quantize_to(scalar, view, "nvfp4", layout::ggml_rows{blocks}), errc::non_finite),
             contains("matrix 1, row 69, column 3"));
}

TEST_CASE("ggml's blocks straight from rows take matrices of zeros, whose tensor scale is 0") {
  std::vector<float> x(3 * 2 * 64);
  const tetromino::batch_view view(x.data(), 3, 2, 64);
  const auto same = [&](std::size_t scale_count, const tetromino::quantize_options& options = {}) {
    CAPTURE(scale_count);
    tetromino::packed<tetromino::any_format> linear(tetromino::nvfp4{}, 3, 2, 64, scale_count);
    quantize_to(scalar, view, "nvfp4/amax", linear, options);
    bytes blocks(layout::ggml_bytes(linear.shape()), 0xAA);
    std::vector<float> scales(scale_count, -1.0f);
    quantize_to(tetromino_test::fastest, view, "nvfp4/amax", layout::ggml_rows{blocks, scales}, options);
    CHECK(blocks == layout::to_ggml(linear));
    CHECK(scales == linear.tensor_scales);
    return scales;
  };
  CHECK(same(1) == std::vector<float>{0});
  x[5] = -0.0f;
  CHECK(same(3) == std::vector<float>{0, 0, 0});
  x[5] = std::numeric_limits<float>::quiet_NaN();
  CHECK(same(1, {.special = tetromino::special_values::saturate}) == std::vector<float>{0});
  x[5] = 0;
  x[2 * 64 + 7] = 6.0f * 448.0f;  // the matrix between others of zeros
  CHECK(same(3) == std::vector<float>{0, 1, 0});
  CHECK(same(3, {.invertible_tensor_scales = true}) == std::vector<float>{1, 1, 1});
  x[5] = std::numeric_limits<float>::infinity();
  std::vector<float> scales(3);
  bytes blocks(layout::ggml_bytes({tetromino::nvfp4{}, 3, 2, 64}));
  CHECK_THAT(refusal(try_quantize_to(scalar, view, "nvfp4", layout::ggml_rows{blocks, scales}), errc::non_finite),
             contains("+infinity at matrix 0, row 0, column 5"));
}

TEST_CASE("a scale that has been inverted once survives any number of inversions") {
  std::size_t awkward = 0, broken = 0, far = 0;
  for (std::uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
    const float scale = std::bit_cast<float>((127u - 20u) << 23 | mantissa);
    const float neighbour = layout::invertible(scale);
    awkward += !layout::is_invertible(scale);
    broken += layout::is_invertible(scale) != (neighbour == scale);
    broken += !layout::is_invertible(neighbour);
    // The inverse of any scale in a foreign file can be written again.
    broken += !layout::is_invertible(1.0f / scale);
    far += std::bit_cast<std::uint32_t>(neighbour) + 1 - std::bit_cast<std::uint32_t>(scale) > 2;
  }
  CHECK(broken == 0);
  CHECK(far == 0);
  CHECK(static_cast<double>(awkward) / (1 << 23) == Approx(0.17).margin(0.03));
  for (const float edge : {0x1p-126f, 0x1.fffffep-126f, 0x1p126f, 0x1.8p125f, 0x1.fffffep125f, 1.0f, 6.0f * 448.0f}) {
    CHECK(layout::is_invertible(layout::invertible(edge)));
  }
  CHECK_THROWS_AS(layout::invertible(0.0f), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(layout::invertible(0x1p127f), tetromino_test::precondition_failed);
}

TEST_CASE("swizzled scales lie where the formula says, padded with zero, and come back the same") {
  struct scales_dims {
    std::size_t matrices, rows, per_row;
  };
  // 1x16, 129x64 and 2880x2880 in blocks of 16 and 32, and every remainder of the tile.
  std::vector<scales_dims> shapes{{1, 1, 1},   {1, 129, 4}, {1, 129, 2}, {1, 2880, 90}, {1, 2880, 180},
                                  {3, 129, 5}, {2, 0, 4},   {0, 5, 4},   {2, 5, 0}};
  for (const std::size_t rows : {1u, 31u, 32u, 33u, 127u, 128u, 130u, 256u}) {
    for (std::size_t per_row = 1; per_row <= 9; ++per_row) shapes.push_back({2, rows, per_row});
  }
  std::mt19937_64 random(tetromino_test::seed());
  for (const auto& [matrices, rows, per_row] : shapes) {
    INFO("[" << matrices << ", " << rows << ", " << per_row << "]");
    bytes scales(matrices * rows * per_row);
    for (auto& scale : scales) scale = static_cast<std::uint8_t>(1 + random() % 255);
    const std::size_t one = (rows + 127) / 128 * ((per_row + 3) / 4) * 512;
    REQUIRE(layout::swizzled_bytes(matrices, rows, per_row) == matrices * one);
    bytes swizzled(matrices * one, 0xEE);
    layout::swizzle_scales(scales, matrices, rows, per_row, swizzled);

    std::size_t wrong = 0, padding = 0;
    for (std::size_t at = 0; at < swizzled.size(); ++at) {
      const auto [r, c] = reference::swizzled_position(at % one, per_row);
      const bool inside = r < rows && c < per_row;
      padding += !inside;
      wrong += swizzled[at] != (inside ? scales[(at / one * rows + r) * per_row + c] : 0);
    }
    for (std::size_t e = 0; e < matrices; ++e) {
      for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < per_row; ++c) {
          const std::size_t at = reference::swizzled_scale(r, c, per_row);
          wrong += swizzled[e * one + at] != scales[(e * rows + r) * per_row + c];
          wrong += layout::swizzled_offset(r, c, per_row) != at;
        }
      }
    }
    CHECK(wrong == 0);
    CHECK(padding == swizzled.size() - scales.size());

    bytes back(scales.size(), 0xEE);
    layout::unswizzle_scales(swizzled, matrices, rows, per_row, back);
    CHECK(back == scales);
  }

  const auto in = random_storage(tetromino::nvfp4{}, {2, 130, 70}, 7);  // 5 blocks to a row, the last one short
  bytes expected(layout::swizzled_bytes(2, 130, 5));
  layout::swizzle_scales(in.scales, 2, 130, 5, expected);
  CHECK(layout::swizzled_scales(in) == expected);
}

TEST_CASE("rows of two tensors are taken in turn, and given back") {
  const auto check = [](auto format, dims d, std::size_t tensor_scales) {
    using format_type = decltype(format);
    const auto gate = random_storage(format, d, 8, tensor_scales);
    auto up = random_storage(format, d, 9, tensor_scales);
    up.tensor_scales = gate.tensor_scales;
    packed<format_type> both(format, d.matrices, 2 * d.rows, d.cols, tensor_scales);
    layout::interleave_rows(gate, up, both.view());
    const auto shape = gate.shape();
    std::size_t wrong = 0;
    for (std::size_t e = 0; e < d.matrices; ++e) {
      for (std::size_t r = 0; r < 2 * d.rows; ++r) {
        const auto& from = r % 2 == 0 ? gate : up;
        const auto row_of = [&](const bytes& all, std::size_t rows, std::size_t row, std::size_t size) {
          return bytes(all.begin() + static_cast<std::ptrdiff_t>((e * rows + row) * size),
                       all.begin() + static_cast<std::ptrdiff_t>((e * rows + row + 1) * size));
        };
        const auto differs = [&](const bytes& a, const bytes& b, std::size_t size) {
          return row_of(a, 2 * d.rows, r, size) != row_of(b, d.rows, r / 2, size);
        };
        wrong += differs(both.codes, from.codes, shape.code_bytes_per_row());
        wrong += differs(both.scales, from.scales, shape.blocks_per_row());
        wrong += differs(both.macros, from.macros, shape.macros_per_row());
      }
    }
    CHECK(wrong == 0);
    CHECK(both.tensor_scales == gate.tensor_scales);
    packed<format_type> gate_back(format, d.matrices, d.rows, d.cols, tensor_scales), up_back = gate_back;
    layout::deinterleave_rows(both, gate_back.view(), up_back.view());
    CHECK(same(gate_back, gate));
    CHECK(same(up_back, up));
  };
  check(tetromino::mxfp4{}, {2, 3, 70}, 1);
  check(tetromino::mxfp4{}, {1, 1440, 2880}, 1);
  check(tetromino::nvfp4{}, {4, 5, 33}, 4);
  check(tetromino::mbs<tetromino::mxfp4_16, 32>{}, {2, 3, 70}, 1);
  check(tetromino::any_format(tetromino::mbs<tetromino::mxfp4>{}), {1, 2, 300}, 1);
  check(tetromino::mxfp4{}, {3, 0, 64}, 1);
}

TEST_CASE("what a layout cannot hold is refused with a reason") {
  using tetromino::mbs;
  using tetromino::mxfp4;
  using tetromino::mxfp4_16;
  using tetromino::nvfp4;
  const dims d{2, 3, 64};
  const auto mx = random_storage(mxfp4{}, d, 10), ragged_mx = random_storage(mxfp4{}, {1, 1, 48}, 10);
  const auto mx16 = random_storage(mxfp4_16{}, d, 10);
  const auto macro = random_storage(mbs<mxfp4>{}, d, 10);
  const auto nv = random_storage(nvfp4{}, d, 10), ragged_nv = random_storage(nvfp4{}, {1, 1, 24}, 10);

  CHECK_THAT(refusal(layout::try_to_ggml(mx16), errc::invalid_argument),
             contains("layout ggml: it stores mxfp4-32 and nvfp4, got mxfp4-16"));
  CHECK_THAT(refusal(layout::try_to_ggml(macro), errc::invalid_argument), contains("got mxfp4-32 with macro blocks"));
  CHECK_THAT(refusal(layout::try_to_ggml(ragged_mx), errc::shape_mismatch),
             contains("layout ggml: it stores rows of whole blocks of 32, got K = 48"));
  CHECK_THAT(refusal(layout::try_to_ggml(random_storage(nvfp4{}, {1, 1, 96}, 1)), errc::shape_mismatch),
             contains("whole blocks of 64, got K = 96"));
  CHECK_THAT(
      refusal(layout::try_ggml_bytes({mxfp4{}, std::size_t{1} << 40, std::size_t{1} << 40, 32}), errc::shape_mismatch),
      contains("expected at most 281474976710656 elements"));
  bytes blocks(layout::ggml_bytes(mx.shape()));
  CHECK_THAT(refusal(layout::try_to_ggml(mx, std::span(blocks).subspan(1)), errc::shape_mismatch),
             contains("layout ggml: blocks needs 204 entries, got 203"));
  CHECK_THAT(refusal(layout::try_from_ggml(mxfp4{}, std::span(blocks).subspan(1), 2, 3, 64), errc::shape_mismatch),
             contains("blocks needs 204 entries, got 203"));
  const std::vector<float> two{1.0f, 2.0f};
  CHECK_THAT(refusal(layout::try_from_ggml(mxfp4{}, blocks, 2, 3, 64, two), errc::shape_mismatch),
             contains("tensor_scales needs 0 entries, got 2"));
  const bytes nv_blocks = layout::to_ggml(nv);
  CHECK_THAT(refusal(layout::try_from_ggml(nvfp4{}, nv_blocks, 2, 3, 64), errc::shape_mismatch),
             contains("tensor_scales needs 1 entries, got 0"));
  CHECK(layout::try_from_ggml(nvfp4{}, nv_blocks, 2, 3, 64, two));

  auto poisoned = mx;
  poisoned.scales[9] = 0xFF;  // matrix 1, row 1, block 1
  for (const auto& said : {refusal(layout::try_to_ggml(poisoned), errc::non_finite),
                           refusal(layout::try_as_gpt_oss(poisoned), errc::non_finite),
                           refusal(layout::try_as_compressed_tensors(poisoned), errc::non_finite)}) {
    CHECK_THAT(said, contains("expected finite, non-negative block scales, codes up to 254; got code 255 in matrix 1, "
                              "row 1, block 1"));
  }
  blocks = layout::to_ggml(mx);
  blocks[17 * 9] = 0xFF;
  CHECK_THAT(refusal(layout::try_from_ggml(mxfp4{}, blocks, 2, 3, 64), errc::non_finite),
             contains("got code 255 in matrix 1, row 1, block 1"));
  for (const std::uint8_t bad : bytes{0x7F, 0x80, 0xFF}) {
    auto negative = nv;
    negative.scales[5] = bad;
    CHECK_THAT(refusal(layout::try_to_ggml(negative), errc::non_finite), contains("matrix 0, row 1, block 1"));
    CHECK(layout::try_as_modelopt(negative));
  }

  CHECK_THAT(refusal(layout::try_as_gpt_oss(nv), errc::invalid_argument),
             contains("layout gpt-oss: it stores mxfp4-32, got nvfp4"));
  CHECK_THAT(refusal(layout::try_as_gpt_oss(mx16), errc::invalid_argument), contains("got mxfp4-16"));
  CHECK_THAT(refusal(layout::try_as_gpt_oss(ragged_mx), errc::shape_mismatch), contains("whole blocks of 32"));
  const auto gpt_oss = layout::as_gpt_oss(mx);
  CHECK_THAT(refusal(layout::try_from_gpt_oss(gpt_oss, 2, 3, 96), errc::shape_mismatch),
             contains("layout gpt-oss: blocks needs 288 entries, got 192"));
  CHECK_THAT(refusal(layout::try_from_gpt_oss({gpt_oss.blocks, gpt_oss.blocks}, 2, 3, 64), errc::shape_mismatch),
             contains("layout gpt-oss: scales needs 12 entries, got 192"));
  CHECK_THAT(refusal(layout::try_from_gpt_oss({}, std::size_t{1} << 60, 16, 32), errc::shape_mismatch),
             contains("expected at most 281474976710656 elements"));

  CHECK_THAT(refusal(layout::try_as_modelopt(mx), errc::invalid_argument),
             contains("layout modelopt: it stores nvfp4, got mxfp4-32"));
  CHECK_THAT(refusal(layout::try_as_modelopt(ragged_nv), errc::shape_mismatch),
             contains("whole blocks of 16, got K = 24"));
  const auto modelopt = layout::as_modelopt(nv);
  CHECK_THAT(
      refusal(layout::try_from_modelopt({modelopt.weight, modelopt.weight_scale, {}}, 2, 3, 64), errc::shape_mismatch),
      contains("layout modelopt: weight_scale_2 needs 1 entries, got 0"));
  CHECK_THAT(
      refusal(layout::try_from_modelopt({modelopt.weight, modelopt.weight, two}, 2, 3, 64), errc::shape_mismatch),
      contains("layout modelopt: weight_scale needs 24 entries, got 192"));
  CHECK_THAT(refusal(layout::try_from_modelopt(modelopt, 2, 4, 64), errc::shape_mismatch),
             contains("layout modelopt: weight needs 256 entries, got 192"));

  CHECK_THAT(refusal(layout::try_as_compressed_tensors(mx16), errc::invalid_argument),
             contains("layout compressed-tensors: it stores mxfp4-32 and nvfp4, got mxfp4-16"));
  CHECK_THAT(refusal(layout::try_as_compressed_tensors(ragged_nv), errc::shape_mismatch), contains("blocks of 16"));
  CHECK_THAT(refusal(layout::try_as_compressed_tensors(nv), errc::shape_mismatch),
             contains("global_scales needs 1 entries, got 0"));
  CHECK_THAT(
      refusal(layout::try_from_compressed_tensors(nvfp4{}, {nv.codes, nv.scales, two}, 2, 3, 64), errc::shape_mismatch),
      contains("tensor_scales needs 2 entries, got 0"));
  CHECK_THAT(
      refusal(layout::try_from_compressed_tensors(mxfp4{}, {mx.codes, mx.scales, two}, 2, 3, 64), errc::shape_mismatch),
      contains("weight_global_scale needs 0 entries, got 2"));
  CHECK_THAT(
      refusal(layout::try_from_compressed_tensors(mxfp4{}, {mx.codes, mx.codes, {}}, 2, 3, 64), errc::shape_mismatch),
      contains("weight_scale needs 12 entries, got 192"));
  CHECK_THAT(
      refusal(layout::try_from_compressed_tensors(mxfp4{}, {mx.codes, mx.scales, {}}, 1, 3, 64), errc::shape_mismatch),
      contains("weight_packed needs 96 entries, got 192"));

  bytes swizzled(512);
  CHECK_THAT(
      refusal(layout::try_swizzle_scales(mx.scales, 1, 3, 4, std::span(swizzled).first(511)), errc::shape_mismatch),
      contains("layout 128x4 swizzle: swizzled scales needs 512 entries, got 511"));
  CHECK_THAT(refusal(layout::try_swizzle_scales(mx.scales, 1, 3, 5, swizzled), errc::shape_mismatch),
             contains("layout 128x4 swizzle: scales needs 15 entries, got 12"));
  CHECK_THAT(refusal(layout::try_unswizzle_scales(swizzled, 1, 129, 4, blocks), errc::shape_mismatch),
             contains("scales needs 516 entries, got 204"));
  CHECK_THAT(refusal(layout::try_swizzle_scales({}, std::size_t{1} << 60, 1, 1, {}), errc::shape_mismatch),
             contains("expected fewer than 2^54 scales"));

  packed<mxfp4> both(mxfp4{}, 2, 6, 64), half(mxfp4{}, 2, 3, 64);
  CHECK_THAT(refusal(layout::try_interleave_rows(mx, mx16, both.view()), errc::shape_mismatch),
             contains("layout interleaved rows: expected two of one shape and one of twice the rows, got [2, 3, 64] of "
                      "mxfp4-32, [2, 3, 64] of mxfp4-16 and [2, 6, 64] of mxfp4-32"));
  CHECK_THAT(refusal(layout::try_interleave_rows(mx, macro, both.view()), errc::shape_mismatch),
             contains("[2, 3, 64] of mxfp4-32 with macro blocks of 128 and"));
  CHECK_THAT(refusal(layout::try_interleave_rows(mx, mx, half.view()), errc::shape_mismatch), contains("[2, 3, 64]"));
  CHECK_THAT(refusal(layout::try_deinterleave_rows(half, half.view(), half.view()), errc::shape_mismatch),
             contains("twice the rows"));
  auto other = nv;
  other.tensor_scales[0] *= 2;
  packed<nvfp4> nv_both(nvfp4{}, 2, 6, 64);
  CHECK_THAT(refusal(layout::try_interleave_rows(nv, other, nv_both.view()), errc::invalid_argument),
             contains("expected the same tensor scales for both halves"));
  CHECK_THAT(
      refusal(layout::try_interleave_rows(nv, random_storage(nvfp4{}, d, 1, 2), nv_both.view()), errc::shape_mismatch),
      contains("expected equally many tensor scales, got 1, 2 and 1"));
  auto broken = mx;
  broken.codes.pop_back();
  CHECK_THAT(refusal(layout::try_interleave_rows(mx, broken, both.view()), errc::shape_mismatch),
             contains("codes needs"));
  CHECK_THAT(refusal(layout::try_swizzled_scales(broken), errc::shape_mismatch), contains("codes needs"));
  CHECK_THROWS_AS(layout::to_ggml(broken), tetromino::error);
  CHECK_THROWS_AS(layout::as_gpt_oss(broken), tetromino::error);
}
