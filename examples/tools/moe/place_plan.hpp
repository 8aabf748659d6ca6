#pragma once

/// The plan that is written, and the way to it from the one in force.

#include "../output_file.hpp"
#include "../ui.hpp"
#include "place_settings.hpp"
#include "place_study.hpp"
#include "place_voice.hpp"

#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/placement_io.hpp>
#include <tetromino/moe/trace_io.hpp>
#include <tetromino/thread_executor.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <variant>
#include <vector>

namespace place_experts {

/// The rows of a plan for the layers that TRACE has, by their numbers in the model where the plan has such.
inline placement for_layers(const settings& s, const placement& p, const std::vector<std::uint32_t>& numbers) {
  if (numbers.empty() && p.layers() == s.layers.size()) return p;
  if (numbers.empty()) {
    throw std::runtime_error(
        fmt::format("{}: expected a plan of {} layers, got {}", s.start_path, s.layers.size(), p.layers()));
  }
  placement out(s.layers.size(), p.experts(), p.slots());
  for (std::size_t l = 0; l < s.layers.size(); ++l) {
    const auto found = std::lower_bound(numbers.begin(), numbers.end(), s.layers[l]);
    if (found == numbers.end() || *found != s.layers[l]) {
      throw std::runtime_error(fmt::format(
          "{}: expected a plan for layer {} of the model, found none (--first-layer says where the layers of {} begin)",
          s.start_path, s.layers[l], s.trace_path));
    }
    const auto row = p.layer(static_cast<std::size_t>(found - numbers.begin()));
    std::copy(row.begin(), row.end(), out.layer(l).begin());
  }
  return out;
}

/// The plan given as --start, if there is one.
inline std::optional<placement> plan_in_force(const settings& s, const routing_shape& shape, const topology& t) {
  if (s.start_path.empty()) return std::nullopt;
  const routing_file file = read_routing(s.start_path, {shape.experts});
  const placement* const p = std::get_if<placement>(&file.content);
  if (p == nullptr) throw std::runtime_error(fmt::format("{}: expected a plan, got {}", s.start_path, file.format));
  placement start = for_layers(s, *p, file.layers);
  validate(start, t, {.one_copy_per_gpu = false});
  return start;
}

inline void write_plan(const settings& s, const placement& p, const topology& t) {
  if (s.plan_path.empty()) return;
  const auto engine = [&](plan_format f) {
    return to_plan(fill_empty_slots(p, t), t, f, {.layers = s.layers, .model_layers = s.model_layers});
  };
  ui::write_file(s.plan_path, (s.format == "sglang"         ? engine(plan_format::physical_to_logical_json)
                               : s.format == "tensorrt-llm" ? engine(plan_format::tensorrt_llm_yaml)
                               : s.format == "vllm-ascend"  ? engine(plan_format::vllm_ascend_json)
                                                            : to_json(p)) +
                                  "\n");
}

/// The plan to serve with, made from all requests, and the way there from what engines start with.
inline void hand_over(const settings& s, const half& everything, const std::optional<placement>& start,
                      const topology& t, voice& out) {
  const trace_view view = everything.view();
  const placement now = start ? *start : contiguous(view.shape.layers, view.shape.experts, t);
  const tetromino::thread_executor threads(s.threads);
  local_options options;
  options.executor = threads;
  options.seed = s.seed;
  options.node_imbalance = s.limit;
  options.start = start ? &now : nullptr;
  const placement next = align(now, local(view, t, options).experts, t);
  const migration way = migrate(now, next, t, s.expert_megabytes * 1e6);
  std::size_t rounds = 0, buffers = 0;
  for (const layer_migration& layer : way.layers) {
    rounds += layer.rounds.size();
    buffers = std::max(buffers, layer.buffers_per_gpu);
  }
  out.section("The plan, made from all requests",
              fmt::format("From {}: {} experts of {} MB move ({} between nodes) in {} rounds, in which a GPU "
                          "talks to one peer at a time; {:.2f} s of transfer, layer by layer while tokens are served, "
                          "with buffers for {} experts per GPU.",
                          start ? "the plan in force" : "contiguous", way.moves, s.expert_megabytes,
                          ui::bytes(static_cast<std::size_t>(way.bytes_between_nodes)), rounds, way.seconds, buffers));
  out.found["migration"] = {{"from", start ? "start" : "contiguous"},
                            {"experts_moved", way.moves},
                            {"bytes_between_nodes", way.bytes_between_nodes},
                            {"bytes_inside_nodes", way.bytes_inside_nodes},
                            {"rounds", rounds},
                            {"seconds", way.seconds},
                            {"buffers_per_gpu", buffers}};
  write_plan(s, next, t);
}

}  // namespace place_experts
