#include "check.hpp"

/// Dispatch and combine between ranks that are threads of one process.

#include <tetromino/comm/dispatcher.hpp>

#include "support/memory_exchange.hpp"

namespace {

using namespace tetromino_test;
using comm::dispatch_route;
using moe::entry_rule;
using tetromino::result;

static_assert(comm::exchange<memory_exchange> && comm::exchange<comm::local_exchange>);

TEST_CASE("dispatcher: rows meet their experts and come back added up, by every route") {
  reference::generator random(seed());
  for (int round = 0; round < 200; ++round) {
    const std::size_t ranks = 1 + random.below(8);
    const dispatch_world w(ranks, random.bits());
    for (const dispatch_route route :
         {dispatch_route::per_node, dispatch_route::per_rank, dispatch_route::per_expert}) {
      const entry_rule entry = random.below(2) == 0 ? entry_rule::same_local_number : entry_rule::leader;
      const auto got = serve_all(w, route, entry);
      moe::carried_rows carried, predicted;
      for (std::size_t r = 0; r < ranks; ++r) {
        INFO("round " << round << ", route " << static_cast<int>(route) << ", rank " << r << " of " << ranks);
        CHECK(got[r].problem.empty());
        CHECK(worst_difference(w, r, got[r]) <= 1e-5);
        carried.between_nodes += total(got[r]).between_nodes;
        carried.inside_nodes += total(got[r]).inside_nodes;
        if (route == dispatch_route::per_rank) continue;
        predicted.between_nodes += w.predicted(r, route).between_nodes;
        predicted.inside_nodes += w.predicted(r, route).inside_nodes;
      }
      if (route == dispatch_route::per_rank) continue;
      CHECK(carried.between_nodes == predicted.between_nodes);
      // through leaders, other links inside the nodes carry the rows
      if (route == dispatch_route::per_expert || entry == entry_rule::same_local_number) {
        CHECK(carried.inside_nodes == predicted.inside_nodes);
      }
    }
  }
}

TEST_CASE("dispatcher: with a copy for each call, sums do not depend on where experts are") {
  reference::generator random(seed());
  for (int round = 0; round < 100; ++round) {
    const std::uint64_t s = random.bits();
    const dispatch_world w(1 + random.below(6), s);
    dispatch_world elsewhere = w;  // the same tokens, experts in other slots
    const auto row = elsewhere.placement.layer(0);
    for (std::size_t i = row.size(); i > 1; --i) std::swap(row[i - 1], row[random.below(i)]);
    const auto a = serve_all(w, dispatch_route::per_expert, entry_rule::leader);
    const auto b = serve_all(elsewhere, dispatch_route::per_expert, entry_rule::leader);
    for (std::size_t r = 0; r < a.size(); ++r) CHECK(a[r].out == b[r].out);
    if (w.k > 2) continue;  // the sum of two is the same whoever adds them
    const auto c = serve_all(elsewhere, dispatch_route::per_node, entry_rule::same_local_number);
    for (std::size_t r = 0; r < a.size(); ++r) CHECK(a[r].out == c[r].out);
  }
}

TEST_CASE("dispatcher: one rank needs nobody") {
  reference::generator random(seed());
  for (int round = 0; round < 20; ++round) {
    const dispatch_world w(1, random.bits());
    const comm::local_exchange alone;
    comm::dispatcher<comm::local_exchange> d(alone, w.cluster, w.k);
    const auto got = serve(w, d, 0);
    CHECK(got.problem.empty());
    CHECK(worst_difference(w, 0, got) <= 1e-5);
    CHECK(total(got).between_nodes + total(got).inside_nodes == 0);
  }
}

TEST_CASE("dispatcher: a cluster of another size is a mistake of the caller") {
  const comm::local_exchange alone;
  CHECK_THROWS_AS(comm::dispatcher<comm::local_exchange>(alone, moe::topology::uniform(1, 2, 1), 1),
                  precondition_failed);
}

TEST_CASE("dispatcher: buffers that do not fit together are errors in every build, before anything travels") {
  const comm::local_exchange alone;
  comm::dispatcher<comm::local_exchange> d(alone, moe::topology::uniform(1, 1, 4), 2);
  const std::vector<moe::expert_call> calls = {{0, 1}, {1, 1}, {2, 1}, {}};  // two rows
  const std::vector<float> x(2 * 3);
  const std::vector<std::uint32_t> tags = {5, 6};
  const auto all = [](const auto& v) { return std::span(v); };
  const auto refused = [&](const auto& r) { return !r && r.error().code() == tetromino::errc::shape_mismatch; };
  CHECK(refused(d.try_dispatch(all(calls), std::span<const float>(x).first(5), all(tags), 3)));
  CHECK(refused(d.try_dispatch(all(calls), std::span<const float>(x), all(tags).first(1), 3)));
  CHECK(refused(d.try_dispatch(all(calls).first(3), std::span<const float>(x), all(tags), 3)));
  d.dispatch(std::span<const moe::expert_call>(calls), std::span<const float>(x), std::span<const std::uint32_t>(tags),
             3);
  std::vector<float> y(3 * 3, 1.0f), out(2 * 3);
  CHECK(refused(d.try_combine(std::span<const float>(y).first(8), out, 3)));
  CHECK(refused(d.try_combine(y, std::span<float>(out).first(5), 3)));
  d.combine(y, out, 3);
  CHECK(out == std::vector<float>{2, 2, 2, 1, 1, 1});
  CHECK_THROWS_AS(d.combine(y, std::span<float>(out).first(5), 3), tetromino::error);
}

}  // namespace
