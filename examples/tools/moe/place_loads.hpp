#pragma once

/// Experts placed where all that is known is how often each is used.

#include "../ui.hpp"
#include "place_plan.hpp"
#include "place_settings.hpp"
#include "place_study.hpp"
#include "place_voice.hpp"

#include <tetromino/moe/trace_io.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <variant>
#include <vector>

namespace place_experts {

/// Loads alone: how uneven they are, and what balancing makes of them.
inline int place_loads(settings s, const routing_file& file, voice& out) {
  const load_table& loads = std::get<load_table>(file.content);
  if (s.slots_per_node.size() > 1) s.for_requests.emplace_back("a second number of --slots");
  if (!s.for_requests.empty()) {
    throw ui::usage_error(fmt::format("{}: expected a trace of requests for {}, found {}", s.trace_path,
                                      s.for_requests.front(), file.format));
  }
  if (s.slots_per_node.empty()) s.slots_per_node = {(loads.experts + s.nodes - 1) / s.nodes};
  const std::size_t slots = s.slots_per_node.front();
  const topology t = clusters_for(s, loads.experts).front();
  const auto start = plan_in_force(s, {loads.layers, loads.experts, 1}, t);
  const placement p = balanced(loads.view(), t);
  out.section("Experts balanced",
              fmt::format("{}: {} layers × {} experts, without requests; {} nodes of {} GPUs, {} slots "
                          "per node. Busiest / mean, mean over layers.",
                          file.format, loads.layers, loads.experts, s.nodes, s.gpus_per_node, slots));
  const auto on_gpus = [&](const placement& plan) {
    const replica_index where(plan);
    double sum = 0;
    for (std::size_t l = 0; l < loads.layers; ++l) {
      std::vector<double> gpu(t.gpus(), 0.0);
      for (std::size_t e = 0; e < loads.experts; ++e) {
        const auto copies = where.slots_of(l, e);
        for (const std::uint32_t slot : copies) {
          gpu[t.gpu_of_slot(slot)] += loads.view().layer(l)[e] / static_cast<double>(copies.size());
        }
      }
      const double all = std::accumulate(gpu.begin(), gpu.end(), 0.0);
      sum += all > 0 ? *std::max_element(gpu.begin(), gpu.end()) * static_cast<double>(t.gpus_with_slots()) / all : 1;
    }
    return sum / static_cast<double>(loads.layers);
  };
  out.found["loads"] = {
      {"layers", loads.layers}, {"experts", loads.experts}, {"busiest_expert", imbalance(loads.view()).mean}};
  rows r = {{"plan", "GPU imbalance"}, {"experts", number(imbalance(loads.view()).mean, 2)}};
  const auto add = [&](const char* name, const placement& plan, bool is_best) {
    const double on_gpu = on_gpus(plan);
    r.push_back({name, number(on_gpu, 2)});
    out.found["plans"].push_back(
        {{"name", name}, {"slots_per_node", slots}, {"best", is_best}, {"gpu_imbalance", on_gpu}});
    return on_gpu;
  };
  const double was = add("contiguous", contiguous(loads.layers, loads.experts, t), false);
  if (start) add("the plan in force", *start, false);
  const double is = add("balanced", p, true);
  out.table(r, r.size() - 1);
  out.summary(
      fmt::format("The busiest GPU of a layer has {:.2f} times the mean instead of {:.2f} (contiguous).", is, was));
  write_plan(s, p, t);
  out.end(s.plan_path);
  return 0;
}

}  // namespace place_experts
