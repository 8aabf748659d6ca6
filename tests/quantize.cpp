#include "check.hpp"

#include <tetromino/quantize.hpp>
#include <tetromino/thread_executor.hpp>

#include <tetromino/dequantize.hpp>
#include <tetromino/layout/compressed_tensors.hpp>
#include <tetromino/metrics.hpp>

#include "reference/floats.hpp"
#include "support/fastest.hpp"
#include "support/oracle.hpp"

#include <algorithm>  // std::fill, std::count, std::copy, std::equal, std::min
#include <array>      // std::array
#include <cmath>      // std::ldexp, std::fabs, std::nextafter, std::signbit
#include <cstddef>    // std::size_t, std::ptrdiff_t
#include <cstdint>    // std::uint8_t, std::uint32_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span
#include <string>     // std::string, std::to_string
#include <utility>    // std::as_const, std::pair
#include <vector>     // std::vector

namespace {

using namespace tetromino;
using tetromino_test::difference;
using tetromino_test::fastest;
using tetromino_test::number;
using tetromino_test::sample;

/// The packed bytes of a recipe as the oracle has them.
template <class T>
reference::packed expected_bytes(const recipe& r, const quantize_options& options, const sample<T>& x) {
  const double largest = tetromino_test::largest_finite<T>();
  return reference::quantize(tetromino_test::oracle_of(r, options, largest), x.view.matrices, x.view.rows, x.view.cols,
                             x.values(), options.column_weights);
}

std::string describe(const recipe& r, std::size_t matrices, std::size_t rows, std::size_t cols) {
  return r.name() + " of [" + std::to_string(matrices) + ", " + std::to_string(rows) + ", " + std::to_string(cols) +
         "]";
}

/// Packs a random tensor of random options and compares every byte with the oracle's.
template <class T>
void compare_with_oracle(const recipe& r, std::size_t cols, reference::generator& random) {
  const std::size_t matrices = 1 + random.below(2) * random.below(3);
  const std::size_t rows = 1 + random.below(2);
  const sample<T> x(random, matrices, rows, cols);
  quantize_options options;
  std::vector<float> weights;
  std::vector<float> tensor_scales;
  if (random.below(3) == 0) {
    weights.resize(random.below(2) == 0 ? cols : matrices * cols);
    for (float& w : weights) w = random.below(8) == 0 ? 0.0f : static_cast<float>(random.uniform() / random.uniform());
    if (random.below(4) == 0) {  // some columns that weights cannot tell apart
      const std::size_t from = random.below(weights.size() + 1), to = from + random.below(weights.size() - from + 1);
      for (std::size_t k = from; k < to; ++k) weights[k] = random.below(2) == 0 ? 0.0f : 3e38f;
    }
    options.column_weights = weights;
  }
  if (random.below(4) == 0) {
    options.rounding = element_rounding::stochastic;
    options.seed = random.bits();
    options.first_index = random.below(2) * random.bits();
  }
  if (r.format.scale == scale_type::e4m3) {
    if (random.below(4) == 0) options.tiny_blocks = tiny_block_scale::least;
    options.scope = random.below(2) == 0 ? tensor_scale_scope::batch : tensor_scale_scope::per_matrix;
    if (random.below(4) == 0) {
      tensor_scales.resize(random.below(2) == 0 ? 1 : matrices);
      for (float& t : tensor_scales) t = static_cast<float>(random.uniform() / 100);
      options.tensor_scales = tensor_scales;
    }
  }
  const reference::packed expected = expected_bytes(r, options, x);
  INFO(describe(r, matrices, rows, cols) << (weights.empty() ? "" : ", weighted")
                                         << (options.rounding == element_rounding::stochastic ? ", stochastic" : ""));
  REQUIRE(difference(expected, quantize(scalar, x.view, r, options)) == "");
  REQUIRE(difference(expected, quantize(fastest, x.view, r, options)) == "");
}

void compare_with_oracle(const recipe& r, std::size_t cols, reference::generator& random, std::size_t type) {
  if (type % 3 == 0) return compare_with_oracle<float>(r, cols, random);
  if (type % 3 == 1) return compare_with_oracle<half>(r, cols, random);
  compare_with_oracle<bfloat16>(r, cols, random);
}

}  // namespace

TEST_CASE("every recipe without macro blocks packs what the oracle packs, K = 0 ... 300") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : tetromino_test::plain_recipes()) {
    for (std::size_t cols = 0; cols <= 300; ++cols) compare_with_oracle(r, cols, random, cols);
  }
}

