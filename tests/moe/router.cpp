#include "check.hpp"

#include <tetromino/moe/router.hpp>

#include "reference/generators.hpp"
#include "support/allocations.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace {

namespace moe = tetromino::moe;
using moe::gating;
using moe::router_options;
using tetromino::errc;
using tetromino_test::contains;
using tetromino_test::seed;

struct routed {
  std::vector<std::uint16_t> ids;
  std::vector<float> weights;
};

routed route(const std::vector<float>& logits, std::size_t experts, const router_options& options) {
  const std::size_t n = logits.size() / experts * options.experts_per_token;
  routed out{std::vector<std::uint16_t>(n), std::vector<float>(n)};
  moe::route(logits, experts, options, out.ids, out.weights);
  return out;
}

struct choice {
  std::size_t expert;
  double weight;
};

/// One token, from the papers: sorts scores, in double.
std::vector<choice> expected_choices(const std::vector<float>& logits, const router_options& o) {
  const std::size_t experts = logits.size();
  std::vector<double> score(experts), chosen_by(experts);
  for (std::size_t e = 0; e < experts; ++e) {
    const auto x = static_cast<double>(logits[e]);
    score[e] = o.rule == gating::sigmoid ? 1 / (1 + std::exp(-x)) : x;
    chosen_by[e] = score[e] + (o.bias.empty() ? 0.0 : static_cast<double>(o.bias[e]));
  }
  const auto order_of = [](const std::vector<double>& s) {
    std::vector<std::size_t> order(s.size());
    for (std::size_t i = 0; i < s.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return s[a] > s[b]; });
    return order;
  };
  if (o.groups > 1) {
    const std::size_t size = experts / o.groups;
    std::vector<double> group_score;
    for (std::size_t g = 0; g < o.groups; ++g) {
      std::vector<double> members(chosen_by.begin() + static_cast<std::ptrdiff_t>(g * size),
                                  chosen_by.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
      std::sort(members.rbegin(), members.rend());
      group_score.push_back(members[0] + (size > 1 ? members[1] : 0));
    }
    const auto order = order_of(group_score);
    for (std::size_t i = o.groups_kept; i < o.groups; ++i) {
      for (std::size_t e = order[i] * size; e < (order[i] + 1) * size; ++e) {
        chosen_by[e] = -std::numeric_limits<double>::infinity();
      }
    }
  }
  std::vector<choice> out;
  const auto order = order_of(chosen_by);
  const double top = *std::max_element(score.begin(), score.end());
  double all = 0, picked = 0;
  for (std::size_t e = 0; e < experts; ++e) all += std::exp(score[e] - top);
  for (std::size_t i = 0; i < o.experts_per_token; ++i) {
    const double s = score[order[i]];
    out.push_back({order[i], o.rule == gating::sigmoid ? s : std::exp(s - top)});
    picked += out.back().weight;
  }
  for (choice& c : out) {
    if (o.renormalize || o.rule == gating::topk_softmax) {
      c.weight /= picked;
    } else if (o.rule == gating::softmax_topk) {
      c.weight /= all;
    }
    c.weight *= static_cast<double>(o.scale);
  }
  return out;
}

TEST_CASE("route: all rules against sorting, on random logits") {
  reference::generator random(seed());
  for (int round = 0; round < 400; ++round) {
    const std::size_t groups = std::size_t{1} << random.below(4), experts = groups * (1 + random.below(9));
    router_options o;
    o.rule = static_cast<gating>(random.below(3));
    o.renormalize = random.below(2) == 0;
    o.scale = random.below(2) == 0 ? 1.0f : 2.5f;
    std::vector<float> bias;
    if (o.rule == gating::sigmoid) {
      o.groups = groups;
      o.groups_kept = 1 + random.below(groups);
      if (random.below(2) == 0) bias = reference::normal_sample(random.bits(), experts);
      o.bias = bias;
    }
    o.experts_per_token = 1 + random.below(o.groups_kept * (experts / o.groups));
    const std::size_t tokens = random.below(5);
    const auto logits = reference::normal_sample(random.bits(), tokens * experts);
    const routed got = route(logits, experts, o);
    for (std::size_t t = 0; t < tokens; ++t) {
      const auto first = logits.begin() + static_cast<std::ptrdiff_t>(t * experts);
      const auto expected = expected_choices({first, first + static_cast<std::ptrdiff_t>(experts)}, o);
      for (std::size_t i = 0; i < o.experts_per_token; ++i) {
        CHECK(got.ids[t * o.experts_per_token + i] == expected[i].expert);
        CHECK(static_cast<double>(got.weights[t * o.experts_per_token + i]) ==
              Approx(expected[i].weight).epsilon(1e-5));
      }
    }
  }
}

