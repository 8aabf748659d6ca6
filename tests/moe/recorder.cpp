#include "check.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/profile.hpp>
#include <tetromino/moe/recorder.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"

#include <cmath>   // std::nan
#include <map>     // std::map
#include <set>     // std::multiset
#include <vector>  // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;
using i32 = std::vector<std::int32_t>;
using rows = std::vector<recorded_row>;

constexpr routing_shape two_by_two{2, 4, 2};

recorder small(std::size_t tokens = 100) { return recorder::make({two_by_two, tokens}); }
template <class Id>
std::span<const Id> all(const std::vector<Id>& v) {
  return v;
}
std::vector<std::uint16_t> ids_of(const trace& t) { return {t.view().ids.begin(), t.view().ids.end()}; }

}  // namespace

TEST_CASE("passes become requests, prompts first, with nobody where there is padding") {
  recorder r = small();
  // request 7 is prefilled with two tokens while request 9 decodes; [layers, rows, k]
  r.add_pass(rows{{7, phase::prefill}, {9}, {7, phase::prefill}}, all(i32{0, 1, 2, 3, 1, 0, /**/ 3, 2, -1, -1, 2, 3}));
  r.begin_pass(rows{{9}, {7}});
  r.add_layer(1, all(std::vector<std::uint16_t>{1, 2, 0xFFFF, 3}));
  r.add_layer(0, all(std::vector<std::int64_t>{0, 2, 1, 3}));
  r.end_pass();
  CHECK(r.tokens() == 5);
  CHECK(r.tokens(phase::prefill) == 2);
  CHECK(r.kept() == 5);
  const trace t = r.to_trace();
  REQUIRE(t.requests().size() == 2);
  CHECK(t.requests()[0] == request{0, 3, 2, 0});
  CHECK(t.requests()[1] == request{3, 2, 0, 0});
  CHECK(ids_of(t) == std::vector<std::uint16_t>{0, 1, 3,         2,         1, 0, 2, 3, 1, 3, no_expert, 3,  //
                                                2, 3, no_expert, no_expert, 0, 2, 1, 2});
  const auto decode = r.loads(phase::decode);
  CHECK(std::vector<double>(decode.values.begin(), decode.values.end()) == std::vector<double>{1, 1, 2, 2, 0, 1, 1, 1});
  CHECK_THROWS_AS(r.loads(phase::all), tetromino_test::precondition_failed);
}