TEST_CASE("every macro-block recipe packs what the oracle packs, some K") {
  reference::generator random(tetromino_test::seed());
  for (const auto& [macro, sizes] :
       {std::pair{"mbs-static", 40}, std::pair{"mbs-search", 16}, std::pair{"mbs-search256", 2}}) {
    for (const recipe& r : tetromino_test::macro_recipes(macro)) {
      for (int i = 0; i < sizes; ++i) compare_with_oracle(r, random.below(301), random, random.below(3));
    }
  }
}

TEST_CASE("every recipe packs what the oracle packs, K = 0 ... 300, every input type", "[.slow]") {
  reference::generator random(tetromino_test::seed());
  std::vector<recipe> recipes = tetromino_test::plain_recipes();
  for (const std::string macro : {"mbs-static", "mbs-search", "mbs-search256"}) {
    for (const recipe& r : tetromino_test::macro_recipes(macro)) recipes.push_back(r);
  }
  for (const recipe& r : recipes) {
    const bool long_search = r.format.macro_block != 0 && r.macro == macro_rule::search_256;
    for (std::size_t cols = 0; cols <= 300; ++cols) {
      for (std::size_t type = 0; type < 3; ++type) {
        if (!long_search || (cols + type) % 7 == 0) compare_with_oracle(r, cols, random, type);
      }
    }
  }
}

namespace {

using value_function = double (*)(unsigned);

/// Packs every value with |x| <= limit of a 16-bit format behind an element `first` that fixes the scale of the block,
/// and compares with the oracle: scales with `scale`, codes with those of x / unit.
template <class Element, class Format>
void pack_all(value_function value, double first, double limit, unsigned scale, double unit,
              const quantize_options& options, reference::disagreements& found) {
  std::vector<Element> x;
  for (unsigned code = 0; code < 0x10000; ++code) {
    const double v = value(code);
    if (!(std::fabs(v) <= limit)) continue;
    if (x.size() % Format::block == 0) x.push_back(number<Element>(static_cast<float>(first)));
    x.push_back(number<Element>(static_cast<float>(v)));
  }
  x.resize((x.size() + Format::block - 1) / Format::block * Format::block, number<Element>(0));
  const matrix_view<const Element> view(x.data(), x.size() / Format::block, Format::block);
  const packed<Format> got = quantize<Format>(fastest, view, options);
  for (std::size_t b = 0; b < got.scales.size(); ++b) {
    found.compare(static_cast<std::uint32_t>(b), scale, got.scales[b]);
  }
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float v = tetromino_test::value_of(x[i]);
    const auto y = static_cast<float>(static_cast<double>(v) / unit);
    found.compare(reference::bits_of(v), reference::e2m1_encode(y), got.codes[i / 2] >> (i % 2 * 4) & 15u);
  }
}

/// All values of a 16-bit format under every E8M0 scale that elements of type Element can bring about.
template <class Element>
void pack_under_every_power_of_two(value_function value, int step, reference::disagreements& found) {
  quantize_options options;
  options.rule = scale_rule::floor;
  const double largest = tetromino_test::largest_finite<Element>();
  for (int e = -127; e <= 125; e += step) {
    const double first = std::ldexp(4.0, e);  // the floor rule puts the largest magnitude in [4, 8)
    if (first > largest ||
        static_cast<double>(tetromino_test::value_of(number<Element>(static_cast<float>(first)))) != first)
      continue;
    pack_all<Element, mxfp4>(value, first, std::min(std::nextafter(2 * first, 0.0), largest),
                             static_cast<unsigned>(e + 127), std::ldexp(1.0, e), options, found);
  }
}

/// All values of a 16-bit format under every E4M3 scale but 0 and NaN, with tensor scale 1.
template <class Element>
void pack_under_every_e4m3(value_function value, unsigned step, reference::disagreements& found) {
  constexpr float one = 1;
  quantize_options options;
  options.tensor_scales = {&one, 1};
  for (unsigned code = 1; code < 0x7F; code += step) {
    const double s = reference::e4m3_value(code);
    pack_all<Element, nvfp4>(value, 6 * s, 6 * s, code, s, options, found);
  }
}

void pack_everything(int step, reference::disagreements& found) {
  pack_under_every_power_of_two<half>(reference::half_value, 1, found);
  pack_under_every_power_of_two<bfloat16>(reference::bfloat16_value, step, found);
  pack_under_every_power_of_two<float>(reference::half_value, step, found);
  pack_under_every_e4m3<half>(reference::half_value, static_cast<unsigned>(step), found);
  pack_under_every_e4m3<bfloat16>(reference::bfloat16_value, static_cast<unsigned>(step), found);
}

/// A caller's executor that runs its tasks backwards.
struct backwards {
  void operator()(std::size_t count, task_ref task) const {
    for (std::size_t i = count; i > 0; --i) task(i - 1);
  }
};

