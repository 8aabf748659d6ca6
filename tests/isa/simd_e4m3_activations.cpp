#include "check.hpp"

/// Activations in E4M3 of the simd backend against the scalar ones, byte by byte. Run for each backend of
/// tetromino::cpu.

#include <tetromino/e4m3_activations.hpp>
#include <tetromino/float16.hpp>
#include <tetromino/thread_executor.hpp>

#include "isa/backend.hpp"
#include "support/oracle.hpp"

#include <cmath>    // std::nextafter, std::ldexp, std::nanf
#include <cstring>  // std::memcmp
#include <string>   // std::string
#include <vector>   // std::vector

#if !TETROMINO_TEST_VECTORS
TEST_CASE("the simd backend exists") { WARN("xsimd was not found: there is nothing to test"); }
#else

namespace {

using namespace tetromino;
using tetromino_test::contains;
using tetromino_test::number;
using tetromino_test::sample;
using tetromino_test::value_of;
using tetromino_test::vectors;

/// Storage inside of more, which must stay as it was.
struct guarded_e4m3 {
  static constexpr std::size_t margin = 64;
  std::size_t rows, cols;
  std::vector<std::uint8_t> values;
  std::vector<float> scales;

  guarded_e4m3(std::size_t rows_, std::size_t cols_)
      : rows(rows_), cols(cols_), values(bytes() + 2 * margin, 77), scales(rows + 2 * margin, 77.0f) {}
  [[nodiscard]] std::size_t bytes() const { return rows * e4m3_view<>{rows, cols}.stride(); }
  [[nodiscard]] e4m3_view<std::uint8_t> view() {
    return {rows, cols, std::span(values).subspan(margin, bytes()), std::span(scales).subspan(margin, rows)};
  }
  friend bool operator==(const guarded_e4m3& a, const guarded_e4m3& b) {
    return a.values == b.values && std::memcmp(a.scales.data(), b.scales.data(), 4 * a.scales.size()) == 0;
  }
};

template <class Policy, class Input>
guarded_e4m3 rounded_by(const Policy& policy, const Input& x) {
  const batch_view view(x);
  guarded_e4m3 out(view.matrices * view.rows, view.cols);
  quantize_e4m3_to(policy, x, out.view());
  return out;
}

template <class T>
void compare(const batch_view<T>& x) {
  INFO(x.matrices << " x " << x.rows << " x " << x.cols << ", " << sizeof(T) << " bytes");
  CHECK(rounded_by(vectors, x) == rounded_by(scalar, x));
}
template <class T>
void compare_row(const std::vector<T>& x) {
  compare(batch_view<const T>(x.data(), 1, 1, x.size()));
}

TEST_CASE("e4m3 activations are those of scalar: every width to past two stages, unaligned rows") {
  reference::generator random(tetromino_test::seed());
  for (std::size_t cols = 0; cols <= 300; ++cols) {
    const std::size_t matrices = 1 + random.below(2), rows = 1 + random.below(2);
    compare(sample<float>(random, matrices, rows, cols).view);
    compare(sample<half>(random, matrices, rows, cols).view);
    compare(sample<bfloat16>(random, matrices, rows, cols).view);
  }
}

/// Every number of 16 bits up to `most`, in one row.
template <class T>
void every_number(float most) {
  std::vector<T> x;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T v = T::from_bits(static_cast<std::uint16_t>(bits));
    if (std::abs(value_of(v)) <= most) x.push_back(v);
  }
  INFO("up to " << most);
  compare_row(x);
}

TEST_CASE("e4m3 activations are those of scalar: every half and bfloat16 below an amax") {
  for (const float amax : {448.0f, 1.0f, 3.0f, 0x1p-14f, 1000.0f, 65504.0f}) {
    every_number<half>(amax);
    every_number<bfloat16>(amax);
  }
  every_number<bfloat16>(0x1.FEp127f);
  every_number<bfloat16>(0x1p-117f);
}

