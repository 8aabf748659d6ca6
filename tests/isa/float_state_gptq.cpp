#include "check.hpp"

/// Packing with error feedback gives the same bytes whatever the program has set of its floating-point state. Run for
/// each backend of tetromino::cpu.

#include <tetromino/gptq.hpp>

#include "isa/backend.hpp"
#include "support/float_states.hpp"

#if !TETROMINO_TEST_VECTORS
TEST_CASE("the simd backend exists") { WARN("xsimd was not found: there is nothing to test"); }
#else

namespace {

using namespace tetromino;
using tetromino_test::odd_threads;
using tetromino_test::same;
using tetromino_test::states;
using tetromino_test::under;
using tetromino_test::vectors;

constexpr std::size_t cols = 96;

/// All of it: moments of activations, joined and blended, and the weights that they pack.
template <class T, class Policy>
packed<any_format> feed_back(const Policy& policy, const batch_view<T>& w, const matrix_view<const float>& x,
                             const recipe& r, const quantize_options& options, const gptq_options& feedback) {
  calibration seen(cols), others(cols);
  seen.add(x);
  others.add(matrix_view<const float>(x.data, 3, cols));
  seen.merge(others);
  return gptq(policy, w[0], r, seen.blended(others, 5.0), options, feedback);
}

template <class T>
void compare(reference::generator& random, recipe r, bool is_whole) {
  const tetromino_test::sample<T> w(random, 1, 3, cols);
  std::vector<float> x(12 * cols);
  for (float& v : x)
    v = std::ldexp(static_cast<float>(random.below(2001)) - 1000.0f, static_cast<int>(random.below(8)) - 80);
  const matrix_view<const float> activations(x.data(), 12, cols);
  gptq_options feedback;
  if (random.below(3) == 0) feedback = {.scales = gptq_scales::fixed, .by_activation = true};
  if (random.below(3) == 0) r.rotation = 32;
  const quantize_options options{.special = random.below(2) == 0 ? special_values::poison : special_values::saturate};
  INFO(r.name() << ", " << sizeof(T) << " bytes");
  const auto run = [&](const auto& policy) { return feed_back<T>(policy, w.view, activations, r, options, feedback); };
  const packed<any_format> expected = run(scalar);
  REQUIRE(same(run(vectors), expected));
  const bool is_slow = r.macro == macro_rule::search_256;  // and no other arithmetic than a search of 16
  for (const auto& [name, bits] : states) {
    INFO(name);
    odd_threads threads{bits};
    CHECK(same(under(bits, [&] { return run(vectors.on(threads)); }), expected));
    if (is_whole || !is_slow) CHECK(same(under(bits, [&] { return run(vectors); }), expected));
    if (!is_slow) CHECK(same(under(bits, [&] { return run(scalar); }), expected));
  }
}

}  // namespace

TEST_CASE("error feedback gives the same bytes in every floating-point state: every recipe") {
  reference::generator random(tetromino_test::seed());
  std::size_t turn = random.below(3);
  for (const recipe& r : tetromino_test::all_recipes()) {
    turn = (turn + 1) % 3;
    if (turn == 0) compare<float>(random, r, false);
    if (turn == 1) compare<half>(random, r, false);
    if (turn == 2) compare<bfloat16>(random, r, false);
  }
}

TEST_CASE("error feedback gives the same bytes in every floating-point state: every recipe and type", "[.slow]") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : tetromino_test::all_recipes()) {
    compare<float>(random, r, true);
    compare<half>(random, r, true);
    compare<bfloat16>(random, r, true);
  }
}

#endif