template <class Format>
bool same_bytes(const packed<Format>& a, const packed<any_format>& b) {
  return a.shape() == b.shape() && a.codes == b.codes && a.scales == b.scales && a.macros == b.macros &&
         a.tensor_scales == b.tensor_scales;
}

/// One recipe of every kind.
std::vector<recipe> few_recipes() {
  std::vector<recipe> out;
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/floor", "mxfp4-32/min-error", "mxfp4-16/oas/mbs-search",
                           "mxfp4-32/even/mbs-static@64", "nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error"}) {
    out.push_back(recipe::parse(name));
  }
  return out;
}

}  // namespace

TEST_CASE("a recipe may be given by its name, and a wrong name is an error like any other") {
  const float x[32] = {1.0f, -6.0f, 0.5f};
  const matrix_view w(x, 1, 32);
  const std::string name = "mxfp4/floor";
  const packed<any_format> expected = quantize(scalar, w, recipe::parse(name));
  CHECK(same_bytes(quantize(scalar, w, "mxfp4/floor"), expected));
  CHECK(same_bytes(try_quantize(scalar, w, name).value(), expected));
  packed<any_format> out(mxfp4{}, 1, 1, 32);
  quantize_to(scalar, w, name, out.view());
  CHECK(same_bytes(out, expected));
  packed<any_format> whole(mxfp4{}, 1, 1, 32);
  quantize_to(scalar, w, name, whole);
  CHECK(same_bytes(whole, expected));
  packed<mxfp4> typed({}, 1, 1, 32);
  quantize_options floor;
  floor.rule = scale_rule::floor;
  quantize_to(scalar, w, typed, floor);
  CHECK(same_bytes(typed, expected));
  CHECK(same_bytes(quantize(scalar, w, any_format(mxfp4{}), floor), expected));
  CHECK(try_quantize(scalar, w, "mxfp4/flor").error().code() == errc::unknown_name);
  CHECK_THROWS_AS(quantize(scalar, w, "mxfp4/flor"), error);
}

