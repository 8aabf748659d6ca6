#include "check.hpp"

/// More elements than 32 bits can count. Batches repeat one matrix (a matrix stride of 0), so that memory stays small.

#include <tetromino/dequantize.hpp>
#include <tetromino/quantize.hpp>

#include "reference/generators.hpp"
#include "support/fastest.hpp"

#include <algorithm>  // std::copy, std::equal
#include <cmath>      // INFINITY
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <string>     // std::to_string
#include <vector>     // std::vector

using namespace tetromino;
using tetromino_test::fastest;

namespace {

std::vector<bfloat16> random_row(std::size_t cols) {
  reference::generator random(tetromino_test::seed());
  std::vector<bfloat16> out(cols);
  for (bfloat16& v : out) v = bfloat16(static_cast<float>(random.uniform()) - 0.5f);
  return out;
}

template <class Bytes>
bool repeats(const Bytes& all, const Bytes& one) {
  for (std::size_t at = 0; at < all.size(); at += one.size()) {
    if (!std::equal(one.begin(), one.end(), all.begin() + static_cast<std::ptrdiff_t>(at))) return false;
  }
  return all.size() % one.size() == 0;
}

}  // namespace

TEST_CASE("a batch of more than 2^31 elements", "[.slow]") {
  const std::size_t cols = 32768, matrices = 66'000;
  const std::vector<bfloat16> row = random_row(cols);
  const batch_view<const bfloat16> x(row.data(), matrices, 1, cols, cols, 0);
  REQUIRE(matrices * cols > std::size_t{1} << 31);

  const auto packed = quantize<mxfp4>(fastest, x);
  const auto one = quantize<mxfp4>(fastest, x[0]);
  CHECK(repeats(packed.codes, one.codes));
  CHECK(repeats(packed.scales, one.scales));
  CHECK(amax(fastest, x) == amax(fastest, x[0]));

  matrix<float> back(1, cols);  // every matrix is unpacked to the same place, the last one last
  dequantize_to(fastest, packed, batch_view<float>(back.data.data(), matrices, 1, cols, cols, 0));
  CHECK(back.data == dequantize<float>(fastest, one).data);
}

TEST_CASE("a row of more than 2^31 elements", "[.slow]") {
  const std::size_t pattern = 4096, cols = (std::size_t{1} << 31) + pattern;
  const std::vector<bfloat16> piece = random_row(pattern);
  std::vector<bfloat16> row(cols);
  for (std::size_t k = 0; k < cols; k += pattern) {
    std::copy(piece.begin(), piece.end(), row.begin() + static_cast<std::ptrdiff_t>(k));
  }
  const matrix_view<const bfloat16> x(row.data(), 1, cols), one(piece.data(), 1, pattern);
  for (const char* name : {"mxfp4-16/oas/mbs-static", "nvfp4/amax"}) {
    const auto packed = quantize(fastest, x, recipe::parse(name)),
               expected = quantize(fastest, one, recipe::parse(name));
    CHECK(repeats(packed.codes, expected.codes));
    CHECK(repeats(packed.scales, expected.scales));
    if (!packed.macros.empty()) CHECK(repeats(packed.macros, expected.macros));
  }
  row[cols - 1] = bfloat16(INFINITY);
  CHECK_THROWS_WITH(quantize<nvfp4>(fastest, x), tetromino_test::contains("column " + std::to_string(cols - 1)));
}
