#include "check.hpp"

#include <tetromino/moe/topology.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"

#include <cmath>   // HUGE_VAL, std::nan
#include <vector>  // std::vector

namespace {

using namespace tetromino::moe;
using tetromino::errc;

}  // namespace

TEST_CASE("a uniform topology numbers GPUs node after node and slots GPU after GPU") {
  const topology t = topology::uniform(2, 3, 4);
  CHECK(t.nodes() == 2);
  CHECK(t.gpus() == 6);
  CHECK(t.slots() == 24);
  CHECK(t.is_uniform());
  CHECK(t.first_gpu(1) == 3);
  CHECK(t.gpus_on_node(1) == 3);
  CHECK(t.node_of_gpu(2) == 0);
  CHECK(t.node_of_gpu(3) == 1);
  CHECK(t.first_slot(3) == 12);
  CHECK(t.first_slot_of_node(1) == 12);
  CHECK(t.slots_on_node(1) == 12);
  CHECK(t.gpu_of_slot(11) == 2);
  CHECK(t.node_of_slot(12) == 1);
  CHECK(t == topology::with_node_slots(2, 3, 12));
}

TEST_CASE("slots of a node that do not divide go to its first GPUs") {
  const topology t = topology::with_node_slots(2, 8, 18);
  CHECK(t.slots_on_node(0) == 18);
  CHECK(t.slots_on_gpu(0) == 3);
  CHECK(t.slots_on_gpu(1) == 3);
  CHECK(t.slots_on_gpu(2) == 2);
  CHECK(t.slots_on_gpu(8) == 3);
  CHECK_FALSE(t.is_uniform());
  CHECK(topology::with_node_slots(1, 4, 2).gpus_with_slots() == 2);
}

TEST_CASE("the numbering of any shape is consistent") {
  reference::generator g(tetromino_test::seed());
  for (int i = 0; i < 2000; ++i) {
    std::vector<std::size_t> gpus, slots;
    for (std::size_t n = 1 + g.below(6); n > 0; --n) {
      gpus.push_back(1 + g.below(5));
      for (std::size_t j = 0; j < gpus.back(); ++j) slots.push_back(g.below(6));
    }
    slots.back() += 1;
    const topology t = topology::make(gpus, slots);
    CAPTURE(i);
    REQUIRE(t.nodes() == gpus.size());
    REQUIRE(t.gpus() == slots.size());
    std::size_t slot = 0, gpu = 0, with_slots = 0;
    for (std::size_t n = 0; n < gpus.size(); ++n) {
      REQUIRE(t.first_gpu(n) == gpu);
      REQUIRE(t.first_slot_of_node(n) == slot);
      for (std::size_t j = 0; j < gpus[n]; ++j, ++gpu) {
        REQUIRE(t.node_of_gpu(gpu) == n);
        REQUIRE(t.first_slot(gpu) == slot);
        REQUIRE(t.slots_on_gpu(gpu) == slots[gpu]);
        with_slots += slots[gpu] > 0 ? 1U : 0U;
        for (std::size_t s = 0; s < slots[gpu]; ++s, ++slot) {
          REQUIRE(t.gpu_of_slot(slot) == gpu);
          REQUIRE(t.node_of_slot(slot) == n);
        }
      }
      REQUIRE(t.first_slot_of_node(n) + t.slots_on_node(n) == slot);
    }
    REQUIRE(t.slots() == slot);
    REQUIRE(t.gpus_with_slots() == with_slots);
  }
}

TEST_CASE("shapes and links that make no sense are errors") {
  using sizes = std::vector<std::size_t>;
  CHECK(code_of(topology::try_uniform(0, 8, 1)) == errc::invalid_argument);
  CHECK(code_of(topology::try_uniform(8, 0, 1)) == errc::invalid_argument);
  CHECK(code_of(topology::try_uniform(8, 8, 0)) == errc::invalid_argument);
  CHECK(code_of(topology::try_uniform(std::size_t{1} << 40, 8, 1)) == errc::invalid_argument);
  CHECK(code_of(topology::try_uniform(1, ~std::size_t{0}, 1)) == errc::invalid_argument);
  CHECK(code_of(topology::try_uniform(2, 1, ~std::size_t{0})) == errc::invalid_argument);
  CHECK(code_of(topology::try_with_node_slots(0, 1, 1)) == errc::invalid_argument);
  CHECK(code_of(topology::try_with_node_slots(1, 1, ~std::size_t{0})) == errc::invalid_argument);
  CHECK(code_of(topology::try_make(sizes{}, sizes{})) == errc::invalid_argument);
  CHECK(code_of(topology::try_make(sizes{1, 0}, sizes{1})) == errc::invalid_argument);
  CHECK(code_of(topology::try_make(sizes{2, 1}, sizes{1, 1})) == errc::shape_mismatch);
  for (const double bad : {0.0, -1.0, std::nan(""), HUGE_VAL}) {
    CHECK(code_of(topology::try_uniform(1, 1, 1, {.inside = {bad, 0}, .between = {1, 0}})) == errc::invalid_argument);
    CHECK(code_of(topology::try_uniform(1, 1, 1, {.inside = {1, 0}, .between = {bad, 0}})) == errc::invalid_argument);
  }
  for (const double bad : {-1.0, std::nan(""), HUGE_VAL}) {
    CHECK(code_of(topology::try_uniform(1, 1, 1, {.inside = {1, bad}, .between = {1, 0}})) == errc::invalid_argument);
  }
  CHECK_THROWS_WITH(topology::make(sizes{2, 1}, sizes{1, 1}),
                    tetromino_test::contains("expected slots for 3 GPUs, got 2 entries"));
}

