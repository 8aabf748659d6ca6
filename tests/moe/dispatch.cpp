#include "check.hpp"

#include <tetromino/moe/dispatch.hpp>
#include <tetromino/moe/replica.hpp>

#include "reference/generators.hpp"
#include "support/allocations.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <type_traits>
#include <vector>

namespace {

namespace moe = tetromino::moe;
using moe::dispatch_plan;
using moe::entry_rule;
using moe::expert_call;
using moe::no_slot;
using moe::row_copies;
using tetromino::errc;
using tetromino_test::contains;
using tetromino_test::precondition_failed;
using tetromino_test::seed;

template <class T>
std::vector<T> list(std::span<const T> s) {
  return {s.begin(), s.end()};
}

TEST_CASE("dispatch_plan: an example by hand") {
  // slots 0, 1 on rank 0; 2 on rank 1; 3 on rank 2
  const std::vector<std::uint32_t> rank_of_slot{0, 0, 1, 2};
  const std::vector<expert_call> calls{{2, 0.5f}, {0, 0.25f},     // row 0: ranks 1, 0
                                       {1, 1.0f}, {0, 2.0f},      // row 1: rank 0 twice
                                       {3, 1.0f}, {no_slot, 0}};  // row 2: rank 2
  dispatch_plan plan(3, 2);
  plan.plan_send(calls, rank_of_slot);
  CHECK(list(plan.send_rows()) == std::vector<std::uint32_t>{0, 1, 0, 2});
  CHECK(list(plan.send_counts()) == std::vector<std::int32_t>{2, 1, 1});
  CHECK(list(plan.send_offsets()) == std::vector<std::int32_t>{0, 2, 3});
  CHECK(list(plan.send_calls()) ==
        std::vector<expert_call>{{0, 0.25f}, {}, {1, 1.0f}, {0, 2.0f}, {2, 0.5f}, {}, {3, 1.0f}, {}});
  CHECK(plan.rows() == 3);
  CHECK(plan.sent() == 4);

  plan.plan_send(calls, rank_of_slot, row_copies::per_expert);
  CHECK(list(plan.send_rows()) == std::vector<std::uint32_t>{0, 1, 1, 0, 2});
  CHECK(list(plan.send_counts()) == std::vector<std::int32_t>{3, 1, 1});

  // rank 0 receives its own two rows and one more, from rank 2
  plan.plan_send(calls, rank_of_slot);
  plan.plan_receive(std::vector<std::int32_t>{2, 0, 1});
  CHECK(plan.received() == 3);
  CHECK(list(plan.receive_offsets()) == std::vector<std::int32_t>{0, 2, 2});
  const std::vector<expert_call> came{{0, 0.25f}, {}, {1, 1.0f}, {0, 2.0f}, {1, 4.0f}, {}};
  std::copy(came.begin(), came.end(), plan.receive_calls().begin());
  plan.group_by_expert(0, 2);
  CHECK(list(plan.expert_offsets()) == std::vector<std::uint32_t>{0, 2, 4});
  CHECK(list(plan.expert_rows()) == std::vector<std::uint32_t>{0, 1, 1, 2});

  std::vector<float> answers(3), out(3);
  plan.add_expert_outputs(std::vector<float>{10, 20, 30, 40}, answers, 1);
  CHECK(answers == std::vector<float>{2.5f, 70, 160});
  plan.add_copies(std::vector<float>{1, 2, 4, 8}, out, 1);  // copies of rows 0, 1, 0, 2
  CHECK(out == std::vector<float>{5, 2, 8});
}

TEST_CASE("dispatch_plan: send side on random calls") {
  reference::generator random(seed());
  for (int round = 0; round < 2000; ++round) {
    const std::size_t ranks = 1 + random.below(7), slots = 1 + random.below(20), k = 1 + random.below(5);
    const std::size_t rows = random.below(30);
    std::vector<std::uint32_t> rank_of_slot(slots);
    for (auto& r : rank_of_slot) r = static_cast<std::uint32_t>(random.below(ranks));
    std::vector<expert_call> calls(rows * k);
    for (auto& c : calls) {
      if (random.below(5) != 0)
        c = {static_cast<std::uint32_t>(random.below(slots)), static_cast<float>(random.uniform())};
    }
    const bool per_expert = random.below(2) == 0;
    dispatch_plan plan(ranks, k);
    plan.plan_send(calls, rank_of_slot, per_expert ? row_copies::per_expert : row_copies::per_rank);

    // the copies that each rank must get, with their calls
    std::vector<std::vector<std::pair<std::uint32_t, std::vector<expert_call>>>> expected(ranks);
    for (std::size_t r = 0; r < ranks; ++r) {
      for (std::size_t row = 0; row < rows; ++row) {
        std::vector<expert_call> there;
        for (std::size_t i = row * k; i < (row + 1) * k; ++i) {
          if (calls[i].slot == no_slot || rank_of_slot[calls[i].slot] != r) continue;
          if (per_expert) {
            expected[r].push_back({static_cast<std::uint32_t>(row), {calls[i]}});
          } else {
            there.push_back(calls[i]);
          }
        }
        if (!there.empty()) expected[r].push_back({static_cast<std::uint32_t>(row), there});
      }
    }
    std::size_t at = 0;
    for (std::size_t r = 0; r < ranks; ++r) {
      REQUIRE(plan.send_counts()[r] == static_cast<std::int32_t>(expected[r].size()));
      REQUIRE(plan.send_offsets()[r] == static_cast<std::int32_t>(at));
      for (auto& [row, there] : expected[r]) {
        CHECK(plan.send_rows()[at] == row);
        there.resize(k);
        CHECK(list(plan.send_calls().subspan(at * k, k)) == there);
        ++at;
      }
    }
    CHECK(plan.sent() == at);
  }
}

TEST_CASE("dispatch_plan: no memory is allocated once a batch of that size has passed") {
  reference::generator random(seed());
  const std::vector<std::uint32_t> rank_of_slot{0, 0, 1, 1, 2, 2};
  dispatch_plan plan(3, 4);
  std::vector<float> rows(64 * 8), answers, out(64 * 8), buffer;
  const auto batch = [&](std::size_t count) {
    std::vector<expert_call> calls(count * 4);
    for (auto& c : calls) c = {static_cast<std::uint32_t>(random.below(2)), 1.0f};  // all to rank 0
    std::vector<float> sent(count * 8), y(count * 4 * 8), sums(count * 8);
    const std::vector<std::int32_t> counts{static_cast<std::int32_t>(count), 0, 0};
    const std::size_t before = tetromino_test::allocations;
    plan.plan_send(calls, rank_of_slot);
    moe::gather_rows(plan.send_rows(), std::span<const float>(rows), std::span(sent).first(plan.sent() * 8), 8);
    plan.plan_receive(counts);
    std::copy(plan.send_calls().begin(), plan.send_calls().end(), plan.receive_calls().begin());
    plan.group_by_expert(0, 2);
    plan.add_expert_outputs(y, sums, 8);
    plan.add_copies(sums, std::span(out).first(count * 8), 8);
    return tetromino_test::allocations - before;
  };
  CHECK((batch(64) > 0) == tetromino_test::counts_allocations);
  CHECK(batch(64) == 0);
  CHECK(batch(10) == 0);
  CHECK(batch(0) == 0);
  CHECK(batch(64) == 0);
}

TEST_CASE("entry_ranks: the sender's counterpart on another node, or its leader") {
  const std::vector<std::size_t> gpus{3, 1, 2}, slots{1, 1, 1, 2, 1, 1};
  const auto t = moe::topology::make(gpus, slots);
  std::vector<std::uint32_t> ranks(t.slots());
  const auto from = [&](std::size_t rank, entry_rule rule) {
    moe::entry_ranks(t, rank, rule, ranks);
    return ranks;
  };
  using numbers = std::vector<std::uint32_t>;
  CHECK(from(2, entry_rule::same_local_number) == numbers{2, 2, 2, 3, 3, 4, 4});
  CHECK(from(1, entry_rule::same_local_number) == numbers{1, 1, 1, 3, 3, 5, 5});
  CHECK(from(5, entry_rule::same_local_number) == numbers{1, 1, 1, 3, 3, 5, 5});
  CHECK(from(5, entry_rule::leader) == numbers{0, 0, 0, 3, 3, 5, 5});
  moe::ranks_of_slots(t, ranks);
  CHECK(ranks == numbers{0, 1, 2, 3, 3, 4, 5});
  // GPUs 0 and 4 have left: rows enter at those that stay, the first of each node by 1 and 3
  const auto left = t.without(std::vector<std::uint32_t>{0, 4});
  ranks.resize(left.slots());
  const auto of_left = [&](std::size_t rank, entry_rule rule) {
    moe::entry_ranks(left, rank, rule, ranks);
    return ranks;
  };
  CHECK(of_left(2, entry_rule::same_local_number) == numbers{2, 2, 3, 3, 5});
  CHECK(of_left(5, entry_rule::same_local_number) == numbers{1, 1, 3, 3, 5});
  CHECK(of_left(3, entry_rule::leader) == numbers{1, 1, 3, 3, 5});
}

TEST_CASE("make_calls: the copy on the serving GPU") {
  const auto t = moe::topology::uniform(2, 2, 2);
  const auto p = moe::placement::make(1, 4, 8, {0, 1, 2, 3, 3, 0, 1, 2});
  const moe::replica_index where(p);
  const std::vector<std::uint16_t> ids{0, 3, 2, 1};
  const std::vector<float> weights{0.1f, 0.2f, 0.3f, 0.4f};
  std::vector<expert_call> calls(4);
  moe::make_calls(where, t, 0, ids, weights, std::vector<std::uint32_t>{2, 1, 3, 0}, calls);
  CHECK(calls == std::vector<expert_call>{{5, 0.1f}, {3, 0.2f}, {7, 0.3f}, {1, 0.4f}});
  CHECK_THROWS_AS(moe::make_calls(where, t, 0, ids, weights, std::vector<std::uint32_t>{1, 1, 3, 0}, calls),
                  precondition_failed);
}

TEMPLATE_TEST_CASE("make_calls: ids of any integers, -1 for nobody", "", std::uint8_t, std::int8_t, std::uint16_t,
                   std::int32_t, std::uint32_t, std::int64_t, std::uint64_t) {
  const auto t = moe::topology::uniform(2, 1, 4);
  const moe::replica_index where(moe::placement::make(1, 4, 8, {0, 1, 2, 3, 3, 0, 1, 2}));
  std::array<TestType, 3> ids{2, static_cast<TestType>(-1), 3};
  const std::vector<float> weights{0.1f, 0.2f, 0.3f};
  const std::vector<std::uint32_t> gpus{1, moe::no_gpu, 0};
  std::vector<expert_call> calls(3);
  const std::vector<expert_call> expected{{7, 0.1f}, {moe::no_slot, 0.2f}, {3, 0.3f}};
  moe::make_calls(where, t, 0, ids, weights, gpus, calls);
  CHECK(calls == expected);
  calls.assign(3, {});
  moe::make_calls(where, t, 0, std::span(ids), weights, gpus, calls);
  CHECK(calls == expected);
  ids[1] = 4;
  CHECK_THROWS_AS(moe::make_calls(where, t, 0, ids, weights, gpus, calls), precondition_failed);
  if constexpr (std::is_signed_v<TestType>) {
    ids[1] = -2;
    CHECK_THROWS_AS(moe::make_calls(where, t, 0, ids, weights, gpus, calls), precondition_failed);
  }
}

TEST_CASE("dispatch_plan: what cannot be planned is an error that says why") {
  dispatch_plan plan(2, 2);
  const std::vector<std::uint32_t> rank_of_slot{0, 1, 2};
  const auto message = [](const tetromino::result<void>& r, errc code) {
    REQUIRE_FALSE(r);
    CHECK(r.error().code() == code);
    return std::string(r.error().what());
  };
  using calls = std::vector<expert_call>;
  CHECK_THAT(message(plan.try_plan_send(calls(3), rank_of_slot), errc::shape_mismatch),
             contains("2 for each row, got 3"));
  CHECK_THAT(message(plan.try_plan_send(calls{{0, 1}, {3, 1}}, rank_of_slot), errc::invalid_argument),
             contains("got slot 3"));
  CHECK_THAT(message(plan.try_plan_send(calls{{0, 1}, {2, 1}}, rank_of_slot), errc::invalid_argument),
             contains("ranks below 2, got slot 2 for row 0"));
  using counts = std::vector<std::int32_t>;
  CHECK_THAT(message(plan.try_plan_receive(counts{1}), errc::shape_mismatch), contains("each of 2 ranks, got 1"));
  CHECK_THAT(message(plan.try_plan_receive(counts{1, -1}), errc::invalid_argument), contains("got -1 from rank 1"));
  CHECK_THAT(message(plan.try_plan_receive(counts{0x7FFFFFFF, 1}), errc::invalid_argument), contains("from rank 1"));
  CHECK_THAT(message(plan.try_plan_send_counts(counts{1}), errc::shape_mismatch), contains("each of 2 ranks, got 1"));
  CHECK_THAT(message(plan.try_plan_send_counts(counts{-1, 0}), errc::invalid_argument), contains("got -1 to rank 0"));
  plan.plan_receive(counts{1, 0});
  plan.receive_calls()[1] = {5, 1};
  CHECK_THAT(message(plan.try_group_by_expert(2, 3), errc::invalid_argument),
             contains("slots 2 to 5 (excluded), got slot 5"));
  CHECK_THROWS_AS(dispatch_plan(0, 1), precondition_failed);
  CHECK_THROWS_AS(dispatch_plan(1, 0), precondition_failed);

  const moe::topology t = moe::topology::uniform(2, 1, 1);
  std::vector<std::uint32_t> three(3), two(2);
  std::vector<float> one(1);
  const dispatch_plan nothing(2, 1);
  CHECK_THROWS_AS(moe::ranks_of_slots(t, three), precondition_failed);
  CHECK_THROWS_AS(moe::entry_ranks(t, 0, entry_rule::leader, three), precondition_failed);
  CHECK_THROWS_AS(moe::entry_ranks(t, 2, entry_rule::leader, two), precondition_failed);
  CHECK_THROWS_AS(moe::make_calls(moe::replica_index(moe::placement::make(1, 2, 2, {0, 1})), t, 0, {}, one, {}, {}),
                  precondition_failed);
  CHECK_THROWS_AS(nothing.add_expert_outputs(one, {}, 1), precondition_failed);
  CHECK_THROWS_AS(nothing.add_copies(one, {}, 1), precondition_failed);
  CHECK_THROWS_AS(moe::gather_rows<float>({}, {}, one, 1), precondition_failed);
  CHECK_THROWS_AS(moe::rows_carried(nothing, t, 2), precondition_failed);
}

}  // namespace