TEST_CASE("halves and bfloat16s under a sample of all scales") {
  reference::disagreements found;
  pack_everything(11, found);
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("all halves and bfloat16s under all scales", "[.slow]") {
  reference::disagreements found;
  pack_everything(1, found);
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("the ends of the scale range: largest floats, subnormals, zero blocks") {
  const auto scale_byte = [](const char* name, float a) {
    matrix<float> x(1, 32);
    x(0, 5) = a;
    return static_cast<int>(quantize(scalar, x, recipe::parse(name)).scales[0]);
  };
  constexpr float largest = 0x1.fffffep127f;
  CHECK(scale_byte("mxfp4-32/floor", largest) == 127 + 125);
  CHECK(scale_byte("mxfp4-32/ceil", largest) == 127 + 125);  // under 2^126 it would decode to infinity
  CHECK(scale_byte("mxfp4-32/ceil", 0x1p127f) == 127 + 125);
  CHECK(scale_byte("mxfp4-32/oas", largest) == 127 + 125);
  CHECK(scale_byte("mxfp4-32/oas", 0x1.cp127f) == 127 + 125);
  CHECK(scale_byte("mxfp4-32/even", 0x1.cp127f) == 127 + 125);
  CHECK(scale_byte("mxfp4-32/even", 0x1.cp126f) == 127 + 125);
  for (const char* name : {"mxfp4-32/floor", "mxfp4-32/ceil", "mxfp4-32/round-up", "mxfp4-32/even", "mxfp4-32/oas"}) {
    CHECK(scale_byte(name, 0x1p-149f) == 0);
    CHECK(scale_byte(name, 0x1p-126f) == 0);
    CHECK(scale_byte(name, 0x1p-125f) == 0);
    CHECK(scale_byte(name, 0x1p-124f) == 1);
    CHECK(scale_byte(name, 0.0f) == 0);
    CHECK(scale_byte(name, -0.0f) == 0);
  }
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : tetromino_test::plain_recipes()) {
    for (int i = 0; i < 40; ++i) {
      // One block or two near an end: subnormals, the smallest normals, or the largest floats.
      sample<float> x(random, 1, 1, 1 + random.below(64));
      const int exponent = i % 4 == 3   ? 127
                           : i % 4 == 2 ? -122
                           : i % 4 == 1 ? -126
                                        : -130 - static_cast<int>(random.below(20));
      x.fill([&] { return std::ldexp(static_cast<float>(random.uniform()) * 1.99f - 1.0f, exponent); });
      INFO(describe(r, 1, 1, x.view.cols) << ", 2^" << exponent);
      const reference::packed expected = expected_bytes(r, {}, x);
      REQUIRE(difference(expected, quantize(scalar, x.view, r)) == "");
      REQUIRE(difference(expected, quantize(fastest, x.view, r)) == "");
    }
  }
}

TEST_CASE("a zero block has code 0 throughout, a zero among others keeps its sign") {
  matrix<float> x(1, 64);
  std::fill(x.data.begin(), x.data.end(), -0.0f);
  x(0, 40) = 1.0f;
  for (const char* name :
       {"mxfp4-32/oas", "mxfp4-32/oas/mbs-search", "mxfp4-32/floor/mbs-static@32", "nvfp4/amax", "nvfp4/min-error"}) {
    INFO(name);
    const auto got = quantize(fastest, x, recipe::parse(name));
    const std::size_t zero_bytes = 16;
    CHECK(std::count(got.codes.begin(), got.codes.begin() + zero_bytes, 0) == zero_bytes);
    CHECK(got.scales[0] == 0);
    CHECK((got.codes[16 + 3] & 0xF) == 8);
    const matrix<float> back = dequantize<float>(fastest, got);
    CHECK(!std::signbit(back(0, 0)));
    CHECK(std::signbit(back(0, 41)));
  }
}

TEST_CASE("a format type packs as the recipe of its default rules, whatever the view") {
  reference::generator random(tetromino_test::seed());
  const sample<bfloat16> x(random, 2, 3, 200);
  const auto check = [&](auto format, const char* name) {
    using format_type = decltype(format);
    INFO(name);
    const packed<any_format> expected = quantize(scalar, x.view, recipe::parse(name));
    CHECK(same_bytes(quantize<format_type>(scalar, x.view), expected));
    CHECK(same_bytes(try_quantize(fastest, x.view, any_format(format)).value(), expected));
    packed<format_type> storage(format, 2, 3, 200);
    quantize_to(fastest, x.view, storage.view());
    CHECK(same_bytes(storage, expected));
    const matrix_view<const bfloat16> one(x.view.row(1, 0), 3, 200, x.view.row_stride);
    CHECK(quantize<format_type>(scalar, one).scales == quantize<format_type>(scalar, x.view[1]).scales);
  };
  check(mxfp4{}, "mxfp4-32/oas");
  check(mxfp4_16{}, "mxfp4-16/oas");
  check(nvfp4{}, "nvfp4/amax");
  check(mbs<mxfp4>{}, "mxfp4-32/oas/mbs-search");
  check(mbs<mxfp4, 32>{}, "mxfp4-32/oas/mbs-search@32");
  check(mbs<mxfp4_16, 64>{}, "mxfp4-16/oas/mbs-search@64");
  check(mbs<mxfp4_16, 256>{}, "mxfp4-16/oas/mbs-search@256");
}

TEST_CASE("empty tensors pack into nothing") {
  const thread_executor threads(2);
  for (const recipe& r : few_recipes()) {
    INFO(r.name());
    for (const auto& [matrices, rows, cols] :
         {std::array<std::size_t, 3>{0, 4, 64}, {2, 0, 64}, {2, 4, 0}, {0, 0, 0}}) {
      const matrix<half> x(matrices, rows, cols);
      const packed<any_format> got = quantize(fastest, x, r);
      CHECK(got.codes.empty());
      CHECK(got.scales.empty());
      CHECK(got.macros.empty());
      CHECK(same_bytes(quantize(scalar.on(threads), x, r), got));
      CHECK(dequantize<half>(fastest, got).data.empty());
    }
  }
}

TEST_CASE("any split of the work gives the same bytes") {
  reference::generator random(tetromino_test::seed());
  const sample<float> x(random, 3, 60, 1010);  // several tasks of work
  const thread_executor threads(3);
  const backwards reversed;
  for (const recipe& r : few_recipes()) {
    for (const bool stochastic : {false, true}) {
      INFO(r.name() << (stochastic ? ", stochastic" : ""));
      quantize_options options;
      options.seed = 77;
      options.first_index = 5;
      options.rounding = stochastic ? element_rounding::stochastic : element_rounding::nearest_even;
      options.scope = tensor_scale_scope::per_matrix;
      const packed<any_format> whole = quantize(fastest, x.view, r, options);
      CHECK(same_bytes(quantize(fastest.on(threads), x.view, r, options), whole));
      CHECK(same_bytes(quantize(fastest.on(reversed), x.view, r, options), whole));

      // Slices of whole rows, packed apart: the caller carries the tensor scale and the position in the stream.
      packed<any_format> joined(r.format, 3, 60, 1010, 3);
      joined.tensor_scales = whole.tensor_scales;
      for (std::size_t e = 0; e < 3; ++e) {
        for (std::size_t row = 0; row < 60; row += 23) {
          const std::size_t rows = std::min<std::size_t>(23, 60 - row);
          const matrix_view<const float> slice(x.view.row(e, row), rows, 1010, x.view.row_stride);
          quantize_options of_slice = options;
          of_slice.first_index += (e * 60 + row) * 1010;
          if (!whole.tensor_scales.empty()) of_slice.tensor_scales = {&whole.tensor_scales[e], 1};
          const packed<any_format> part = quantize(scalar, slice, r, of_slice);
          const packed_shape one{r.format, 1, 1, 1010};
          const std::size_t at = e * 60 + row;
          const auto place = [at](std::vector<std::uint8_t>& all, const std::vector<std::uint8_t>& piece,
                                  std::size_t bytes_per_row) {
            std::copy(piece.begin(), piece.end(), all.begin() + static_cast<std::ptrdiff_t>(at * bytes_per_row));
          };
          place(joined.codes, part.codes, one.code_bytes());
          place(joined.scales, part.scales, one.scale_bytes());
          place(joined.macros, part.macros, one.macro_bytes());
        }
      }
      CHECK(same_bytes(joined, whole));
    }
  }
}

TEST_CASE("storage of the caller is written in full and nothing around it") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : few_recipes()) {
    quantize_options options;
    options.rule = r.rule;
    options.macro = r.macro;
    for (const std::size_t cols : {1u, 15u, 33u, 130u, 257u}) {
      INFO(describe(r, 2, 3, cols));
      const sample<half> x(random, 2, 3, cols);
      const packed<any_format> expected = quantize(scalar, x.view, r);
      for (const std::uint8_t fill : {std::uint8_t{0x00}, std::uint8_t{0xA5}}) {
        constexpr std::size_t guard = 64;
        const auto guarded = [&](std::size_t size) { return std::vector<std::uint8_t>(size + 2 * guard, fill); };
        auto codes = guarded(expected.codes.size());
        auto scales = guarded(expected.scales.size());
        auto macros = guarded(expected.macros.size());
        std::vector<float> tensor_scales(expected.tensor_scales.size(), -1.0f);
        const auto inside = [](std::vector<std::uint8_t>& bytes) {
          return std::span(bytes).subspan(guard, bytes.size() - 2 * guard);
        };
        quantize_to(fastest, x.view,
                    packed_view<any_format, std::uint8_t>{r.format, 2, 3, cols, inside(codes), inside(scales),
                                                          inside(macros), tensor_scales},
                    options);
        const auto is_intact = [&](std::vector<std::uint8_t>& bytes, const std::vector<std::uint8_t>& content) {
          return std::count(bytes.begin(), bytes.begin() + guard, fill) == guard &&
                 std::count(bytes.end() - guard, bytes.end(), fill) == guard &&
                 std::equal(content.begin(), content.end(), bytes.begin() + guard);
        };
        CHECK(is_intact(codes, expected.codes));
        CHECK(is_intact(scales, expected.scales));
        CHECK(is_intact(macros, expected.macros));
        CHECK(tensor_scales == expected.tensor_scales);
      }
    }
  }
}

