// Where to put a layer's experts, from ids that the engine has in memory.
#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/place.hpp>

#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  namespace moe = tetromino::moe;
  const moe::routing_shape shape{.layers = 2, .experts = 16, .experts_per_token = 2};
  std::vector<std::uint16_t> ids;  // [tokens, layers, experts per token], best first
  std::vector<moe::request> requests;
  for (std::uint32_t r = 0; r < 60; ++r) {  // three kinds of requests, each with favourites among the experts
    requests.push_back({.first_token = 20 * r, .tokens = 20, .prefill_length = 8, .domain = r % 3});
    for (std::uint32_t t = 0; t < 20; ++t) {
      for (std::uint32_t layer = 0; layer < 2; ++layer) {
        const std::uint32_t first = r % 3 * 5 + (t * 7 + layer) % 4;
        ids.push_back(std::uint16_t(first % 16));
        ids.push_back(std::uint16_t((first + 1 + t % 3) % 16));
      }
    }
  }
  const moe::trace recorded = moe::trace::make(shape, ids, requests);
  const auto cluster = moe::topology::uniform(2, 2, 5);  // 2 nodes of 2 GPUs, 5 slots each: 4 to spare

  // What DeepSeek EPLB would do with the same loads: its index tensors.
  std::vector<std::int64_t> counts(shape.layers * shape.experts);  // or float, double, any integer
  for (std::size_t i = 0; i < ids.size(); ++i) counts[i / 2 % 2 * shape.experts + ids[i]] += 1;
  const moe::index_tensors eplb =
      moe::balanced_eplb(moe::to_loads(2, 16, counts), {.replicas = 20, .groups = 4, .nodes = 2, .gpus = 4});
  std::printf("phy2log %zu, log2phy %zu, logcnt %zu numbers\n", eplb.physical_to_logical.size(),  // [layers, slots]
              eplb.logical_to_physical.size(), eplb.count.size());  // [layers, experts, max_copies], [layers, experts]

  // A phy2log of anybody's makes a placement. (From what a file holds: read_plan(text, 16).experts, placement_io.hpp.)
  const auto theirs = moe::placement::make(shape.layers, shape.experts, cluster.slots(), eplb.physical_to_logical);

  // A plan that also looks at who meets whom, and says where each request is served best.
  const moe::local_plan plan = moe::local(recorded.view(), cluster);

  // What serving the recorded tokens costs under either: of decode tokens, those behind prefill_length.
  std::vector<std::uint32_t> in_turn(requests.size());
  for (std::uint32_t r = 0; r < in_turn.size(); ++r) in_turn[r] = r % 2;
  const auto before = moe::evaluate(recorded.view(), theirs, cluster, in_turn);
  const auto after = moe::evaluate(recorded.view(), plan.experts, cluster, plan.source_of_request);
  std::printf("other nodes per token and layer: eplb %.3f, local %.3f\n", before.nodes_per_token(),
              after.nodes_per_token());
  std::printf("load of the busiest node over the mean, mean over layers: eplb %.2f, local %.2f\n",
              before.node_imbalance, after.node_imbalance);
}