TEST_CASE("e4m3 activations are those of scalar: floats around every tie, at every size of a row") {
  const float edge = 0x1p-117f;
  std::vector<float> largest = {448.0f,
                                0x1.FFFFFEp127f,
                                0x1p-126f,
                                0x1p-149f,
                                1.0f,
                                3.0f,
                                0.0f,
                                edge,
                                std::nextafter(edge, 0.0f),
                                std::nextafter(edge, 1.0f)};
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 30; ++i) {
    largest.push_back(std::ldexp(static_cast<float>(random.uniform()), static_cast<int>(random.below(270)) - 144));
  }
  for (const float amax : largest) {
    std::vector<float> x{amax};
    for (const double y : reference::e4m3_table()) {
      for (const double up : {1.0, 1 + 1.0 / 16, 1 + 1.0 / 32}) {  // codes, and ties where steps are of either size
        auto v = static_cast<float>((y * up + (y < 0x1p-6 ? 0x1p-10 : 0)) * static_cast<double>(amax) / 448);
        for (int i = 0; i < 4; ++i) v = std::nextafter(v, 0.0f);
        for (int i = 0; i < 9; ++i, v = std::nextafter(v, HUGE_VALF)) {
          x.push_back(std::min(v, amax));
          x.push_back(-x.back());
        }
      }
    }
    INFO("amax = " << amax);
    compare_row(x);
  }
}

template <class T>
std::string refusal(const auto& policy, const std::vector<T>& x, std::size_t rows) {
  const auto r = try_quantize_e4m3(policy, matrix_view<const T>(x.data(), rows, x.size() / rows));
  if (r) return "accepted";
  CHECK(r.error().code() == errc::non_finite);
  return r.error().what();
}

template <class T>
void refuse_everywhere() {
  for (const std::size_t cols : {5u, 128u, 165u}) {
    for (std::size_t at = 0; at < 2 * cols; ++at) {
      for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
        std::vector<T> x(2 * cols, number<T>(-2.0f));
        x[at] = number<T>(bad);
        if (at % 3 == 0) x.back() = number<T>(bad);  // the first is named
        const std::string expected = refusal(scalar, x, 2), got = refusal(vectors, x, 2);
        INFO(cols << ", " << at << ", " << bad);
        CHECK(expected != "accepted");
        CHECK(got == expected);
      }
    }
  }
}

TEST_CASE("e4m3 activations: NaN and infinities are refused wherever they are, as scalar does") {
  refuse_everywhere<float>();
  refuse_everywhere<half>();
  refuse_everywhere<bfloat16>();
  const std::vector<half> signalling(64, half::from_bits(0x7C01));
  CHECK(refusal(vectors, signalling, 1) == refusal(scalar, signalling, 1));
}

TEST_CASE("e4m3 activations are the same over any number of threads, and so is what is refused") {
  reference::generator random(tetromino_test::seed());
  sample<float> x(random, 3, 41, 700);
  const guarded_e4m3 expected = rounded_by(scalar, x.view);
  for (unsigned count = 1; count <= 17; ++count) {
    thread_executor threads(count);
    CHECK(rounded_by(vectors.on(threads), x.view) == expected);
  }
  x.view.row(1, 5)[699] = x.view.row(2, 7)[0] = HUGE_VALF;
  for (unsigned count = 1; count <= 17; ++count) {
    thread_executor threads(count);
    const auto refused = try_quantize_e4m3(vectors.on(threads), x.view);
    REQUIRE_FALSE(refused);
    CHECK_THAT(refused.error().what(), contains("row 46, column 699"));
  }
}

TEST_CASE("e4m3 activations: sixteen rows of 4096 are work for sixteen threads, and many rows no crowd of tasks") {
  std::vector<std::size_t> counts;
  const auto counting = [&](std::size_t count, task_ref task) {
    counts.push_back(count);
    for (std::size_t i = 0; i < count; ++i) task(i);
  };
  for (const std::size_t rows : {1u, 16u, 1024u}) {
    const matrix<float> x(rows, 4096);
    CHECK(quantize_e4m3(vectors.on(counting), x).values == std::vector<std::uint8_t>(rows * 4096));
  }
  CHECK(counts == std::vector<std::size_t>{16, 256});
}

}  // namespace

#endif