TEST_CASE("the largest magnitude of a batch") {
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 200; ++i) {
    const sample<bfloat16> x(random, 1 + random.below(3), 1 + random.below(3), random.below(100));
    const float expected = reference::amax(x.values());
    CHECK(amax(scalar, x.view) == expected);
    CHECK(amax(fastest, x.view) == expected);
  }
}

namespace {

template <class T>
void compare_round_trips(const recipe& r, std::size_t cols, const quantize_options& options,
                         reference::generator& random) {
  const sample<T> x(random, 2, 2, cols);
  const matrix<T> expected = dequantize<T>(scalar, quantize(scalar, x.view, r, options));
  const auto values = tetromino_test::values_of(std::span<const T>(expected.data));
  INFO(describe(r, 2, 2, cols));

  matrix<T> apart(2, 2, cols);
  fake_quantize(scalar, x.view, r, apart.view(), options);
  REQUIRE(tetromino_test::first_difference("scalar", values,
                                           tetromino_test::values_of(std::span<const T>(apart.data))) == "");

  sample<T> in_place = x;
  in_place.view.data = in_place.memory.data() + (x.view.data - x.memory.data());
  fake_quantize(fastest, in_place.view, r, in_place.view, options);
  REQUIRE(tetromino_test::first_difference("in place", values, in_place.values()) == "");
}

}  // namespace