TEST_CASE("route: of equal scores the lower expert, and the lower group, comes first") {
  const std::vector<float> logits{1, 3, 3, 0, 3, 1, 3, 3};
  for (const gating rule : {gating::softmax_topk, gating::topk_softmax, gating::sigmoid}) {
    CHECK(route(logits, 8, {.rule = rule, .experts_per_token = 3}).ids == std::vector<std::uint16_t>{1, 2, 4});
    CHECK(route(logits, 8, {.rule = rule, .experts_per_token = 8}).ids ==
          std::vector<std::uint16_t>{1, 2, 4, 6, 7, 0, 5, 3});
  }
  // groups of two: (1, 3), (3, 0), (3, 1), (3, 3); the last is best, the first and third are equal
  const router_options grouped{.rule = gating::sigmoid, .experts_per_token = 3, .groups = 4, .groups_kept = 2};
  CHECK(route(logits, 8, grouped).ids == std::vector<std::uint16_t>{1, 6, 7});
}

TEST_CASE("route: a bias decides the choice and leaves the weights alone") {
  const std::vector<float> logits{2, 0, 0, 0}, bias{-5, 0, 0, 1};
  const routed got =
      route(logits, 4, {.rule = gating::sigmoid, .experts_per_token = 2, .renormalize = false, .bias = bias});
  CHECK(got.ids == std::vector<std::uint16_t>{3, 1});
  CHECK(got.weights == std::vector<float>{0.5f, 0.5f});
}

TEST_CASE("route: huge and masked logits") {
  const float none = -std::numeric_limits<float>::infinity();
  const std::vector<float> logits{none, 1e38f, none, 1e38f, -1e38f};
  for (const gating rule : {gating::softmax_topk, gating::topk_softmax, gating::sigmoid}) {
    const routed got = route(logits, 5, {.rule = rule, .experts_per_token = 3});
    CHECK(got.ids == std::vector<std::uint16_t>{1, 3, 4});
    CHECK(got.weights == std::vector<float>{0.5f, 0.5f, 0.0f});
  }
}

TEST_CASE("route: a group with one expert that is not masked comes after those with two") {
  const float none = -std::numeric_limits<float>::infinity();
  router_options options{.rule = gating::sigmoid, .experts_per_token = 2, .groups = 3, .groups_kept = 1};
  CHECK(route({none, 5, 1, 1, none, none}, 6, options).ids == std::vector<std::uint16_t>{2, 3});
  options.groups_kept = 2;
  CHECK(route({none, none, 1, 1, none, 5}, 6, options).ids == std::vector<std::uint16_t>{2, 3});
  CHECK(route({none, 5, 1, 1, none, none}, 6, options).ids == std::vector<std::uint16_t>{1, 2});
}

TEST_CASE("route: logits that cannot be routed are errors that name the token") {
  const float infinity = std::numeric_limits<float>::infinity();
  const auto fails = [](const std::vector<float>& logits) {
    std::vector<std::uint16_t> ids(logits.size() / 2);
    std::vector<float> weights(ids.size());
    const auto r = moe::try_route(logits, 2, {}, ids, weights);
    REQUIRE_FALSE(r);
    CHECK(r.error().code() == errc::non_finite);
    return std::string(r.error().what());
  };
  CHECK_THAT(fails({0, 1, std::nanf(""), 2}), contains("token 1"));
  CHECK_THAT(fails({0, 1, 2, std::nanf("")}), contains("NaN or infinity for token 1"));
  CHECK_THAT(fails({infinity, 1}), contains("token 0"));
  CHECK_THAT(fails({-infinity, -infinity}), contains("none that is finite"));
}

