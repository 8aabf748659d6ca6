#include "check.hpp"

/// Bytes do not depend on what the program has set of its floating-point state, and the state survives every call. Run
/// for each backend of tetromino::cpu.

#include <tetromino/block_scaled.hpp>
#include <tetromino/dequantize.hpp>
#include <tetromino/e4m3_activations.hpp>
#include <tetromino/hadamard.hpp>
#include <tetromino/matmul.hpp>
#include <tetromino/quantize.hpp>

#include "isa/backend.hpp"
#include "support/float_states.hpp"

#include <cmath>     // std::isnan, std::ldexp
#include <optional>  // std::optional
#include <string>    // std::string
#include <vector>    // std::vector

#if !TETROMINO_TEST_VECTORS
TEST_CASE("the simd backend exists") { WARN("xsimd was not found: there is nothing to test"); }
#else

namespace {

using namespace tetromino;
using tetromino_test::all_recipes;
using tetromino_test::odd_threads;
using tetromino_test::same;
using tetromino_test::states;
using tetromino_test::under;
using tetromino_test::vectors;

/// All that a policy makes of x, one after the other.
template <class T>
struct outcome {
  std::optional<packed<any_format> > bytes;
  std::vector<T> decoded, there_and_back;

  friend bool operator==(const outcome& a, const outcome& b) {
    return same(*a.bytes, *b.bytes) && same(a.decoded, b.decoded) && same(a.there_and_back, b.there_and_back);
  }
};
template <class T, class Policy>
outcome<T> outcome_of(const Policy& policy, const batch_view<T>& x, const recipe& r, const quantize_options& options) {
  outcome<T> out{quantize(policy, x, r, options), {}, {}};
  out.decoded = dequantize<T>(policy, *out.bytes).data;
  matrix<T> back(x.matrices, x.rows, x.cols);
  fake_quantize(policy, x, r, back.view(), options);
  out.there_and_back = back.data;
  if (r.rotation != 0) {  // sums of NaN have either's sign
    for (T& v : out.there_and_back) {
      if (std::isnan(tetromino::detail::to_float(v))) v = T{};
    }
  }
  return out;
}

template <class T>
void compare(reference::generator& random, recipe r) {
  const tetromino_test::sample<T> x(random, 1, 3, 1 + random.below(300));
  std::vector<float> weights(x.view.cols);
  for (float& w : weights) w = std::ldexp(1.0f, static_cast<int>(random.below(160)) - 130);
  quantize_options options{.special = random.below(2) == 0 ? special_values::poison : special_values::saturate};
  if (random.below(2) == 0) options.rounding = element_rounding::stochastic;
  if (random.below(2) == 0) options.column_weights = weights;
  if (random.below(3) == 0) options.tiny_blocks = tiny_block_scale::least;
  if (random.below(3) == 0) r.rotation = 32;
  INFO(r.name() << ", " << sizeof(T) << " bytes");
  const outcome<T> expected = outcome_of<T>(scalar, x.view, r, options);
  REQUIRE(outcome_of<T>(vectors, x.view, r, options) == expected);
  for (const auto& [name, bits] : states) {
    INFO(name);
    odd_threads threads{bits};
    CHECK(under(bits, [&] { return outcome_of<T>(vectors, x.view, r, options); }) == expected);
    CHECK(under(bits, [&] { return outcome_of<T>(vectors.on(threads), x.view, r, options); }) == expected);
    if (r.macro == macro_rule::search_256) continue;  // slow, and no other arithmetic
    CHECK(under(bits, [&] { return outcome_of<T>(scalar, x.view, r, options); }) == expected);
  }
}

}  // namespace

TEST_CASE("packing and unpacking give the same bytes in every floating-point state: every recipe") {
  reference::generator random(tetromino_test::seed());
  std::size_t turn = random.below(3);
  for (const recipe& r : all_recipes()) {
    turn = (turn + 1) % 3;
    if (turn == 0) compare<float>(random, r);
    if (turn == 1) compare<half>(random, r);
    if (turn == 2) compare<bfloat16>(random, r);
  }
}

TEST_CASE("packing and unpacking give the same bytes in every floating-point state: every recipe and type", "[.slow]") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : all_recipes()) {
    compare<float>(random, r);
    compare<half>(random, r);
    compare<bfloat16>(random, r);
  }
}

TEST_CASE("a tensor scale that is subnormal is one in every floating-point state") {
  const std::vector<float> x(32, 0x1p-130f), scale{0x1p-140f};
  const matrix_view<const float> view(x.data(), 2, 16);
  const auto pack = [&] { return quantize(vectors, view, recipe::parse("nvfp4/amax"), {.tensor_scales = scale}); };
  const packed<any_format> expected = pack();
  for (const auto& [name, bits] : states) {
    INFO(name);
    CHECK(same(under(bits, pack), expected));
  }
}

