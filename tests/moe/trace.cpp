#include "check.hpp"

#include <tetromino/moe/trace.hpp>

#include "code_of.hpp"

#include <vector>  // std::vector

namespace {

using namespace tetromino::moe;
using tetromino::errc;
using tetromino_test::contains;

using ids = std::vector<std::uint16_t>;
using requests = std::vector<request>;

/// Two requests of 2 and 1 tokens, 2 layers, 2 of 4 experts.
trace small() {
  return trace::make({2, 4, 2}, {0, 1, 2, 3, 1, 0, 3, 2, 2, 1, 0, 3}, {{0, 2, 1, 0}, {2, 1, 0, 1}}, {"code", "chat"});
}

}  // namespace

TEST_CASE("a trace is seen through views") {
  const trace t = small();
  CHECK(t.tokens() == 3);
  const trace_view v = t.view();
  CHECK(v.token(1)[0] == 1);
  CHECK(v.experts_of(1, 1)[0] == 3);
  CHECK(v.experts_of(2, 0)[1] == 1);
  CHECK(v.tokens() == 3);
  CHECK(v.tokens(phase::prefill) == 1);
  CHECK(v.tokens(phase::decode) == 2);
  CHECK(v.requests[0].range(phase::decode).first == 1);
  CHECK(v.requests[0].range(phase::decode).last == 2);
  CHECK_THROWS_AS(v.token(3), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(v.experts_of(0, 2), tetromino_test::precondition_failed);
}

TEST_CASE("a selection of requests copies no ids") {
  const trace t = small();
  const std::vector<std::uint32_t> numbers = {1};
  const requests chosen = select(t.view(), numbers);
  const trace_view v = t.view().with(chosen);
  CHECK(v.ids.data() == t.view().ids.data());
  CHECK(v.tokens() == 1);
  CHECK(v.requests[0] == t.requests()[1]);
  CHECK_THROWS_AS(select(t.view(), std::vector<std::uint32_t>{2}), tetromino_test::precondition_failed);
}

TEST_CASE("an empty trace is a trace without tokens") {
  const trace t = trace::make({2, 4, 2}, {}, {});
  CHECK(t.tokens() == 0);
  CHECK(t.view().tokens() == 0);
  CHECK(trace::try_make({2, 4, 2}, {}, {{0, 0, 0, 0}}).has_value());
}

TEST_CASE("ids of any integers, token after token or layer after layer, make the same trace") {
  const trace t = trace::make({2, 8, 2}, {0, 1, 2, 3, 4, no_expert, 6, 7, no_expert, no_expert, 1, 0}, {{0, 3}});
  const std::vector<std::int64_t> by_token = {0, 1, 2, 3, 4, -1, 6, 7, -1, -1, 1, 0};
  const std::int32_t by_layer[] = {0, 1, 4, -1, -1, -1, 2, 3, 6, 7, 1, 0};
  const auto same = [&](const trace& other) {
    const auto a = t.view().ids, b = other.view().ids;
    return std::equal(a.begin(), a.end(), b.begin(), b.end()) && t.requests().size() == other.requests().size();
  };
  CHECK(same(trace::make({2, 8, 2}, by_token, {{0, 3}})));
  CHECK(same(trace::from_layers({2, 8, 2}, by_layer, {{0, 3}})));
  CHECK_THROWS_WITH(trace::make({2, 8, 2}, std::vector<int>{0, 1, 2, 3, 4, 5, 6, -2}, {}),
                    contains("expected expert ids below 8 or -1, got -2 in token 1"));
  CHECK_THROWS_WITH(trace::from_layers({2, 8, 2}, std::vector<int>{0, 1, 4, 70'000, 2, 3, 6, 7}, {}),
                    contains("got 70000 in token 1"));
  CHECK(code_of(trace::try_from_layers({2, 8, 2}, std::vector<int>(6), {})) == errc::shape_mismatch);
  CHECK(code_of(trace::try_from_layers({2, 8, 0}, std::vector<int>(6), {})) == errc::shape_mismatch);
}

TEST_CASE("broken traces are errors") {
  CHECK(code_of(trace::try_make({0, 4, 2}, {}, {})) == errc::invalid_argument);
  CHECK(code_of(trace::try_make({1, 0, 0}, {}, {})) == errc::invalid_argument);
  CHECK(code_of(trace::try_make({1, 4, 5}, {}, {})) == errc::invalid_argument);
  CHECK(code_of(trace::try_make({1, 70'000, 1}, {}, {})) == errc::invalid_argument);
  CHECK(code_of(trace::try_make({2, 4, 2}, {0, 1, 2}, {})) == errc::shape_mismatch);
  CHECK(code_of(trace::try_make({~std::size_t{0}, 4, 2}, {0, 1}, {})) == errc::shape_mismatch);
  CHECK(code_of(trace::try_make({std::size_t{1} << 63, 4, 2}, {0, 1}, {})) == errc::shape_mismatch);
  CHECK_THROWS_WITH(trace::make({2, 4, 2}, {0, 1, 2, 3, 1, 0, 4, 2}, {}),
                    contains("expected expert ids below 4, got 4 in token 1, layer 1"));
  CHECK_THROWS_WITH(trace::make({2, 4, 2}, {0, 1, 2, 2}, {}), contains("got 2 twice in token 0, layer 1"));
  const ids one = {0, 1, 2, 3};
  CHECK(code_of(trace::try_make({2, 4, 2}, one, {{0, 2, 0, 0}})) == errc::invalid_argument);
  CHECK(code_of(trace::try_make({2, 4, 2}, one, {{2, 0, 0, 0}})) == errc::invalid_argument);
  CHECK(code_of(trace::try_make({2, 4, 2}, one, {{~std::uint64_t{0}, 1, 0, 0}})) == errc::invalid_argument);
  CHECK(code_of(trace::try_make({2, 4, 2}, one, {{0, 1, 2, 0}})) == errc::invalid_argument);
  CHECK_THROWS_WITH(trace::make({2, 4, 2}, one, {{0, 1, 0, 1}}, {"code"}), contains("expected domains below 1, got 1"));
}
