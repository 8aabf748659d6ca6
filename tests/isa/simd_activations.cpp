#include "check.hpp"

/// 8-bit activations of the simd backend against the scalar ones, byte by byte. Run for each backend of tetromino::cpu.

#include <tetromino/activations.hpp>
#include <tetromino/float16.hpp>
#include <tetromino/thread_executor.hpp>

#include "isa/backend.hpp"
#include "support/oracle.hpp"

#include <atomic>   // std::atomic
#include <cmath>    // std::nextafter, std::nanf
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
using tetromino_test::vectors;

/// Storage inside of more, which must stay as it was.
struct guarded_int8 {
  static constexpr std::size_t margin = 64;
  std::size_t rows, cols, blocks;
  std::vector<std::int8_t> values;
  std::vector<float> scales;

  guarded_int8(std::size_t rows_, std::size_t cols_)
      : rows(rows_),
        cols(cols_),
        blocks((cols_ + 31) / 32),
        values(rows * cols + 2 * margin, 77),
        scales(rows * blocks + 2 * margin, 77.0f) {}
  [[nodiscard]] int8_view<std::int8_t> view() {
    return {rows, cols, std::span(values).subspan(margin, rows * cols),
            std::span(scales).subspan(margin, rows * blocks)};
  }
  friend bool operator==(const guarded_int8& a, const guarded_int8& b) {
    return a.values == b.values && std::memcmp(a.scales.data(), b.scales.data(), 4 * a.scales.size()) == 0;
  }
};

template <class Policy, class Input>
guarded_int8 rounded_by(const Policy& policy, const Input& x) {
  const batch_view view(x);
  guarded_int8 out(view.matrices * view.rows, view.cols);
  quantize_int8_to(policy, x, out.view());
  return out;
}

template <class T>
void compare(const batch_view<T>& x) {
  INFO(x.matrices << " x " << x.rows << " x " << x.cols << ", " << sizeof(T) << " bytes");
  CHECK(rounded_by(vectors, x) == rounded_by(scalar, x));
}

TEST_CASE("8-bit activations are those of scalar: every width to past two spans, unaligned rows") {
  reference::generator random(tetromino_test::seed());
  for (std::size_t cols = 0; cols <= 1100; ++cols) {
    const std::size_t matrices = 1 + random.below(2), rows = 1 + random.below(2);
    compare(sample<float>(random, matrices, rows, cols).view);
    compare(sample<half>(random, matrices, rows, cols).view);
    compare(sample<bfloat16>(random, matrices, rows, cols).view);
  }
}

/// Every finite number of 16 bits, each in two blocks: beside itself alone, and beside one of larger magnitude.
template <class T>
void every_number(float most) {
  for (const std::size_t others : {std::size_t{0}, std::size_t{1}}) {
    std::vector<T> x;
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const T v = T::from_bits(static_cast<std::uint16_t>(bits));
      if (!(std::abs(tetromino_test::value_of(v)) <= most)) continue;
      x.push_back(v);
      // Neighbours in bits are neighbours in value, so that a block of 16 pairs has one amax and many roundings.
      x.push_back(others == 0 ? number<T>(-0.0f) : T::from_bits(static_cast<std::uint16_t>(bits ^ 0x8155)));
      if (!(std::abs(tetromino_test::value_of(x.back())) <= most)) x.back() = v;
    }
    compare(batch_view<T>(x.data(), 1, 1, x.size(), x.size(), 0));
  }
}

TEST_CASE("8-bit activations are those of scalar: every finite half and bfloat16") {
  every_number<half>(65504.0f);
  every_number<bfloat16>(0x1.FEp127f);
}

TEST_CASE("8-bit activations are those of scalar: around every tie, at every size of a block") {
  std::vector<float> largest = {127.0f, 254.0f, 0x1.FFFFFEp127f, 0x1p-126f, 0x1p-149f, 0x0.FFFFFEp-126f, 1.0f, 3.0f};
  for (const float edge : {0x1p-120f, 0x1p-121f, 127.0f * 0x1p-127f}) {
    largest.insert(largest.end(), {edge, std::nextafter(edge, 0.0f), std::nextafter(edge, 1.0f)});
  }
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 60; ++i) {
    largest.push_back(std::ldexp(static_cast<float>(random.uniform()), static_cast<int>(random.below(270)) - 144));
  }
  for (const float amax : largest) {
    std::vector<float> x;
    const auto add = [&](float v) {
      if (x.size() % 32 == 0) x.push_back(x.size() % 64 == 0 ? amax : -amax);
      x.push_back(std::clamp(v, -amax, amax));
    };
    for (int twice = 0; twice <= 254; ++twice) {  // halves of a step
      float v = static_cast<float>(twice / 254.0 * static_cast<double>(amax));
      for (int i = 0; i < 4; ++i) v = std::nextafter(v, 0.0f);
      for (int i = 0; i < 9; ++i, v = std::nextafter(v, HUGE_VALF)) add(v), add(-v);
    }
    INFO("amax = " << amax);
    compare(batch_view<float>(x.data(), 1, 1, x.size(), x.size(), 0));
  }
}

template <class T>
std::string refusal(const auto& policy, const std::vector<T>& x, std::size_t rows) {
  const auto r = try_quantize_int8(policy, matrix_view<const T>(x.data(), rows, x.size() / rows));
  if (r) return "accepted";
  CHECK(r.error().code() == errc::non_finite);
  return r.error().what();
}

template <class T>
void refuse_everywhere() {
  for (const std::size_t cols : {5u, 512u, 1060u}) {
    for (std::size_t at = 0; at < 2 * cols; at += at % 7 + 1) {
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

TEST_CASE("8-bit activations: NaN and infinities are refused wherever they are, as scalar does") {
  refuse_everywhere<float>();
  refuse_everywhere<half>();
  refuse_everywhere<bfloat16>();
  const std::vector<half> signalling(64, half::from_bits(0x7C01));
  CHECK(refusal(vectors, signalling, 1) == refusal(scalar, signalling, 1));
}

TEST_CASE("8-bit activations are the same over any number of threads, and so is what is refused") {
  reference::generator random(tetromino_test::seed());
  sample<float> x(random, 3, 41, 700);
  const guarded_int8 expected = rounded_by(scalar, x.view);
  for (unsigned count = 1; count <= 17; ++count) {
    thread_executor threads(count);
    CHECK(rounded_by(vectors.on(threads), x.view) == expected);
  }
  x.view.row(1, 5)[699] = x.view.row(2, 7)[0] = HUGE_VALF;
  for (unsigned count = 1; count <= 17; ++count) {
    thread_executor threads(count);
    const auto refused = try_quantize_int8(vectors.on(threads), x.view);
    REQUIRE_FALSE(refused);
    CHECK_THAT(refused.error().what(), contains("row 46, columns 672 to 699"));
  }
}

TEST_CASE("8-bit activations: sixteen rows of 4096 are work for sixteen threads, and many rows no crowd of tasks") {
  std::vector<std::size_t> counts;
  const auto counting = [&](std::size_t count, task_ref task) {
    counts.push_back(count);
    for (std::size_t i = 0; i < count; ++i) task(i);
  };
  for (const std::size_t rows : {1u, 16u, 1024u}) {
    const matrix<float> x(rows, 4096);
    CHECK(quantize_int8(vectors.on(counting), x).values == std::vector<std::int8_t>(rows * 4096));
  }
  CHECK(counts == std::vector<std::size_t>{16, 256});
}

}  // namespace

#endif
