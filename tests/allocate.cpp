#include "check.hpp"

#include <tetromino/allocate.hpp>

#include "moe/code_of.hpp"
#include "reference/generators.hpp"
#include "support/float_states.hpp"

#include <algorithm>  // std::min
#include <cmath>      // std::exp, std::nan
#include <cstdint>    // std::uint64_t
#include <limits>     // std::numeric_limits
#include <vector>     // std::vector

namespace {

using tetromino::allocate;
using tetromino::allocation;
using tetromino::allocation_candidate;
using tetromino::errc;
using tetromino::try_allocate;
using matrices = std::vector<std::vector<allocation_candidate>>;

/// The best of all choices, tried one after the other in the order of their candidates. Errors are whole numbers, whose
/// sums are exact.
allocation best_by_trying(const matrices& all, std::uint64_t budget) {
  std::vector<std::size_t> digits(all.size(), 0);
  allocation best;
  for (bool more = true; more;) {
    allocation one{digits};
    for (std::size_t m = 0; m < all.size(); ++m) {
      one.bits += all[m][digits[m]].bits;
      one.error += all[m][digits[m]].error;
    }
    const bool is_better =
        best.chosen.empty() || one.error < best.error || (one.error == best.error && one.bits < best.bits);
    if (one.bits <= budget && is_better) best = one;
    std::size_t m = all.size();
    while (m > 0 && ++digits[m - 1] == all[m - 1].size()) digits[--m] = 0;
    more = m > 0;
  }
  return best;
}

/// The least error for every budget up to `most`, by a table over bits.
std::vector<double> least_errors(const matrices& all, std::uint64_t most) {
  constexpr double none = std::numeric_limits<double>::infinity();
  std::vector<double> table(most + 1, 0.0);
  for (const auto& candidates : all) {
    std::vector<double> next(most + 1, none);
    for (std::uint64_t b = 0; b <= most; ++b) {
      for (const auto& c : candidates) {
        if (c.bits <= b) next[b] = std::min(next[b], table[b - c.bits] + c.error);
      }
    }
    table = std::move(next);
  }
  return table;
}

std::uint64_t least_bits(const matrices& all) {
  std::uint64_t out = 0;
  for (const auto& candidates : all) {
    std::uint64_t least = candidates.front().bits;
    for (const auto& c : candidates) least = std::min(least, c.bits);
    out += least;
  }
  return out;
}

matrices random_case(reference::generator& random, std::size_t count, std::size_t most_candidates, std::size_t bits,
                     std::size_t errors) {
  matrices out(count);
  for (auto& candidates : out) {
    candidates.resize(1 + random.below(most_candidates));
    for (auto& c : candidates) c = {random.below(bits), static_cast<double>(random.below(errors))};
  }
  return out;
}

}  // namespace

TEST_CASE("allocate: the best of all choices, ties as stated, within every budget") {
  reference::generator random(tetromino_test::seed());
  INFO("seed " << tetromino_test::seed());
  for (int round = 0; round < 400; ++round) {
    // few values: many ties; many values: few
    const std::size_t bits = 1 + random.below(round % 2 == 0 ? 4 : 60),
                      errors = 1 + random.below(round % 3 == 0 ? 4 : 500);
    const auto all = random_case(random, 1 + random.below(6), 4, bits, errors);
    const std::uint64_t least = least_bits(all);
    double before = std::numeric_limits<double>::infinity();
    for (std::uint64_t budget = least; budget < least + 40; ++budget) {
      CAPTURE(round, budget);
      const auto best = best_by_trying(all, budget);
      const auto got = allocate(all, budget);
      REQUIRE(got.chosen == best.chosen);
      REQUIRE(got.bits == best.bits);
      REQUIRE(got.error == best.error);
      REQUIRE(got.bits <= budget);
      REQUIRE(got.error <= before);
      before = got.error;
    }
    if (least > 0) REQUIRE(code_of(try_allocate(all, least - 1)) == errc::infeasible);
  }
}

TEST_CASE("allocate: more matrices than can be tried, beside a table over bits") {
  reference::generator random(tetromino_test::seed() + 1);
  INFO("seed " << tetromino_test::seed() + 1);
  for (int round = 0; round < 20; ++round) {
    // the last rounds: errors that follow the bits, where every choice is nearly as good as any other
    auto all = random_case(random, 40, 5, 50, 1 << 20);
    if (round >= 15) {
      for (auto& candidates : all) {
        for (auto& c : candidates)
          c.error = 4096.0 - 64.0 * static_cast<double>(c.bits) + static_cast<double>(random.below(3));
      }
    }
    const std::uint64_t least = least_bits(all), most = least + 600;
    const auto expected = least_errors(all, most);
    for (std::uint64_t budget = least; budget <= most; budget += 1 + random.below(40)) {
      CAPTURE(round, budget);
      const auto got = allocate(all, budget);
      REQUIRE(got.error == expected[budget]);
      REQUIRE(got.bits <= budget);
    }
  }
}