TEST_CASE("weights that are subnormal count as 0 in every floating-point state") {
  reference::generator random(tetromino_test::seed());
  const tetromino_test::sample<float> x(random, 1, 8, 256);
  std::vector<float> weights(256);
  for (float& w : weights) w = std::ldexp(1.0f, -149 + static_cast<int>(random.below(20)));
  for (const char* name : {"mxfp4-32/min-error", "nvfp4/min-error", "mxfp4-32/oas/mbs-search"}) {
    const recipe r = recipe::parse(name);
    const packed<any_format> expected = quantize(vectors, x.view, r, {.special = special_values::saturate});
    for (const auto& [state_name, bits] : states) {
      INFO(name << ", " << state_name);
      const auto pack = [&] {
        return quantize(vectors, x.view, r, {.special = special_values::saturate, .column_weights = weights});
      };
      CHECK(same(under(bits, pack), expected));
    }
  }
}

TEST_CASE("rotations, products and 8-bit activations are the same in every floating-point state") {
  reference::generator random(tetromino_test::seed());
  const tetromino_test::sample<float> x(random, 1, 5, 160), w(random, 1, 7, 160);
  const auto weights = quantize(vectors, w.view, recipe::parse("mxfp4-16/oas/mbs-static"));
  std::vector<float> tiny;  // subnormal numbers that are large beside the row's largest
  tiny.reserve(40);
  for (int k = 0; k < 40; ++k) tiny.push_back(std::ldexp(1.0f + static_cast<float>(k) / 64, -117 - k / 2));
  const auto run = [&](const auto& policy) {
    std::vector<std::vector<float> > out;
    matrix<float> turned(5, 160), product(5, 7);
    rotate(policy, x.view, hadamard{64, 3}, turned.view());
    out.push_back(turned.data);
    const int8_matrix small = quantize_int8(policy, x.view);
    out.push_back(small.scales);
    matmul(policy, small, weights, matrix_view<float>(product.data.data(), 5, 7));
    out.push_back(product.data);
    matmul(policy, x.view, weights, matrix_view<float>(product.data.data(), 5, 7));
    out.push_back(product.data);
    out.emplace_back(small.values.begin(), small.values.end());
    const e4m3_matrix eights = quantize_e4m3(policy, x.view);
    out.push_back(eights.scales);
    out.emplace_back(eights.values.begin(), eights.values.end());
    const e4m3_matrix least = quantize_e4m3(policy, matrix_view<const float>(tiny.data(), 1, tiny.size()));
    out.push_back(least.scales);
    out.emplace_back(least.values.begin(), least.values.end());
    return out;
  };
  const auto scalar_expected = run(scalar), expected = run(vectors);
  for (const auto& [name, bits] : states) {
    INFO(name);
    const auto got = under(bits, [&] { return run(vectors); }), scalar_got = under(bits, [&] { return run(scalar); });
    for (std::size_t i = 0; i < expected.size(); ++i) {
      CHECK(same(got[i], expected[i]));
      CHECK(same(scalar_got[i], scalar_expected[i]));
    }
  }
}

TEST_CASE("operands of block-scaled products are the same in every floating-point state") {
  reference::generator random(tetromino_test::seed());
  const tetromino_test::sample<float> x(random, 2, 5, 160);
  struct operand {
    const char* recipe;
    block_scaled_kind kind;
  };
  for (const operand& o :
       {operand{"nvfp4/amax", block_scaled_kind::e4m3_16}, operand{"mxfp4-16/even", block_scaled_kind::e4m3_16},
        operand{"mxfp4-32/oas", block_scaled_kind::e4m3_16}, operand{"mxfp4-32/oas", block_scaled_kind::e8m0_32}}) {
    auto packed = quantize(vectors, x.view, o.recipe, {.special = special_values::saturate});
    if (packed.format.scale == scale_type::e8m0) {  // low bits that rounding takes, and factors of either end
      for (std::size_t i = 0; i < packed.scales.size(); i += 3) packed.scales[i] = i % 2 == 0 ? 1 : 254;
    }
    const block_scaled expected = repack(scalar, packed, o.kind);
    for (const auto& [name, bits] : states) {
      INFO(o.recipe << ", " << name);
      odd_threads threads{bits};
      const auto check = [&](const block_scaled& got) {
        CHECK((same(got.codes, expected.codes) && same(got.scales, expected.scales)));
        CHECK((same(got.factors, expected.factors) && got.rounded_blocks == expected.rounded_blocks));
      };
      check(under(bits, [&] { return repack(vectors, packed, o.kind); }));
      check(under(bits, [&] { return repack(scalar, packed, o.kind); }));
      check(under(bits, [&] { return repack(vectors.on(threads), packed, o.kind); }));
    }
  }
}

#endif