TEST_CASE("fake_quantize is quantize and dequantize, in place too") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : few_recipes()) {
    for (const std::size_t cols : {0u, 1u, 31u, 32u, 100u, 2047u, 2048u, 2049u, 5000u}) {
      quantize_options options;
      options.scope = cols % 2 == 0 ? tensor_scale_scope::batch : tensor_scale_scope::per_matrix;
      std::vector<float> weights(cols);
      for (float& w : weights) w = static_cast<float>(random.uniform());
      if (cols % 3 == 0) options.column_weights = weights;
      if (cols % 5 == 0) options.rounding = element_rounding::stochastic;
      compare_round_trips<float>(r, cols, options, random);
      compare_round_trips<half>(r, cols, options, random);
      compare_round_trips<bfloat16>(r, cols, options, random);
    }
  }
}

TEST_CASE("fake_quantize refuses an output of another shape") {
  const matrix<float> x(3, 64);
  matrix<float> out(3, 63);
  const auto done = try_fake_quantize(scalar, x, recipe{}, out.view());
  REQUIRE(!done);
  CHECK(done.error().code() == errc::shape_mismatch);
  CHECK_THROWS_WITH(fake_quantize(scalar, x, recipe{}, out.view()), tetromino_test::contains("[1, 3, 63]"));
}

TEST_CASE("weights that cannot tell candidates apart do not count") {
  reference::generator random(tetromino_test::seed());
  matrix<float> x(4, 256);
  for (float& v : x.data) v = static_cast<float>(random.normal());
  for (const char* name : {"mxfp4-32/min-error", "nvfp4/min-error", "nvfp4/four-over-six", "mxfp4-32/oas/mbs-search",
                           "mxfp4-16/min-error/mbs-search256@32"}) {
    const recipe r = recipe::parse(name);
    const auto plain = quantize(scalar, x, r);
    for (const float weight : {0.0f, 1e-45f, 1e-41f, 1e-38f, 0x1.fffffep-101f, 3e38f}) {
      INFO(name << ", weights " << weight);
      const std::vector<float> weights(256, weight);
      const auto got = quantize(scalar, x, r, {.column_weights = weights});
      if (weight > 1) {  // some sums are finite, and count
        CHECK(qsnr(x, dequantize<float>(scalar, got)) > qsnr(x, dequantize<float>(scalar, plain)) - 3);
        continue;
      }
      CHECK(got.codes == plain.codes);
      CHECK(got.scales == plain.scales);
      CHECK(got.macros == plain.macros);
      CHECK(quantize(fastest, x, r, {.column_weights = weights}).codes == plain.codes);
      matrix<float> fake(4, 256);
      fake_quantize(scalar, x, r, fake.view(), {.column_weights = weights});
      CHECK(fake.data == dequantize<float>(scalar, plain).data);
    }
    // From 2^-100 on, weights count, however many there are: only their ratios matter.
    std::vector<float> small(256), usual(256);
    for (std::size_t k = 0; k < 256; ++k) usual[k] = static_cast<float>(1 + k % 7), small[k] = usual[k] * 0x1p-100f;
    const auto as_usual = quantize(scalar, x, r, {.column_weights = usual});
    const auto as_small = quantize(scalar, x, r, {.column_weights = small});
    CHECK(as_small.codes == as_usual.codes);
    CHECK(as_small.scales == as_usual.scales);
    CHECK(as_small.macros == as_usual.macros);
    // Dead columns, as calibration has them: only their own blocks are searched without weights.
    std::vector<float> weights(256, 2.0f);
    for (std::size_t k = 64; k < 128; ++k) weights[k] = 0;
    const auto got = quantize(scalar, x, r, {.column_weights = weights});
    CHECK(quantize(fastest, x, r, {.column_weights = weights}).codes == got.codes);
    if (r.format.macro_block <= 64) CHECK(got.codes == plain.codes);
  }
}