TEST_CASE("route: a bias or a scale that is not finite is an error, whatever the rule") {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> logits{0, 1, 2, 3};
  std::vector<std::uint16_t> ids{7, 7};
  std::vector<float> weights{7, 7};
  const auto fails = [&](const router_options& o) {
    const auto r = moe::try_route(logits, 4, o, ids, weights);
    REQUIRE_FALSE(r);
    CHECK(r.error().code() == errc::non_finite);
    CHECK(ids == std::vector<std::uint16_t>{7, 7});
    return std::string(r.error().what());
  };
  for (const float odd : {std::nanf(""), -std::nanf(""), infinity, -infinity}) {
    const std::vector<float> first{odd, 0, 0, 0}, last{0, 0, 0, odd};
    CHECK_THAT(fails({.rule = gating::sigmoid, .experts_per_token = 2, .bias = first}), contains("for expert 0"));
    CHECK_THAT(fails({.rule = gating::sigmoid, .experts_per_token = 2, .bias = last}), contains("for expert 3"));
    for (const gating rule : {gating::softmax_topk, gating::topk_softmax, gating::sigmoid}) {
      CHECK_THAT(fails({.rule = rule, .experts_per_token = 2, .scale = odd}), contains("finite scale"));
    }
  }
}

TEST_CASE("route: scores whose sum has no inverse in float still weigh what they should") {
  const std::vector<float> logits(4, -88.5f);
  const routed got = route(logits, 4, {.rule = gating::sigmoid, .experts_per_token = 2, .scale = 100});
  CHECK(got.weights[0] == Approx(50).epsilon(1e-5));
  CHECK(got.weights[1] == got.weights[0]);
}

TEST_CASE("route: the id that means nobody is no expert's") {
  std::vector<float> logits(65'536);
  std::vector<std::uint16_t> ids(1);
  std::vector<float> weights(1);
  CHECK(moe::try_route(logits, 65'536, {}, ids, weights).error().code() == errc::invalid_argument);
  logits.resize(65'535);
  logits.back() = 1;
  CHECK(moe::try_route(logits, 65'535, {}, ids, weights));
  CHECK(ids[0] == 65'534);
}

TEST_CASE("route: sizes and options that do not fit are errors") {
  std::vector<std::uint16_t> ids(4);
  std::vector<float> weights(4), logits(16), bias(7);
  const auto code = [&](std::size_t experts, const router_options& o, std::size_t room = 4, std::size_t count = 16) {
    const auto r = moe::try_route(std::span(logits).first(count), experts, o, std::span(ids).first(room),
                                  std::span(weights).first(room));
    REQUIRE_FALSE(r);
    return r.error().code();
  };
  using enum errc;
  CHECK(code(0, {}) == invalid_argument);
  CHECK(code(8, {.experts_per_token = 0}) == invalid_argument);
  CHECK(code(8, {.experts_per_token = 9}) == invalid_argument);
  CHECK(code(8, {.experts_per_token = 2}, 3) == shape_mismatch);
  CHECK(code(8, {.experts_per_token = 2}, 4, 15) == shape_mismatch);
  CHECK(code(8, {.rule = gating::sigmoid, .experts_per_token = 2, .bias = bias}) == shape_mismatch);
  CHECK(code(8, {.rule = gating::sigmoid, .experts_per_token = 2, .groups = 3}) == invalid_argument);
  CHECK(code(8, {.rule = gating::sigmoid, .experts_per_token = 2, .groups = 0}) == invalid_argument);
  CHECK(code(8, {.rule = gating::sigmoid, .experts_per_token = 2, .groups = 4, .groups_kept = 5}) == invalid_argument);
  CHECK(code(8, {.rule = gating::sigmoid, .experts_per_token = 2, .groups = 8, .groups_kept = 1}) == invalid_argument);
  CHECK(code(8, {.experts_per_token = 2, .groups = 2, .groups_kept = 2}) == invalid_argument);
}

TEST_CASE("route: nothing is allocated") {
  const auto logits = reference::normal_sample(seed(), 10 * 64);
  std::vector<std::uint16_t> ids(10 * 4);
  std::vector<float> weights(10 * 4);
  const std::size_t before = tetromino_test::allocations;
  moe::route(logits, 64, {.experts_per_token = 4}, ids, weights);
  moe::route(logits, 64, {.rule = gating::sigmoid, .experts_per_token = 4, .groups = 8, .groups_kept = 2}, ids,
             weights);
  const std::size_t after = tetromino_test::allocations;
  CHECK(after == before);
}

}  // namespace