TEST_CASE("allocate: a model's matrices, with sizes of a model and errors of any kind") {
  reference::generator random(tetromino_test::seed() + 2);
  INFO("seed " << tetromino_test::seed() + 2);
  matrices all;
  std::uint64_t weights = 0, least = 0;
  for (std::size_t m = 0; m < 2'064; ++m) {  // of 8 layers with 128 experts, whose gates and ups share a recipe
    const std::size_t size = m % 129 == 0 ? 2048 * 5120 : m % 2 == 0 ? 768 * 2048 : 2 * 768 * 2048;
    const double scale = std::exp(random.normal()) * static_cast<double>(size);
    std::vector<allocation_candidate> candidates;
    for (const double bits : {4.25, 4.3125, 4.5, 16.0}) {
      const double noise = bits == 16 ? 0 : scale * std::exp(-1.4 * bits) * (1 + 0.2 * random.uniform());
      const std::uint64_t scales = bits == 4.5 ? 32 : 0;  // a float for the matrix
      candidates.push_back({static_cast<std::uint64_t>(bits * static_cast<double>(size)) + scales, noise});
    }
    least += candidates.front().bits;
    weights += size;
    all.push_back(std::move(candidates));
  }
  double before = std::numeric_limits<double>::infinity();
  for (const double average : {4.25, 4.3, 4.5, 5.0, 8.0, 16.0}) {
    const auto budget = static_cast<std::uint64_t>(average * static_cast<double>(weights));
    const auto got = allocate(all, budget);
    CAPTURE(average);
    CHECK(got.bits <= budget);
    CHECK(got.error < before);
    before = got.error;
    // no single change that the budget allows makes it better
    std::size_t better = 0;
    for (std::size_t m = 0; m < all.size(); ++m) {
      const auto& now = all[m][got.chosen[m]];
      for (const auto& c : all[m]) better += got.bits - now.bits + c.bits <= budget && c.error < now.error ? 1u : 0u;
    }
    CHECK(better == 0);
  }
  CHECK(before == 0);
  CHECK(allocate(all, least).bits == least);
}

TEST_CASE("allocate: the same under every setting of the floating-point unit") {
  reference::generator random(tetromino_test::seed() + 3);
  matrices all(200);
  for (auto& candidates : all) {
    for (int c = 0; c < 4; ++c) candidates.push_back({100 + random.below(100), random.uniform()});
  }
  const std::uint64_t budget = least_bits(all) + 3000;
  const auto expected = allocate(all, budget);
  for (const auto& setting : tetromino_test::states) {
    CAPTURE(setting.first);
    const auto got = tetromino_test::under(setting.second, [&] { return allocate(all, budget); });
    CHECK(got.chosen == expected.chosen);
    CHECK(got.error == expected.error);
  }
}

TEST_CASE("allocate: what it refuses") {
  const matrices two = {{{10, 1}, {20, 0}}, {{5, 2}}};
  const auto message = [](const auto& r) { return std::string(r.error().what()); };
  const auto low = try_allocate(two, 14);
  CHECK(code_of(low) == errc::infeasible);
  CHECK(message(low) == "allocate: expected a budget of at least 15 bits, the least possible, got 14");
  CHECK_THROWS_WITH(allocate(two, 0), tetromino_test::contains("at least 15 bits"));
  CHECK(allocate(two, 15).chosen == std::vector<std::size_t>{0, 0});
  CHECK(allocate(two, 25).chosen == std::vector<std::size_t>{1, 0});
  CHECK(allocate(two, std::numeric_limits<std::uint64_t>::max()).error == 2);

  const auto refused = [&](const matrices& all, const std::string& expected) {
    const auto r = try_allocate(all, 1000);
    CHECK(code_of(r) == errc::invalid_argument);
    CHECK(message(r) == expected);
  };
  refused({{{1, 1}}, {}}, "allocate: expected a candidate for each matrix, got none for matrix 1");
  refused({{{1, 1}, {1, -0.5}}},
          "allocate: expected finite errors of at least 0, got -0.5 for candidate 1 of matrix 0");
  CHECK(code_of(try_allocate(matrices{{{1, std::nan("")}}}, 1)) == errc::invalid_argument);
  CHECK(code_of(try_allocate(matrices{{{1, std::numeric_limits<double>::infinity()}}}, 1)) == errc::invalid_argument);
  const std::uint64_t half = std::uint64_t{1} << 62;
  refused({{{1, 1}, {half, 0}}, {{half, 0}}}, "allocate: expected fewer than 2^63 bits in all, got more with matrix 1");
  CHECK(allocate(matrices{{{half, 0}}, {{half - 1, 0}}}, 2 * half).bits == 2 * half - 1);

  const auto few = try_allocate(two, 25, {.max_states = 1});
  CHECK(code_of(few) == errc::invalid_argument);
  CHECK(message(few) == "allocate: expected to end within 1 states, and did not");
  CHECK(allocate(matrices{}, 0).chosen.empty());
}