TEST_CASE("no scale is chosen under which the input's type overflows") {
  const auto check = []<class T>(T largest, float huge, const std::string& name) {
    const recipe r = recipe::parse(name);
    std::vector<T> x(256, tetromino::detail::from_float<T>(1.0f));
    x[0] = largest;
    x[40] = tetromino::detail::from_float<T>(-huge);
    x[70] = tetromino::detail::from_float<T>(std::numeric_limits<float>::infinity());
    const matrix_view<const T> view(x.data(), 1, 256);
    for (const auto rounding : {element_rounding::nearest_even, element_rounding::stochastic}) {
      INFO(name << ", " << sizeof(T) << " bytes, huge " << huge);
      const quantize_options options{.rounding = rounding, .special = special_values::saturate};
      const auto packed = quantize(scalar, view, r, options);
      const auto fast = quantize(fastest, view, r, options);
      CHECK(fast.codes == packed.codes);
      CHECK(fast.scales == packed.scales);
      const matrix<T> back = dequantize<T>(scalar, packed);
      for (const std::size_t k : {0u, 40u, 70u}) {
        const float expected = tetromino::detail::to_float(k == 70 ? largest : x[k]);
        const float got = tetromino::detail::to_float(back(0, k));
        CHECK(std::fabs(got - expected) <= 0.51f * std::fabs(expected));
      }
    }
  };
  for (const std::string name :
       {"mxfp4-32/floor", "mxfp4-32/ceil", "mxfp4-32/round-up", "mxfp4-32/even", "mxfp4-32/oas", "mxfp4-16/min-error",
        "mxfp4-32/oas/mbs-search@64", "mxfp4-16/min-error/mbs-static@32", "nvfp4/amax", "nvfp4/four-over-six",
        "nvfp4/min-error"}) {
    for (const float huge : {58000.0f, 65504.0f, 40000.0f}) check(half::from_bits(0x7BFF), huge, name);
    for (const float huge : {3e38f, 0x1.fep127f, 2.8e38f}) check(bfloat16::from_bits(0x7F7F), huge, name);
    for (const float huge : {3e38f, 0x1.fffffep127f, 2.8e38f}) check(0x1.fffffep127f, huge, name);
  }
}

TEST_CASE("an infinity that saturates leaves the tensor scale to the other elements") {
  std::vector<float> x(64, 1.0f), without = x;
  x[3] = std::numeric_limits<float>::infinity(), without[3] = 0;
  const matrix_view<const float> view(x.data(), 2, 32), finite(without.data(), 2, 32);
  for (const char* name : {"nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error"}) {
    INFO(name);
    const auto got = quantize(scalar, view, recipe::parse(name), {.special = special_values::saturate});
    CHECK(got.tensor_scales == quantize(scalar, finite, recipe::parse(name)).tensor_scales);
    CHECK(dequantize<float>(scalar, got)(1, 5) == 1.0f);
    CHECK(dequantize<float>(scalar, got)(0, 3) >= 1.0f);
    CHECK(quantize(fastest, view, recipe::parse(name), {.special = special_values::saturate}).tensor_scales ==
          got.tensor_scales);
  }
  CHECK(amax(scalar, view, special_values::saturate) == 1.0f);
  // Rotated, an infinity is all over its 32 columns: those are left out.
  const auto rotated = [&](const matrix_view<const float>& from) {
    return quantize(scalar, from, recipe::parse("nvfp4/amax/hadamard-32"), {.special = special_values::saturate});
  };
  std::fill(without.begin(), without.begin() + 32, 0.0f);
  CHECK(rotated(view).tensor_scales == rotated(finite).tensor_scales);
}

TEST_CASE("a tensor of infinities and zeros alone saturates at the largest finite values") {
  const auto check = []<class T>(T infinity, T largest) {
    std::vector<T> x(3 * 64);  // the second matrix is zero, the third has values beside the infinity
    for (const std::size_t k : {3u, 40u, 41u}) x[k] = infinity;
    x[128 + 7] = infinity, x[128 + 20] = tetromino::detail::from_float<T>(1.0f);
    const tetromino::batch_view<const T> view(x.data(), 3, 2, 32);
    for (const char* name : {"nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error", "nvfp4/amax/hadamard-16"}) {
      INFO(name << ", " << sizeof(T) << " bytes");
      const recipe r = recipe::parse(name);
      const quantize_options options{.special = special_values::saturate, .scope = tensor_scale_scope::per_matrix};
      const auto got = quantize(scalar, view, r, options);
      CHECK(got.tensor_scales[0] == tensor_scale_for(tetromino::detail::to_float(largest), r.rule));
      CHECK(got.tensor_scales[1] == 0.0f);
      CHECK(got.tensor_scales[2] <= tensor_scale_for(1.0f, r.rule));
      const auto fast = quantize(fastest, view, r, options);
      CHECK(fast.tensor_scales == got.tensor_scales);
      CHECK(fast.scales == got.scales);
      CHECK(fast.codes == got.codes);
      if (r.rotation != 0) continue;
      const auto back = dequantize<T>(scalar, got);
      const float decoded = tetromino::detail::to_float(back.data[3]);
      CHECK(std::isfinite(decoded));
      CHECK(decoded > 0.8f * tetromino::detail::to_float(largest));
      CHECK(tetromino::detail::to_float(back.data[4]) == 0.0f);
    }
  };
  check(half::from_bits(0x7C00), half::from_bits(0x7BFF));
  check(bfloat16::from_bits(0x7F80), bfloat16::from_bits(0x7F7F));
  check(std::numeric_limits<float>::infinity(), 0x1.fffffep127f);
}

