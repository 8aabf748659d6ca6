#include "check.hpp"

#include <tetromino/c.h>
#include <tetromino/dequantize.hpp>
#include <tetromino/layout.hpp>
#include <tetromino/quantize.hpp>

#include "reference/generators.hpp"

#include <array>   // std::array
#include <string>  // std::string
#include <vector>  // std::vector

using namespace tetromino;

namespace {

/// What the C++ library makes of rows, without tensor scales of its own.
packed<any_format> expected_of(const char* name, const matrix<float>& x, std::span<const float> weights) {
  quantize_options options;
  const float one = 1.0f;
  const recipe way = recipe::parse(name);
  options.column_weights = weights;
  if (way.format.scale == scale_type::e4m3) options.tensor_scales = {&one, 1};
  return quantize(scalar, x, way, options);
}

}  // namespace

TEST_CASE("the C interface packs and unpacks what the library does, rows of many parts included") {
  const std::size_t rows = 70, cols = 1984;  // 8 rows at once
  matrix<float> x(rows, cols);
  x.data = reference::normal_sample(tetromino_test::seed(), rows * cols);
  std::vector<float> weights(cols);
  for (std::size_t k = 0; k < cols; ++k) weights[k] = static_cast<float>(k % 5 + 1);
  for (const char* name : {"mxfp4-32/oas", "mxfp4-32/min-error", "nvfp4/amax", "nvfp4/four-over-six",
                           "mxfp4-16/even/mbs-search@64", "mxfp4-32/oas/mbs-static/hadamard-32"}) {
    INFO(name);
    tetromino_options options{};
    options.column_weights = weights.data();
    const packed<any_format> expected = expected_of(name, x, weights);
    packed<any_format> got(expected.format, 1, rows, cols);
    std::string message(300, '\0');
    tetromino_packed out{nullptr, got.codes.data(), got.scales.data(), got.macros.data(), nullptr};
    REQUIRE(tetromino_quantize(name, x.data.data(), TETROMINO_FLOAT, rows, cols, &options, &out, message.data(),
                               message.size()) == TETROMINO_OK);
    CHECK((got.codes == expected.codes && got.scales == expected.scales && got.macros == expected.macros));

    std::vector<float> unpacked(rows * cols);
    REQUIRE(tetromino_dequantize(name, &out, rows, cols, nullptr, unpacked.data(), TETROMINO_FLOAT, nullptr, 0) ==
            TETROMINO_OK);
    CHECK(unpacked == dequantize<float>(scalar, expected).data);

    tetromino_sizes sizes{};
    REQUIRE(tetromino_packed_sizes(name, rows, cols, &sizes, nullptr, 0) == TETROMINO_OK);
    CHECK((sizes.codes == got.codes.size() && sizes.scales == got.scales.size() && sizes.macros == got.macros.size()));
    if (sizes.ggml == 0) continue;
    std::vector<std::uint8_t> blocks(sizes.ggml);
    tetromino_packed ggml{blocks.data(), nullptr, nullptr, nullptr, nullptr};
    REQUIRE(tetromino_quantize(name, x.data.data(), TETROMINO_FLOAT, rows, cols, &options, &ggml, nullptr, 0) ==
            TETROMINO_OK);
    CHECK(blocks == layout::to_ggml(expected));
  }
}

TEST_CASE("the C interface packs zeros to ggml's NVFP4 blocks, with a tensor scale of 0") {
  const std::vector<float> zeros(2 * 64);
  std::vector<std::uint8_t> blocks(72, 0xAA);
  float scale = 0;
  tetromino_packed out{blocks.data(), nullptr, nullptr, nullptr, &scale};
  REQUIRE(tetromino_quantize("nvfp4", zeros.data(), TETROMINO_FLOAT, 2, 64, nullptr, &out, nullptr, 0) == TETROMINO_OK);
  CHECK(blocks == std::vector<std::uint8_t>(72));
  CHECK(scale == 0);
}

TEST_CASE("the C interface refuses sizes whose products wrap, before it reads anything") {
  const std::size_t most = static_cast<std::size_t>(-1);
  tetromino_sizes sizes{};
  for (const auto& [rows, cols] : std::vector<std::array<std::size_t, 2> >{
           {1, most - 30}, {1, most - 10}, {most, 32}, {std::size_t{1} << 32, std::size_t{1} << 32}, {0, most}}) {
    INFO(rows << " x " << cols);
    CHECK(tetromino_packed_sizes("mxfp4-32", rows, cols, &sizes, nullptr, 0) == TETROMINO_SHAPE_MISMATCH);
  }
  const tetromino_cluster cluster{1, 1, 2};
  const double load = 1;
  std::int64_t tensors[3][2];
  CHECK(tetromino_balanced_eplb(&load, TETROMINO_DOUBLE, std::size_t{1} << 63, 2, 1, &cluster, tensors[0], tensors[1],
                                tensors[2], nullptr, 0) == TETROMINO_SHAPE_MISMATCH);
  const std::int32_t id = 0;
  const std::uint32_t tokens = 2;
  std::int32_t slots[2];
  CHECK(tetromino_local(&id, (std::size_t{1} << 63) + 1, 2, 1, &tokens, 1, &cluster, slots, nullptr, nullptr, 0) ==
        TETROMINO_SHAPE_MISMATCH);
}
