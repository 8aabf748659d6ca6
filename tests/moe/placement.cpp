#include "check.hpp"

#include <tetromino/moe/placement.hpp>
#include <tetromino/moe/placement_io.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"

#include <array>   // std::array
#include <set>     // std::set
#include <span>    // std::span
#include <string>  // std::string
#include <vector>  // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;
using tetromino_test::contains;

placement random_placement(generator& g) {
  const std::size_t layers = 1 + g.below(4), experts = 1 + g.below(20), slots = 1 + g.below(30);
  std::vector<std::int32_t> entries(layers * slots);
  for (auto& e : entries) e = static_cast<std::int32_t>(g.below(experts + 1)) - 1;
  return placement::make(layers, experts, slots, entries);
}

}  // namespace

TEST_CASE("a placement starts empty and is filled by layer") {
  placement p(2, 3, 4);
  for (const std::int32_t e : p.slot_to_expert()) CHECK(e == empty_slot);
  p.layer(1)[2] = 0;
  CHECK(p == placement::make(2, 3, 4, {-1, -1, -1, -1, -1, -1, 0, -1}));
  CHECK_THROWS_AS(p.layer(2), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(placement(std::size_t{1} << 62, 1, 4), tetromino_test::precondition_failed);  // 0 slots if it wraps
  const placement& reading = p;
  CHECK_THROWS_AS(reading.layer(2), tetromino_test::precondition_failed);
}

TEST_CASE("placements with impossible sizes or entries are errors") {
  CHECK(code_of(placement::try_make(0, 1, 1, {})) == errc::invalid_argument);
  CHECK(code_of(placement::try_make(1, 0, 1, {0})) == errc::invalid_argument);
  CHECK(code_of(placement::try_make(1, 1, 0, {})) == errc::invalid_argument);
  CHECK(code_of(placement::try_make(1, 70'000, 1, {0})) == errc::invalid_argument);
  CHECK(code_of(placement::try_make(2, 1, 2, {0, 0, 0})) == errc::shape_mismatch);
  CHECK(code_of(placement::try_make(~std::size_t{0}, 1, 2, {0, 0})) == errc::shape_mismatch);
  CHECK(code_of(placement::try_make(1, 2, 2, {0, 2})) == errc::invalid_argument);
  const std::vector<std::int64_t> wide = {-1, 0, 1, 2};
  const std::array<std::uint8_t, 4> narrow = {255, 0, 1, 2};
  CHECK(placement::make(2, 3, 2, wide) == placement::make(2, 3, 2, {-1, 0, 1, 2}));
  CHECK(placement::make(2, 3, 2, std::span(wide)) == placement::make(2, 3, 2, narrow));
  CHECK_THROWS_WITH(placement::make(2, 2, 2, narrow), contains("to 1, got 2 in layer 1, slot 1"));
  CHECK_THROWS_WITH(placement::make(2, 2, 2, {0, 1, 0, -2}),
                    contains("expected experts from -1 (empty) to 1, got -2 in layer 1, slot 1"));
}

TEST_CASE("replica_index is the inverse of the slot map") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 1000; ++i) {
    const placement p = random_placement(g);
    const replica_index where(p);
    for (std::size_t l = 0; l < p.layers(); ++l) {
      for (std::size_t e = 0; e < p.experts(); ++e) {
        std::vector<std::uint32_t> expected;
        for (std::size_t s = 0; s < p.slots(); ++s) {
          if (p.layer(l)[s] == static_cast<std::int32_t>(e)) expected.push_back(static_cast<std::uint32_t>(s));
        }
        const auto slots = where.slots_of(l, e);
        REQUIRE(std::vector<std::uint32_t>(slots.begin(), slots.end()) == expected);
      }
    }
    CHECK_THROWS_AS(where.slots_of(p.layers(), 0), tetromino_test::precondition_failed);
    CHECK_THROWS_AS(where.slots_of(0, p.experts()), tetromino_test::precondition_failed);
  }
}

TEST_CASE("validate finds missing experts, copies on one GPU and foreign topologies") {
  const topology t = topology::uniform(2, 1, 2);
  CHECK(try_validate(placement::make(1, 3, 4, {0, 1, 2, 0}), t).has_value());
  CHECK(try_validate(placement::make(1, 3, 4, {0, 1, 2, -1}), t).has_value());
  CHECK(code_of(try_validate(placement::make(1, 3, 3, {0, 1, 2}), t)) == errc::shape_mismatch);
  CHECK_THROWS_WITH(validate(placement::make(2, 3, 4, {0, 1, 2, 0, 0, 1, 1, -1}), t),
                    contains("got expert 2 nowhere in layer 1"));
  const placement doubled = placement::make(1, 3, 4, {0, 1, 2, 2});
  CHECK_THROWS_WITH(validate(doubled, t), contains("got expert 2 twice on GPU 1 in layer 0"));
  CHECK(try_validate(doubled, t, {.one_copy_per_gpu = false}).has_value());
}

TEST_CASE("index tensors map both ways") {
  const placement p = placement::make(2, 3, 4, {0, 1, 2, 0, 2, -1, 1, 0});
  const index_tensors maps = to_index_tensors(p);
  CHECK(maps.max_copies == 2);
  CHECK(maps.physical_to_logical == std::vector<std::int64_t>{0, 1, 2, 0, 2, -1, 1, 0});
  CHECK(maps.logical_to_physical == std::vector<std::int64_t>{0, 3, 1, -1, 2, -1, 3, -1, 2, -1, 0, -1});
  CHECK(maps.count == std::vector<std::int64_t>{2, 1, 1, 1, 1, 1});

  generator g(tetromino_test::seed());
  for (int i = 0; i < 1000; ++i) {
    const placement q = random_placement(g);
    REQUIRE(to_placement(to_index_tensors(q)) == q);
  }
  index_tensors hostile = maps;
  hostile.physical_to_logical[3] = std::int64_t{1} << 40;
  CHECK(code_of(try_to_placement(hostile)) == errc::invalid_argument);
  hostile.physical_to_logical[3] = 3;
  CHECK(code_of(try_to_placement(hostile)) == errc::invalid_argument);
  hostile.physical_to_logical.pop_back();
  CHECK_FALSE(try_to_placement(hostile).has_value());
}

TEST_CASE("text and JSON forms round-trip") {
  const placement p = placement::make(2, 3, 4, {0, 1, 2, 0, 2, -1, 1, 0});
  CHECK(to_text(p) == "placement layers 2 experts 3 slots 4\n0 1 2 0\n2 -1 1 0\n");
  CHECK(to_json(p) == "{\"experts\":3,\"layers\":2,\"slot_to_expert\":[[0,1,2,0],[2,-1,1,0]],\"slots\":4}");
  generator g(tetromino_test::seed());
  for (int i = 0; i < 1000; ++i) {
    const placement q = random_placement(g);
    REQUIRE(placement_from_text(to_text(q)) == q);
    REQUIRE(placement_from_json(to_json(q)) == q);
  }
}

TEST_CASE("broken texts are errors that name the line") {
  CHECK_THROWS_WITH(placement_from_text(""), contains("line 1"));
  CHECK_THROWS_WITH(placement_from_text("placement layers x experts 3 slots 4"), contains("line 1"));
  CHECK_THROWS_WITH(placement_from_text("placement layers 2 experts 3 slots 2\n0 1\n2 z\n"), contains("line 3"));
  CHECK_THROWS_WITH(placement_from_text("placement layers 1 experts 3 slots 2\n0 1\n\n2"), contains("line 4"));
  CHECK_THROWS_WITH(placement_from_text("placement layers 1 experts 3 slots 2\n0 3"), contains("slot 1"));
  CHECK_THROWS_WITH(placement_from_text("placement layers 1 experts 3 slots 2\n0 99999999999"), contains("line 2"));
  CHECK(code_of(try_placement_from_text("placement layers 9999999999999 experts 3 slots 99999999999\n0")) ==
        errc::malformed_file);
  CHECK(code_of(try_placement_from_text("placement layers 1 experts 3 slots 0\n")) == errc::malformed_file);
  CHECK(code_of(try_placement_from_text("placement layers -1 experts 3 slots 1\n0")) == errc::malformed_file);
}

TEST_CASE("broken JSON is an error") {
  for (const std::string text : {"", "[]", "{", "{}", R"({"layers":1,"experts":2,"slots":2})",
                                 R"({"layers":1,"experts":2,"slots":2,"slot_to_expert":[[0]]})",
                                 R"({"layers":2,"experts":2,"slots":2,"slot_to_expert":[[0,1]]})",
                                 R"({"layers":1,"experts":2,"slots":2,"slot_to_expert":[[0,2]]})",
                                 R"({"layers":1,"experts":2,"slots":2,"slot_to_expert":[[0,"1"]]})",
                                 R"({"layers":1,"experts":2,"slots":2,"slot_to_expert":[[0,1.5]]})",
                                 R"({"layers":1,"experts":2,"slots":2,"slot_to_expert":[[0,18446744073709551615]]})",
                                 R"({"layers":-1,"experts":2,"slots":2,"slot_to_expert":[[0,1]]})",
                                 R"({"layers":1e300,"experts":2,"slots":2,"slot_to_expert":[[0,1]]})",
                                 R"({"layers":1,"experts":2,"slots":2,"slot_to_expert":7})",
                                 R"({"layers":18446744073709551615,"experts":2,"slots":2,"slot_to_expert":[]})"}) {
    CAPTURE(text);
    CHECK_FALSE(try_placement_from_json(text).has_value());
  }
  // lists in lists, deeper than a stack
  const std::string deep = std::string(1'000'000, '[') + std::string(1'000'000, ']');
  CHECK_THROWS_WITH(placement_from_json(R"({"layers":1,"experts":2,"slots":1,"slot_to_expert":[[)" + deep + "]]}"),
                    contains("levels"));
}

TEST_CASE("plans of engines round-trip, without empty slots") {
  const topology t = topology::make(std::vector<std::size_t>{1, 2}, std::vector<std::size_t>{2, 1, 2});
  const placement p = placement::make(2, 3, 5, {0, 1, 2, 0, 2, 2, 1, 1, 0, 1});
  CHECK(to_plan(p, t, plan_format::physical_to_logical_json) ==
        R"({"physical_to_logical_map":[[0,1,2,0,2],[2,1,1,0,1]]})");
  CHECK(to_plan(p, t, plan_format::tensorrt_llm_yaml, {{3, 5}, 1}) ==
        "num_slots: 5\ninitial_global_assignments:\n  3: [0, 1, 2, 0, 2]\n  5: [2, 1, 1, 0, 1]\n"
        "layer_updates_per_iter: 1\n");
  // a row for each layer of the model, the dense ones as SGLang fills them
  CHECK(to_plan(p, t, plan_format::physical_to_logical_json, {{1, 3}}) ==
        R"({"physical_to_logical_map":[[0,1,2,0,1],[0,1,2,0,2],[0,1,2,0,1],[2,1,1,0,1]]})");
  CHECK(to_plan(p, t, plan_format::physical_to_logical_json, {.layers = {1, 2}, .model_layers = 5}) ==
        R"({"physical_to_logical_map":[[0,1,2,0,1],[0,1,2,0,2],[2,1,1,0,1],[0,1,2,0,1],[0,1,2,0,1]]})");
  for (const std::size_t wrong : {std::size_t{2}, std::size_t{65'537}}) {
    CHECK_FALSE(try_to_plan(p, t, plan_format::physical_to_logical_json, {.layers = {1, 2}, .model_layers = wrong}));
  }
  CHECK(to_plan(p, t, plan_format::vllm_ascend_json, {{1, 3}}) == to_plan(p, t, plan_format::vllm_ascend_json));
  for (const auto& wrong : {std::vector<std::uint32_t>{3}, {3, 3}, {4, 3}, {3, 65'536}}) {
    CHECK(code_of(try_to_plan(p, t, plan_format::tensorrt_llm_yaml, {wrong})) == errc::invalid_argument);
  }
  CHECK_THAT(to_plan(p, t, plan_format::vllm_ascend_json),
             contains(R"({"device_count":3,"device_list":[{"device_expert":[0,1],"device_id":0},)"));
  generator g(tetromino_test::seed());
  for (int i = 0; i < 300; ++i) {
    const placement q = random_placement(g);
    const topology flat = topology::uniform(1, q.slots(), 1);
    if (try_fill_empty_slots(q, flat)) {
      const placement filled = fill_empty_slots(q, flat);
      for (std::size_t s = 0; s < q.slot_to_expert().size(); ++s) {
        REQUIRE((filled.slot_to_expert()[s] != empty_slot &&
                 (q.slot_to_expert()[s] == empty_slot || q.slot_to_expert()[s] == filled.slot_to_expert()[s])));
      }
      for (const plan_format f :
           {plan_format::physical_to_logical_json, plan_format::tensorrt_llm_yaml, plan_format::vllm_ascend_json}) {
        REQUIRE(read_plan(to_plan(filled, flat, f), q.experts()).experts == filled);
      }
    }
    REQUIRE(read_plan(to_json(q)).experts == q);
    REQUIRE(read_plan(to_text(q)).experts == q);
  }
  // what other writers of YAML make of it
  CHECK(read_plan("num_slots: 2\ninitial_global_assignments:\n  0:\n  - 1\n  - 0\n  1:\n  - 0\n  - 1 # so\nx: 3\n")
            .experts == placement::make(2, 2, 2, {1, 0, 0, 1}));
  CHECK(read_plan("initial_global_assignments: {\"0\": [1,\n 0], \"1\": [0, 1]}\n").experts ==
        placement::make(2, 2, 2, {1, 0, 0, 1}));
}

TEST_CASE("plans say which layers of the model they are for") {
  const auto numbers = [](std::string_view written) { return read_plan(written).layers; };
  CHECK(numbers("initial_global_assignments:\n  3: [0, 1]\n  5: [1, 0]\n") == std::vector<std::uint32_t>{3, 5});
  CHECK(numbers(R"({"physical_to_logical_map":[[0,1],[1,0]]})") == std::vector<std::uint32_t>{0, 1});
  CHECK(numbers(R"({"layer_list":[{"device_list":[{"device_expert":[0,1]}]}]})").empty());
  CHECK(numbers(to_json(placement::make(1, 2, 2, {0, 1}))).empty());
}

TEST_CASE("lists of vllm-ascend are in the order of their ids, or an error") {
  const auto layer = [](int id, const std::string& devices) {
    return R"({"layer_id":)" + std::to_string(id) + R"(,"device_list":[)" + devices + "]}";
  };
  const auto device = [](const std::string& id, const std::string& experts) {
    return R"({"device_id":)" + id + R"(,"device_expert":[)" + experts + "]}";
  };
  const auto read = [](const std::string& layers) { return try_read_plan(R"({"layer_list":[)" + layers + "]}"); };
  const std::string two = device("0", "3,2") + "," + device("1", "1,0");
  CHECK(read(layer(0, two) + "," + layer(1, two))->experts == placement::make(2, 4, 4, {3, 2, 1, 0, 3, 2, 1, 0}));
  for (const std::string& wrong :
       {layer(1, two) + "," + layer(0, two), layer(0, two) + "," + layer(0, two), layer(0, two) + "," + layer(2, two),
        layer(0, device("1", "3,2") + "," + device("0", "1,0")),
        layer(0, device("0", "3,2") + "," + device("0", "1,0")),
        layer(0, device("0", "3,2") + "," + device("2", "1,0")), layer(0, device("\"0\"", "3,2"))}) {
    CAPTURE(wrong);
    REQUIRE_FALSE(read(wrong).has_value());
    CHECK_THAT(std::string(read(wrong).error().what()), tetromino_test::contains("in the order of their numbers"));
  }
}

TEST_CASE("slots are filled with the rarest expert that the GPU lacks") {
  const topology t = topology::uniform(1, 2, 3);
  CHECK(fill_empty_slots(placement::make(1, 4, 6, {0, -1, -1, 1, 2, 3}), t) ==
        placement::make(1, 4, 6, {0, 1, 2, 1, 2, 3}));
  CHECK(fill_empty_slots(placement::make(1, 4, 9, {0, -1, -1, 1, 2, 3, 1, 2, -1}), topology::uniform(1, 3, 3)) ==
        placement::make(1, 4, 9, {0, 3, 1, 1, 2, 3, 1, 2, 0}));
  CHECK(code_of(try_fill_empty_slots(placement(1, 2, 6), t)) == errc::infeasible);
  CHECK(code_of(try_fill_empty_slots(placement(1, 2, 5), t)) == errc::shape_mismatch);
  CHECK(code_of(try_to_plan(placement(1, 2, 6), t, plan_format::tensorrt_llm_yaml)) == errc::invalid_argument);
  CHECK(code_of(try_to_plan(placement(1, 2, 5), t, plan_format::tensorrt_llm_yaml)) == errc::shape_mismatch);
}

TEST_CASE("broken plans are errors") {
  for (const std::string text : {"",
                                 "{",
                                 "{}",
                                 "placement",
                                 R"({"physical_to_logical_map":7})",
                                 R"({"physical_to_logical_map":[[0],[0,1]]})",
                                 R"({"physical_to_logical_map":[[0.5]]})",
                                 R"({"physical_to_logical_map":[[-2]]})",
                                 R"({"layer_list":[{"device_list":[{"device_expert":3}]}]})",
                                 R"({"layer_list":[3]})",
                                 R"({"moe_layer_count":2,"layer_list":[{"device_list":[{"device_expert":[0]}]}]})",
                                 R"({"layer_list":[{"device_count":2,"device_list":[{"device_expert":[0]}]}]})",
                                 "num_slots: 3\ninitial_global_assignments:\n  0: [1, 0]\n",
                                 "initial_global_assignments:\n  0: [1, 0]\nnum_slots: 3\n",
                                 "initial_global_assignments:\n",
                                 "initial_global_assignments:\n  0: [1, x]\n",
                                 "initial_global_assignments:\n  0: [1]\n  0: [1]\n",
                                 "initial_global_assignments:\n  65536: [1]\n",
                                 "initial_global_assignments:\n  0: [1]\n  1: [1, 0]\n",
                                 "initial_global_assignments: [1]\n",
                                 "initial_global_assignments:\n  0: [99999999999999999999]\n"}) {
    CAPTURE(text);
    CHECK_FALSE(try_read_plan(text).has_value());
  }
  const auto said = [](std::string_view text) { return std::string(try_read_plan(text).error().what()); };
  CHECK_THAT(said("plans/of_today.json"), tetromino_test::contains("starts with \"plans/of_today.json\""));
  CHECK_THAT(said(" \n"), tetromino_test::contains("got an empty text"));
  CHECK_THAT(said("{\"experts\":\n 3}"), tetromino_test::contains("starts with \"{\"experts\":\""));
  CHECK(said(std::string(5000, 'x')).size() < 400);
}