TEST_CASE("tiny NVFP4 blocks vanish, or keep the least scale") {
  std::vector<float> x(48, 0.0f);
  x[0] = 1.0f, x[16] = 2e-6f, x[17] = -1e-6f;
  const matrix_view<const float> view(x.data(), 1, 48);
  for (const char* name : {"nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error"}) {
    INFO(name);
    const recipe r = recipe::parse(name);
    CHECK(dequantize<float>(scalar, quantize(scalar, view, r))(0, 16) == 0.0f);
    const auto kept = quantize(scalar, view, r, {.tiny_blocks = tiny_block_scale::least});
    CHECK(kept.scales[1] != 0);
    CHECK(kept.scales[2] == 0);
    CHECK(dequantize<float>(scalar, kept)(0, 16) == Approx(2e-6).epsilon(0.2));
    CHECK(quantize(fastest, view, r, {.tiny_blocks = tiny_block_scale::least}).scales == kept.scales);
  }
}

TEST_CASE("tiny tensors get a tensor scale that has an inverse") {
  for (const float tiny : {1e-45f, 1e-43f, 1e-38f, 1e-36f}) {
    INFO(tiny);
    const std::vector<float> x(16, tiny);
    const matrix_view<const float> view(x.data(), 1, 16);
    for (const scale_rule rule : {scale_rule::amax, scale_rule::four_over_six, scale_rule::min_error}) {
      const auto got = quantize<nvfp4>(scalar, view, {.rule = rule});
      CHECK(got.tensor_scales[0] == 0x1p-126f);
      CHECK(layout::is_invertible(got.tensor_scales[0]));
      CHECK(dequantize<float>(scalar, got)(0, 0) <= 1.2f * tiny);
    }
  }
}

TEST_CASE("a shape makes views of a caller's buffers, to write to and to read") {
  std::vector<float> x(2 * 3 * 128);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 97) / 31 - 1.5f;
  const batch_view<const float> view(x.data(), 2, 3, 128);
  for (const char* name : {"nvfp4", "mxfp4-32", "mxfp4-16/oas/mbs-search"}) {
    INFO(name);
    const auto expected = quantize(scalar, view, name, {.scope = tensor_scale_scope::per_matrix});
    const packed_shape shape(recipe::parse(name).format, 2, 3, 128);
    std::vector<std::uint8_t> codes(shape.code_bytes()), scales(shape.scale_bytes()), macros(shape.macro_bytes());
    std::vector<float> tensor_scales(expected.tensor_scales.size());
    const auto out = shape.view(codes, std::span(scales), macros, tensor_scales);
    static_assert(std::is_same_v<decltype(out), const packed_view<any_format, std::uint8_t>>);
    quantize_to(scalar, view, name, out);
    CHECK(codes == expected.codes);
    CHECK(scales == expected.scales);
    CHECK(macros == expected.macros);
    CHECK(tensor_scales == expected.tensor_scales);
    const auto in = shape.view(std::as_const(codes), scales, macros, tensor_scales);
    static_assert(std::is_same_v<decltype(in), const packed_view<any_format>>);
    CHECK(dequantize<float>(scalar, in).data == dequantize<float>(scalar, expected).data);
  }
  const packed_shape one(mxfp4{}, 3, 128);
  CHECK(one.matrices == 1);
  std::vector<std::uint8_t> codes(one.code_bytes()), scales(one.scale_bytes() - 1);
  CHECK(try_quantize_to(scalar, view[0], one.view(codes, scales)).error().code() == errc::shape_mismatch);
}

TEST_CASE("experts in allocations of their own share a tensor scale") {
  std::vector<std::vector<float>> weights(3, std::vector<float>(4 * 64));
  std::vector<float> together;
  std::vector<matrix_view<const float>> experts;
  for (std::size_t e = 0; e < 3; ++e) {
    for (std::size_t i = 0; i < 4 * 64; ++i) weights[e][i] = static_cast<float>((i * 7 + e * 13) % 101) / 50 - 1;
    experts.emplace_back(weights[e].data(), 4, 64);
    together.insert(together.end(), weights[e].begin(), weights[e].end());
  }
  const auto expected = quantize<nvfp4>(scalar, batch_view<const float>(together.data(), 3, 4, 64));
  const float scale = tensor_scale_for(amax(scalar, experts), scale_rule::amax);
  packed<nvfp4> got({}, 3, 4, 64);
  for (std::size_t e = 0; e < 3; ++e) {
    quantize_to(scalar, experts[e], got.view()[e], {.tensor_scales = {&scale, 1}});
  }
  CHECK(got.codes == expected.codes);
  CHECK(got.scales == expected.scales);
  CHECK(got.tensor_scales == expected.tensor_scales);
}