TEST_CASE("what an engine feeds equals the trace it came from") {
  generator g(tetromino_test::seed());
  const routing_shape shape{3, 9, 2};
  recorder whole = recorder::make({shape, 10'000}), first = whole, second = whole;
  profile counted = profile::make({shape, 0, 0, false, false});
  std::map<std::uint64_t, std::vector<std::uint16_t>> prompt, answer;
  for (int pass = 0; pass < 40; ++pass) {
    rows who;
    std::vector<std::uint16_t> ids(3 * 5 * 2);
    for (std::size_t i = 0; i < 5; ++i) {
      who.push_back({static_cast<std::uint64_t>(pass) % 2 * 100 + i + g.below(3) * 10,
                     pass < 10 ? phase::prefill : phase::decode});
    }
    for (std::size_t i = 0; i < ids.size(); i += 2) {
      ids[i] = static_cast<std::uint16_t>(g.below(9));
      ids[i + 1] = static_cast<std::uint16_t>((ids[i] + 1 + g.below(8)) % 9);
    }
    whole.add_pass(who, all(ids));
    (pass % 2 == 0 ? first : second).add_pass(who, all(ids));
    for (std::size_t i = 0; i < 5; ++i) {
      auto& to = (who[i].when == phase::prefill ? prompt : answer)[who[i].request];
      std::vector<std::uint16_t> token;
      for (std::size_t l = 0; l < 3; ++l) token.insert(token.end(), &ids[(l * 5 + i) * 2], &ids[(l * 5 + i) * 2] + 2);
      to.insert(to.end(), token.begin(), token.end());
      counted.add(token, {who[i].when});
    }
  }
  const auto same_loads = [&](const recorder& r) {
    for (const phase p : {phase::prefill, phase::decode}) {
      const auto a = r.loads(p).values, b = counted.loads(p).values;
      REQUIRE(std::vector<double>(a.begin(), a.end()) == std::vector<double>(b.begin(), b.end()));
    }
  };
  const auto by_request = [](const recorder& r) {
    const trace t = r.to_trace();
    std::multiset<std::vector<std::uint16_t>> out;
    for (const request& q : t.requests()) {
      const auto ids = t.view().ids.subspan(q.first_token * 6, q.tokens * 6);
      out.insert({ids.begin(), ids.end()});
    }
    return out;
  };
  same_loads(whole);
  std::multiset<std::vector<std::uint16_t>> expected;
  for (const auto& [id, tokens] : answer) prompt[id].insert(prompt[id].end(), tokens.begin(), tokens.end());
  for (const auto& [id, tokens] : prompt) expected.insert(tokens);
  CHECK(by_request(whole) == expected);

  // two ranks, merged as they are, and as bytes
  recorder merged = first;
  merged.merge(second);
  recorder of_bytes = recorder::make({shape, 10'000});
  of_bytes.merge(first.to_bytes());
  of_bytes.merge(second.to_bytes());
  for (const recorder* r : {&merged, &of_bytes}) {
    same_loads(*r);
    CHECK(r->tokens() == whole.tokens());
    CHECK(by_request(*r) == expected);
  }
}

TEST_CASE("memory is bounded: the latest tokens stay") {
  recorder r = small(10);
  for (int i = 0; i < 1000; ++i) {
    r.add_pass(rows{{static_cast<std::uint64_t>(i)}}, all(i32{i % 4, (i + 1) % 4, i % 4, (i + 1) % 4}));
  }
  CHECK(r.kept() == 10);
  CHECK(r.tokens() == 1000);
  const trace t = r.to_trace();
  REQUIRE(t.requests().size() == 10);
  CHECK(t.view().token(0)[0] == 990 % 4);
  CHECK(t.view().token(9)[0] == 999 % 4);
  // one pass of more rows than are kept
  recorder big = small(3);
  big.add_pass(rows(5), all(i32{0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1}));
  CHECK(ids_of(big.to_trace()) == std::vector<std::uint16_t>{2, 3, 2, 3, 3, 0, 3, 0, 0, 1, 0, 1});
  // every tenth token or so, but all of them count as load
  recorder thin = recorder::make({two_by_two, 10'000, 10});
  for (int i = 0; i < 1000; ++i) thin.add_pass(rows(8), all(i32(32, -1)));
  CHECK(thin.kept() > 700);
  CHECK(thin.kept() < 900);
  CHECK(thin.tokens() == 8000);
}

TEST_CASE("loads fade by their half-life") {
  recorder r = recorder::make({two_by_two, 10, 1, 100});
  for (int i = 0; i < 100; ++i) r.add_pass(rows{{0}}, all(i32{0, 1, 0, 1}));
  for (int i = 0; i < 100; ++i) r.add_pass(rows{{0}}, all(i32{2, 3, 2, 3}));
  CHECK(r.loads(phase::decode).layer(0)[0] == Approx(r.loads(phase::decode).layer(0)[2] / 2).epsilon(0.02));
  CHECK(r.tokens() == Approx(r.loads(phase::decode).layer(0)[0] + r.loads(phase::decode).layer(0)[2]));
}

TEST_CASE("solvers work from what a recorder has") {
  generator g(tetromino_test::seed());
  recorder r = recorder::make({{2, 8, 2}, 4096});
  for (int pass = 0; pass < 50; ++pass) {
    rows who;
    i32 ids;
    for (std::uint64_t q = 0; q < 8; ++q) who.push_back({q, pass < 10 ? phase::prefill : phase::decode});
    for (std::size_t l = 0; l < 2; ++l) {
      for (int q = 0; q < 8; ++q) {  // even requests use even experts
        const auto a = static_cast<int>(g.below(4)) * 2 + q % 2;
        ids.push_back(a);
        ids.push_back((a + 2) % 8);
      }
    }
    r.add_pass(who, all(ids));
  }
  const topology t = topology::uniform(2, 2, 2);
  const trace recorded = r.to_trace();
  const local_plan plan = local(recorded.view(), t);
  CHECK(evaluate(recorded.view(), plan.experts, t, plan.source_of_request).remote_visits == 0);
  CHECK(try_validate(balanced(r.loads(phase::decode), t), t).has_value());
  const node_affinity affinity = node_affinity::make(plan.experts, t, recorded.view());
  signature_builder builder = affinity.builder();
  std::vector<request_signature> signatures;
  for (const request& q : recorded.requests()) signatures.push_back(signature_of(recorded.view(), q, builder));
  CHECK(group(affinity, signatures, std::vector<std::uint64_t>(8, 40)) == plan.source_of_request);
}

TEST_CASE("a recorder says what it cannot take") {
  CHECK(code_of(recorder::try_make({{0, 4, 2}})) == errc::invalid_argument);
  CHECK(code_of(recorder::try_make({{1, 4, 5}})) == errc::invalid_argument);
  CHECK(code_of(recorder::try_make({{std::size_t{1} << 62, 4, 1}})) == errc::invalid_argument);
  CHECK(code_of(recorder::try_make({{std::size_t{1} << 47, 4, 1}})) == errc::invalid_argument);
  CHECK(code_of(recorder::try_make({two_by_two, 0})) == errc::invalid_argument);
  CHECK(code_of(recorder::try_make({two_by_two, 1, 0})) == errc::invalid_argument);
  CHECK(code_of(recorder::try_make({two_by_two, 1, 1, std::nan("")})) == errc::invalid_argument);
  recorder r = small();
  CHECK(code_of(r.try_add_layer(0, all(i32{}))) == errc::shape_mismatch);
  CHECK(code_of(r.try_end_pass()) == errc::invalid_argument);
  CHECK(code_of(r.try_begin_pass(rows{{1, phase::all}})) == errc::invalid_argument);
  r.begin_pass(rows{{1}});
  CHECK(code_of(r.try_begin_pass(rows{{1}})) == errc::invalid_argument);
  CHECK(code_of(r.try_add_layer(2, all(i32{0, 1}))) == errc::shape_mismatch);
  CHECK(code_of(r.try_add_layer(0, all(i32{0}))) == errc::shape_mismatch);
  CHECK(code_of(r.try_add_layer(0, all(i32{0, 4}))) == errc::invalid_argument);
  CHECK(code_of(r.try_add_layer(0, all(i32{0, -2}))) == errc::invalid_argument);
  CHECK(code_of(r.try_add_layer(0, all(i32{3, 3}))) == errc::invalid_argument);
  CHECK(code_of(r.try_merge(small())) == errc::shape_mismatch);
  CHECK_THROWS_AS(r.to_bytes(), tetromino_test::precondition_failed);
  r.add_layer(0, all(i32{-1, -1}));
  CHECK(code_of(r.try_add_layer(0, all(i32{0, 1}))) == errc::invalid_argument);  // one token would count twice
  r.end_pass();
  CHECK(r.loads(phase::decode).layer(0)[0] == 0);
  r.begin_pass(rows{{1}});
  CHECK(r.try_add_layer(0, all(i32{0, 1})).has_value());  // the next pass has it again
  r.end_pass();
  CHECK(code_of(r.try_merge(recorder::make({{1, 4, 2}}))) == errc::shape_mismatch);
  CHECK(code_of(r.try_add_pass(rows{{1}}, all(i32{0, 1}))) == errc::shape_mismatch);

  recorder full = small();
  full.add_pass(rows{{3}, {4, phase::prefill}}, all(i32{0, 1, 2, 3, 1, 0, 3, 2}));
  const std::vector<std::byte> bytes = full.to_bytes();
  CHECK(small().try_merge(bytes).has_value());
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    CHECK_FALSE(small().try_merge(std::span(bytes).first(n)).has_value());
  }
  generator g(tetromino_test::seed());
  for (int i = 0; i < 2000; ++i) {  // changed bytes are refused, or make a recorder that is as valid as any
    std::vector<std::byte> changed = bytes;
    changed[g.below(bytes.size())] = static_cast<std::byte>(g.below(256));
    recorder to = small();
    if (!to.try_merge(changed)) continue;
    const trace t = to.to_trace();
    CHECK(try_validate(t.view()).has_value());
  }
}
