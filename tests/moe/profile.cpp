#include "check.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/profile.hpp>
#include <tetromino/moe/sampled_trace.hpp>
#include <tetromino/moe/trace_io.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"
#include "reference/synthetic_routing.hpp"
#include "support/allocations.hpp"

#include <cmath>    // std::nan, std::sqrt
#include <set>      // std::set
#include <utility>  // std::move
#include <vector>   // std::vector

namespace {

using namespace tetromino::moe;
using tetromino::errc;
using tetromino_test::contains;
using tetromino_test::data_file;

profile everything(const trace& t) {
  return profile::make({t.shape(), t.domain_names().size(), t.requests().size(), true, true});
}

}  // namespace

TEST_CASE("a token is counted everywhere it belongs") {
  profile p = profile::make({{2, 4, 2}, 2, 3, true, true});
  const std::vector<std::uint16_t> ids = {0, 2, 3, 1};
  p.add(ids, {phase::decode, 1, 2});
  p.add(ids, {phase::prefill, 0, 2});
  p.add(std::vector<std::int64_t>{0, 1, 3, 0}, {phase::decode, 1, 0});
  CHECK(p.tokens() == 3);
  CHECK(p.tokens(phase::prefill) == 1);
  const auto decode = p.loads(phase::decode);
  CHECK(std::vector<double>(decode.values.begin(), decode.values.end()) == std::vector<double>{2, 1, 1, 0, 1, 1, 0, 2});
  CHECK(p.total_loads() == std::vector<double>{3, 1, 2, 0, 1, 2, 0, 3});
  CHECK(p.domain_loads(0, phase::prefill).layer(1)[3] == 1);
  CHECK(p.domain_loads(0, phase::decode).layer(1)[3] == 0);
  CHECK(p.signature(2, phase::decode)[2] == 1);
  CHECK(p.signature(0, phase::decode)[2] == 0);
  CHECK(p.co_activation(0, 0, 2) == 2);
  CHECK(p.co_activation(0, 2, 0) == 2);
  CHECK(p.co_activation(0, 1, 2) == 0);
  CHECK(p.co_activation(1, 3, 3) == 0);
  CHECK(p.transitions(0, 0)[3] == 3);
  CHECK(p.transitions(0, 2)[1] == 2);
  CHECK(p.transitions(0, 3)[1] == 0);
  CHECK_THROWS_AS(p.loads(phase::all), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(p.transitions(1, 0), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(p.co_activation(99, 0, 1), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(p.loads(phase::decode).layer(99), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(p.signature(3, phase::decode), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(p.domain_loads(2, phase::decode), tetromino_test::precondition_failed);
}

TEST_CASE("adding, merging and decaying allocate nothing, and memory is what the page says") {
  const trace t = read_trace(data_file("routing-16x2.safetensors"));
  profile p = everything(t), q = everything(t);
  const std::size_t before = tetromino_test::allocations;
  p.add(t.view());
  q.add(t.view().token(0), {phase::decode, 3, 7});
  p.merge(q);
  p.decay(0.5);
  CHECK(tetromino_test::allocations == before);
  const std::size_t cells = 4 * 16;
  CHECK(p.memory_bytes() == 16 * cells + 4 * 16 * cells + 240 * 8 * cells + 4 * cells * 15 + 8 * (cells - 16) * 16);
}

TEST_CASE("profiles of parts merge to the profile of the whole") {
  const trace t = read_trace(data_file("routing-16x2.safetensors"));
  profile whole = everything(t), parts = everything(t), other = everything(t);
  whole.add(t.view());
  parts.add(t.view().with(t.requests().first(100)));
  other.add(t.view().with(t.requests().subspan(100)), 100);
  parts.merge(other);
  CHECK(parts.total_loads() == whole.total_loads());
  CHECK(parts.tokens() == whole.tokens());
  for (std::size_t l = 0; l + 1 < 4; ++l) {
    for (std::size_t e = 0; e < 16; ++e) {
      const auto a = parts.transitions(l, e), b = whole.transitions(l, e);
      REQUIRE(std::vector<double>(a.begin(), a.end()) == std::vector<double>(b.begin(), b.end()));
      for (std::size_t f = 0; f < 16; ++f) REQUIRE(parts.co_activation(l, e, f) == whole.co_activation(l, e, f));
    }
  }
  for (std::size_t r = 0; r < 240; ++r) {
    const auto a = parts.signature(r, phase::decode), b = whole.signature(r, phase::decode);
    REQUIRE(std::vector<float>(a.begin(), a.end()) == std::vector<float>(b.begin(), b.end()));
  }
  parts.decay(0.25);
  CHECK(parts.tokens() == whole.tokens() / 4);
  CHECK(parts.loads(phase::decode).values[5] == whole.loads(phase::decode).values[5] / 4);
}

TEST_CASE("the three findings on the bundled routing") {
  const trace t = read_trace(data_file("routing-128x8.safetensors"));
  profile p = everything(t);
  p.add(t.view());
  const phase_similarity s = prefill_decode_similarity(p);
  CHECK(s.requests == 480);
  CHECK(s.same_request == Approx(0.85).margin(0.005));
  CHECK(s.across_requests == Approx(0.44).margin(0.005));
  const load_imbalance i = imbalance(p.loads(phase::decode));
  CHECK(i.mean > 2);
  CHECK(i.worst >= i.mean);
  const std::vector<double> d = domain_divergence(p);
  REQUIRE(d.size() == 16);
  for (std::size_t a = 0; a < 4; ++a) {
    CHECK(d[a * 4 + a] == 0);
    for (std::size_t b = 0; b < a; ++b) {
      CHECK(d[a * 4 + b] == d[b * 4 + a]);
      CHECK(d[a * 4 + b] > 0.1);  // bits: domains use different experts
    }
  }
  // the same requests cut in two at random differ far less
  std::vector<double> odd(8 * 128), even(8 * 128);
  for (std::size_t r = 0; r < 480; ++r) {
    for (std::size_t c = 0; c < odd.size(); ++c) (r % 2 == 1 ? odd : even)[c] += p.signature(r, phase::decode)[c];
  }
  CHECK(divergence({8, 128, odd}, {8, 128, even}) < 0.02);
}

TEST_CASE("findings at their extremes") {
  CHECK(imbalance({1, 4, std::vector<double>{1, 1, 1, 1}}).mean == 1);
  CHECK(imbalance({2, 4, std::vector<double>{1, 1, 1, 1, 4, 0, 0, 0}}).worst == 4);
  CHECK(imbalance({2, 4, std::vector<double>{1, 1, 1, 1, 4, 0, 0, 0}}).worst_layer == 1);
  CHECK(imbalance({1, 4, std::vector<double>(4)}).mean == 1);
  const std::vector<double> left = {1, 0}, right = {0, 3}, none = {0, 0};
  CHECK(divergence({1, 2, left}, {1, 2, left}) == 0);
  CHECK(divergence({1, 2, left}, {1, 2, right}) == Approx(1));
  CHECK(divergence({1, 2, left}, {1, 2, none}) == 0);
  CHECK(code_of(try_divergence({1, 2, left}, {2, 1, left})) == errc::shape_mismatch);
  CHECK(code_of(try_imbalance({1, 2, std::vector<double>{1, std::nan("")}})) == errc::non_finite);
  // no request, one request
  profile p = profile::make({{1, 2, 1}, 0, 1, false, false});
  CHECK(prefill_decode_similarity(p).requests == 0);
  p.add(std::vector<std::uint16_t>{0}, {phase::prefill, 0, 0});
  CHECK(prefill_decode_similarity(p).requests == 0);
  p.add(std::vector<std::uint16_t>{0}, {phase::decode, 0, 0});
  CHECK(prefill_decode_similarity(p).same_request == Approx(1));
  CHECK(prefill_decode_similarity(p).across_requests == 0);
}

TEST_CASE("similarity across requests is the mean over ordered pairs") {
  const trace t = read_trace(data_file("routing-16x2.safetensors"));
  profile p = profile::make({t.shape(), 0, 30, false, false});
  p.add(t.view().with(t.requests().first(30)));
  double sum = 0;
  for (std::size_t a = 0; a < 30; ++a) {
    for (std::size_t b = 0; b < 30; ++b) {
      if (a == b) continue;
      const auto x = p.signature(a, phase::prefill), y = p.signature(b, phase::decode);
      double xx = 0, yy = 0, xy = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        xx += double{x[i]} * x[i];
        yy += double{y[i]} * y[i];
        xy += double{x[i]} * y[i];
      }
      sum += xy / std::sqrt(xx * yy);
    }
  }
  CHECK(prefill_decode_similarity(p).across_requests == Approx(sum / (30 * 29)));
}

TEST_CASE("what does not fit a profile is an error and adds nothing") {
  CHECK(code_of(profile::try_make({{0, 4, 2}, 0, 0, false, false})) == errc::invalid_argument);
  CHECK(code_of(profile::try_make({{1, 4, 5}, 0, 0, false, false})) == errc::invalid_argument);
  CHECK(code_of(profile::try_make({{1, 70'000, 5}, 0, 0, false, false})) == errc::invalid_argument);
  // sizes whose product wraps to something small
  const std::size_t many = std::size_t{1} << 62;
  for (const profile_options& o :
       {profile_options{{many, 4, 4}}, profile_options{{1, 4, 1}, many / 2}, profile_options{{2, 4, 1}, 0, many / 4},
        profile_options{{std::size_t{1} << 32, 65'535, 1}, 0, 0, true, false},
        profile_options{{std::size_t{1} << 32, 65'535, 1}, 0, 0, false, true}}) {
    CHECK(code_of(profile::try_make(o)) == errc::invalid_argument);
  }
  profile p = profile::make({{1, 4, 2}, 2, 2, false, false});
  const std::vector<std::uint16_t> good = {0, 1};
  CHECK_THROWS_WITH(p.add(std::vector<std::uint16_t>{0, 4}, {}), contains("expected expert ids below 4 or -1, got 4"));
  CHECK_THROWS_WITH(p.add(std::vector<std::uint16_t>{0}, {}), contains("expected 1 × 2 ids for a token, got 1"));
  CHECK_THROWS_WITH(p.add(good, {phase::decode, 2, 0}), contains("domain number below 2"));
  CHECK_THROWS_WITH(p.add(good, {phase::decode, 0, 2}), contains("request number below 2"));
  CHECK_THROWS_WITH(p.add(good, {phase::all, 0, 0}), contains("phase::all"));
  CHECK_THROWS_WITH(p.merge(profile::make({{1, 4, 2}, 1, 2, false, false})), contains("1 domains"));
  for (const double bad : {-0.1, 1.1, std::nan("")}) CHECK_FALSE(p.try_decay(bad).has_value());
  const trace t = trace::make({1, 4, 2}, {0, 1, 0, 1}, {{0, 1, 0, 0}, {1, 1, 0, 5}});
  CHECK_FALSE(p.try_add(t.view()).has_value());
  CHECK_FALSE(p.try_add(t.view(), 1).has_value());
  CHECK(p.tokens() == 0);
  CHECK(code_of(profile::make({{2, 4, 2}, 0, 0, false, false}).try_add(t.view())) == errc::shape_mismatch);
}

TEST_CASE("a trace drawn from a profile uses experts as often as the profile's requests did") {
  CAPTURE(tetromino_test::seed());
  reference::generator g(tetromino_test::seed());
  for (int i = 0; i < 20; ++i) {
    const std::size_t layers = 1 + g.below(3), experts = 2 + g.below(14),
                      k = 1 + g.below(std::min<std::size_t>(experts, 4));
    std::vector<std::uint16_t> ids;
    std::vector<request> list;
    for (std::uint32_t r = 0; r < 6; ++r) {
      const auto tokens = static_cast<std::uint32_t>(r == 2 ? 0 : 1 + g.below(20));
      list.push_back({ids.size() / (layers * k), tokens, static_cast<std::uint32_t>(g.below(tokens + 1)), 0});
      for (std::size_t row = 0; row < tokens * layers; ++row) {
        std::set<std::uint16_t> chosen;
        while (chosen.size() < k)
          chosen.insert(static_cast<std::uint16_t>(g.below(g.below(2) == 0 ? k + 1 : experts) % experts));
        for (const std::uint16_t e : chosen) ids.push_back(g.below(10) == 0 ? no_expert : e);
      }
    }
    const trace t = trace::make({layers, experts, k}, std::move(ids), std::move(list));
    profile p = profile::make({t.shape(), 0, 6});
    p.add(t.view());
    const trace drawn = sampled_trace(p, {20'000, g.bits()});
    const trace_view before = t.view(), after = drawn.view();
    REQUIRE(drawn.requests().size() == 6);
    CHECK(drawn.requests()[2].tokens == 0);
    CAPTURE(i, layers, experts, k);
    for (std::size_t r = 0; r < 6; ++r) {
      for (const phase when : {phase::prefill, phase::decode}) {
        const token_range was = t.requests()[r].range(when), is = drawn.requests()[r].range(when);
        std::vector<std::size_t> uses(layers * experts, 0), drawn_uses(layers * experts, 0);
        for (std::uint64_t token = was.first; token < was.last; ++token) {
          for (std::size_t l = 0; l < layers; ++l) {
            for (const std::uint16_t e : before.experts_of(token, l))
              uses[l * experts + (e == no_expert ? 0 : e)] += e == no_expert ? 0 : 1;
          }
        }
        for (std::uint64_t token = is.first; token < is.last; ++token) {
          for (std::size_t l = 0; l < layers; ++l) {
            std::set<std::uint16_t> seen;
            for (const std::uint16_t e : after.experts_of(token, l)) {
              if (e == no_expert) continue;
              REQUIRE(seen.insert(e).second);  // no expert serves a token twice
              ++drawn_uses[l * experts + e];
            }
          }
        }
        // Choices of nobody are not counted, so that fewer tokens may explain the uses; all layers agree on how many.
        double tokens = 0;
        for (std::size_t l = 0; l < layers; ++l) {
          double sum = 0;
          for (std::size_t e = 0; e < experts; ++e) {
            sum += static_cast<double>(uses[l * experts + e]) / static_cast<double>(k);
            tokens = std::max(tokens, static_cast<double>(uses[l * experts + e]));
          }
          tokens = std::max(tokens, sum);
        }
        REQUIRE((is.size() == 0) == (tokens == 0));
        const auto n = static_cast<double>(is.size());
        for (std::size_t c = 0; c < uses.size() && n > 0; ++c) {
          const double probability = static_cast<double>(uses[c]) / tokens;
          const double sigma = std::sqrt(n * probability * (1 - probability));
          CHECK(std::abs(static_cast<double>(drawn_uses[c]) - n * probability) <= 6 * sigma + 1e-6 * n + 1e-9);
        }
      }
    }
  }
}

TEST_CASE("a plan from a profile is nearly as good as one from the trace it counted") {
  reference::synthetic_routing made = reference::make_routing(5, 2, 32, 4, 60, 4, 16, 4);
  std::vector<request> list;
  for (std::size_t r = 0; r < 60; ++r) list.push_back({r * 20, 20, 4, made.topic[r]});
  const trace t = trace::make({2, 32, 4}, std::move(made.ids), std::move(list));
  profile p = profile::make({t.shape(), 0, 60});
  p.add(t.view());
  const trace drawn = sampled_trace(p, {2400, 1});
  const trace again = sampled_trace(p, {2400, 1}), other = sampled_trace(p, {2400, 2});
  const auto ids_of = [](const trace& of) {
    return std::vector<std::uint16_t>(of.view().ids.begin(), of.view().ids.end());
  };
  CHECK(ids_of(again) == ids_of(drawn));
  CHECK(ids_of(other) != ids_of(drawn));
  const topology cluster = topology::uniform(4, 2, 5);
  for (const bool pairs : {false, true}) {
    local_options options;
    options.node_weight = pairs ? 0 : 1;
    options.pair_weight = pairs ? 1 : 0;
    options.effort = 0.2;
    const auto judged = [&](const local_plan& plan) {
      cost_options rule;
      rule.replicas.choice = replica_choice::fewest_nodes;
      const cost_report r = evaluate(t.view(), plan.experts, cluster, plan.source_of_request, rule);
      return pairs ? r.remote_pair_fraction() : r.nodes_per_token();
    };
    const double from_trace = judged(local(t.view(), cluster, options));
    const double from_profile = judged(local(drawn.view(), cluster, options));
    CAPTURE(pairs, from_trace, from_profile);
    CHECK(from_profile < 1.06 * from_trace);
  }
}

TEST_CASE("what no trace can be drawn from is told apart") {
  const auto code = [](const profile& p, const sampled_trace_options& o = {}) {
    return code_of(try_sampled_trace(p, o));
  };
  profile p = profile::make({{1, 4, 2}, 0, 2});
  CHECK(code(p) == errc::invalid_argument);
  CHECK(code(profile::make({{1, 4, 2}})) == errc::invalid_argument);
  p.add(std::vector<std::uint16_t>{1, 2}, {phase::decode, 0, 1});
  CHECK(code(p, {0, 1}) == errc::invalid_argument);
  const trace one = sampled_trace(p, {3, 1});
  CHECK(one.tokens() == 3);
  for (std::uint64_t token = 0; token < 3; ++token) {
    const auto ids = one.view().experts_of(token, 0);
    CHECK(std::set<std::uint16_t>(ids.begin(), ids.end()) == std::set<std::uint16_t>{1, 2});
  }
}
