#pragma once

/// What place_experts was asked for, and the clusters that follow from it.

#include "../command_line.hpp"
#include "../ui.hpp"
#include "place_study.hpp"

#include <tetromino/error.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace place_experts {

using namespace study;

struct settings {
  std::string trace_path, judge_path, report_path, plan_path, start_path, format = "json";
  trace_read_options reading;
  std::size_t first_layer = 0, layer_step = 1, model_layers = 0;  // 0: the last one has experts
  std::vector<std::uint32_t> layers;                              // of TRACE: their numbers in the model
  std::vector<std::string> for_requests;                          // options given that loads alone have no use for
  std::size_t nodes = 8, gpus_per_node = 8, nodes_per_rack = 0;   // 0: no racks
  double rack_cost = 3;
  std::vector<std::size_t> slots_per_node;
  std::size_t splits = 5;
  std::uint64_t seed = 1;
  double limit = 1.01;
  unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  double expert_megabytes = 44;  // DeepSeek-V3 in FP8: 3 × 7168 × 2048
  ui::output_options print;
  std::string command;  // as it was called
};

inline constexpr std::size_t most_nodes = 256;  // of local and node_affinity

/// The cluster with so many slots on each node.
inline tetromino::result<topology> try_cluster(const settings& s, std::size_t slots) {
  auto t = topology::try_with_node_slots(s.nodes, s.gpus_per_node, slots);
  return t && s.nodes_per_rack > 0 ? t->try_with_racks(s.nodes_per_rack, s.rack_cost) : t;
}
inline topology cluster(const settings& s, std::size_t slots) { return try_cluster(s, slots).value(); }

/// The cluster with each number of slots. What `experts` and the options make impossible is found here, before any
/// work.
inline std::vector<topology> clusters_for(const settings& s, std::size_t experts) {
  std::vector<topology> out;
  for (const std::size_t slots : s.slots_per_node) {
    auto t = try_cluster(s, slots);
    if (!t) throw ui::usage_error(t.error().what());
    if (t->slots() < experts) {
      throw ui::usage_error(fmt::format("--slots {}: expected a slot for each of {} experts, got {} on {} nodes", slots,
                                        experts, t->slots(), s.nodes));
    }
    out.push_back(std::move(*t));
  }
  if (const std::size_t most = out.front().slots_on_gpu(0); s.format != "json" && most > experts) {
    throw ui::usage_error(
        fmt::format("--slots {}: expected at most {} slots per GPU, one for each expert, as {} knows no "
                    "empty ones, got {}",
                    s.slots_per_node.front(), experts, s.format, most));
  }
  return out;
}

}  // namespace place_experts
