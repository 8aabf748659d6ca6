// The way to a better placement, within a budget of bytes at a time, while tokens are served.
#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/place.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

int main() {
  namespace moe = tetromino::moe;
  const std::size_t layers = 4, experts = 16;
  const auto cluster = moe::topology::uniform(2, 2, 5);  // nodes, GPUs, slots
  std::vector<double> loads(layers * experts);
  for (std::size_t i = 0; i < loads.size(); ++i) loads[i] = double(1 + i * i % 7);
  moe::placement current = moe::contiguous(layers, experts, cluster);
  // Aligned: what stays on a GPU stays in its slot, since moves between slots of one GPU are not listed.
  const auto next = moe::align(current, moe::balanced({layers, experts, loads}, cluster), cluster);

  // The engine's weights, [layers, slots]; here each is the number of its expert.
  std::vector<std::int32_t> weights(current.slot_to_expert().begin(), current.slot_to_expert().end());
  moe::migration_budget budget{.bytes_between_nodes = 40e6};
  while (current != next) {
    const moe::partial_migration part = moe::migrate_within(current, next, cluster, 44e6, budget);
    for (const moe::layer_migration& layer : part.way.layers) {
      const auto old = current.layer(layer.layer);
      const auto own = weights.begin() + std::ptrdiff_t(layer.layer * cluster.slots());
      std::vector<std::pair<std::uint32_t, std::int32_t>> arrived;  // staged: at most buffers_per_gpu on each GPU
      for (const moe::migration_round& round : layer.rounds) {      // one after the other
        for (const moe::expert_move& m : round.moves) {             // at the same time, from m.from_gpu to m.to_gpu
          const auto on_gpu = old.begin() + std::ptrdiff_t(cluster.first_slot(m.from_gpu));
          const auto from = std::find(on_gpu, old.end(), std::int32_t(m.expert)) - old.begin();
          arrived.emplace_back(m.to_slot, own[from]);  // the old placement's weights, which are served still
        }
      }
      for (const auto& [slot, of_expert] : arrived) own[slot] = of_expert;  // the last round is in: the layer switches
    }
    std::printf("%zu layers moved, %.0f MB between nodes, %.1f ms; %zu left\n", part.way.layers.size(),
                part.way.bytes_between_nodes / 1e6, 1e3 * part.way.seconds, part.layers_left.size());
    current = part.reached;  // each layer as it was or as it shall be: a placement to serve under
    if (part.way.layers.empty()) budget = part.least_left;  // too little for any layer: raised for good
  }
  return std::equal(weights.begin(), weights.end(), next.slot_to_expert().begin()) ? 0 : 1;
}