TEST_CASE("numbers out of range break a precondition") {
  const topology t = topology::uniform(1, 2, 2);
  CHECK_THROWS_AS(t.node_of_gpu(2), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(t.first_gpu(3), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(t.gpu_of_slot(4), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(t.slots_on_gpu(2), tetromino_test::precondition_failed);
}

TEST_CASE("GPUs of unequal speed: balanced gives the fast ones more, and the cost counts time") {
  const std::vector<double> speeds = {2, 1, 1, 2};
  const topology t = topology::uniform(2, 2, 4).with_speeds(speeds);
  CHECK_FALSE(t.is_uniform());
  CHECK(topology::uniform(2, 2, 4).with_speeds(std::vector<double>(4, 3.0)).is_uniform());
  CHECK(t.speed(0) == 1);
  CHECK(t.speed(1) == 0.5);
  CHECK(t.speed_of_node(1) == 1.5);
  CHECK(t.without(std::vector<std::uint32_t>{0}).speed_of_node(0) == 0.5);
  CHECK_FALSE(t == topology::uniform(2, 2, 4));
  for (const std::vector<double>& bad :
       {std::vector<double>{1, 1}, std::vector<double>{1, 1, 1, 0}, std::vector<double>{1, 1, 1, 1e-3},
        std::vector<double>{1, 1, 1, std::nan("")}}) {
    CHECK_FALSE(topology::uniform(2, 2, 4).try_with_speeds(bad).has_value());
  }
  CHECK_THROWS_AS(t.speed(4), tetromino_test::precondition_failed);
}

TEST_CASE("nodes may be near and far") {
  const topology t = topology::uniform(5, 2, 4);
  const topology racks = t.with_racks(2, 3);  // {0, 1}, {2, 3}, {4}
  for (std::size_t a = 0; a < 5; ++a) {
    for (std::size_t b = 0; b < 5; ++b) CHECK(racks.node_cost(a, b) == (a / 2 == b / 2 ? 1 : 3));
  }
  CHECK(racks == t.with_node_costs(racks.node_costs()));
  CHECK_FALSE(racks == t);
  CHECK(t.node_cost(0, 4) == 1);
  CHECK(racks.without(std::vector<std::uint32_t>{0}).node_cost(0, 4) == 3);
  CHECK(racks.with_speeds(std::vector<double>(10, 1.0)).node_cost(0, 4) == 3);
  // costs of 1 say nothing, whatever the diagonal has
  CHECK(t.with_racks(2, 1) == t);
  CHECK(t.with_racks(9, 3) == t);
  std::vector<double> costs(25, 1.0);
  costs[0] = 7;
  CHECK(t.with_node_costs(costs) == t);
  costs[1] = 2;
  CHECK_THROWS_WITH(t.with_node_costs(costs), tetromino_test::contains("from node 1 to 0 and 2 back"));
  CHECK(code_of(t.try_with_node_costs(std::vector<double>(24, 1.0))) == errc::shape_mismatch);
  CHECK(code_of(t.try_with_racks(0, 1)) == errc::invalid_argument);
  for (const double bad : {0.0, -1.0, 1e-4, 1001.0, std::nan(""), HUGE_VAL}) {
    CHECK(code_of(t.try_with_racks(1, bad)) == errc::invalid_argument);
  }
  CHECK(code_of(topology::uniform(5000, 1, 1).try_with_racks(1, 2)) == errc::invalid_argument);
  CHECK(code_of(topology::uniform(5000, 1, 1).try_with_node_costs({})) == errc::shape_mismatch);
  CHECK_THROWS_AS(t.node_cost(0, 5), tetromino_test::precondition_failed);
}
