/// Decides where the experts of a mixture-of-experts model live on a cluster, and which node serves which request, from
/// recorded routing:
///   place_experts TRACE --nodes 8 --gpus 8 --slots 16 --report report.html
///   place_experts TRACE --judge OTHER_TRACE --plan placement.json
///   place_experts LOADS --plan location.json --format sglang
/// Plans are made from a part of the requests and judged on the decode tokens of others, which are assigned to nodes by
/// their prefill alone. From loads alone (counts per expert, as engines log them), experts are balanced.

#include <tetromino/moe/trace_io.hpp>

#include "command_line.hpp"
#include "moe/place_comparison.hpp"
#include "moe/place_loads.hpp"
#include "moe/place_plan.hpp"
#include "moe/place_settings.hpp"
#include "moe/place_study.hpp"
#include "moe/place_voice.hpp"
#include "output_file.hpp"
#include "ui.hpp"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace {

using namespace place_experts;

/// Plans must be made from some decode tokens, for which a file may be too small.
void check_splits(const settings& s, const std::vector<split>& splits) {
  for (const split& part : splits) {
    if (part.calibration.view().tokens(phase::decode) > 0) continue;
    const trace& all = *part.calibration.from;
    throw std::runtime_error(
        all.view().tokens(phase::decode) == 0
            ? fmt::format("{}: expected decode tokens, for which plans are made, found none", s.trace_path)
            : fmt::format(
                  "{}: expected decode tokens in the random half that a plan is made from, found none: give more "
                  "requests than {}, another --seed, or a trace to --judge on, so that all of this one plans",
                  s.trace_path, all.requests().size()));
  }
}

int place_all(settings s) {
  ui::check_outputs({{"--plan", s.plan_path}, {"--report", s.report_path}},
                    {{"TRACE", s.trace_path}, {"--judge", s.judge_path}, {"--start", s.start_path}});
  routing_file file = read_routing(s.trace_path, s.reading);
  voice out(s);
  out.found["format"] = file.format;
  out.found["cluster"] = {{"nodes", s.nodes}, {"gpus_per_node", s.gpus_per_node}};
  if (s.nodes_per_rack > 0) {
    out.found["cluster"]["nodes_per_rack"] = s.nodes_per_rack;
    out.found["cluster"]["rack_cost"] = s.rack_cost;
  }
  out.line(fmt::format("{}: {}", ui::printable(s.trace_path), file.format));
  const auto in_model = [&](std::vector<std::uint32_t> layers) {
    for (std::uint32_t& number : layers) {
      number = static_cast<std::uint32_t>(s.first_layer + number * s.layer_step);
    }
    return layers;
  };
  s.layers = in_model(file.layers);
  if (s.model_layers > 0 && !s.layers.empty() && s.layers.back() >= s.model_layers) {
    throw ui::usage_error(fmt::format("--model-layers: expected more than {}, a layer of {}, got {}", s.layers.back(),
                                      s.trace_path, s.model_layers));
  }
  if (std::holds_alternative<load_table>(file.content)) return place_loads(s, file, out);
  if (std::holds_alternative<placement>(file.content)) {
    throw std::runtime_error(fmt::format("{}: expected routing, got a plan: give it as --start", s.trace_path));
  }
  const trace recorded = std::get<trace>(std::move(file.content));
  if (s.nodes > most_nodes) {
    throw ui::usage_error(fmt::format("--nodes: expected at most {} for requests, got {}", most_nodes, s.nodes));
  }
  std::optional<trace> other;
  if (!s.judge_path.empty()) {
    trace_read_options reading = s.reading;
    reading.experts = recorded.shape().experts;
    routing_file judged = read_routing(s.judge_path, reading);
    if (!std::holds_alternative<trace>(judged.content)) {
      throw std::runtime_error(fmt::format("{}: expected requests, found {}", s.judge_path, judged.format));
    }
    other = std::get<trace>(std::move(judged.content));
    if (other->tokens() > 0 && in_model(judged.layers) != s.layers) {
      throw std::runtime_error(fmt::format("{}: expected the layers of {}, found others", s.judge_path, s.trace_path));
    }
  }
  if (s.slots_per_node.empty()) {  // just enough, an eighth more, and half more
    const std::size_t enough = (recorded.shape().experts + s.nodes - 1) / s.nodes;
    s.slots_per_node = {enough, enough + (enough + 7) / 8, enough + (enough + 1) / 2};
  }
  const topology t = clusters_for(s, recorded.shape().experts).front();

  const auto all_of = [](const trace& from) { return half{&from, {from.requests().begin(), from.requests().end()}}; };
  const std::vector<split> splits =
      other ? std::vector<split>{{all_of(recorded), all_of(*other)}} : random_halves(recorded, s.splits, s.seed);
  check_splits(s, splits);
  const std::optional<placement> start = plan_in_force(s, recorded.shape(), t);
  describe(s, recorded, out);
  out.section(
      "Plans compared",
      fmt::format("{} nodes of {} GPUs. {}; requests are assigned by their prefill. "
                  "Remote pairs: (token, expert) pairs served on another node. nodes/token: other nodes that a "
                  "token is sent to, per layer. {}Imbalance: busiest / mean, mean over layers.",
                  s.nodes, s.gpus_per_node,
                  other ? std::string("Planned on one trace and judged on the decode tokens of the other")
                        : fmt::format("Planned on half of the requests and judged on the decode tokens of the other{}",
                                      splits.size() == 1 ? "" : fmt::format(", {} times", splits.size())),
                  s.nodes_per_rack == 0 ? ""
                                        : fmt::format("cost/token: the same, those in other racks of {} nodes counted "
                                                      "{} times. ",
                                                      s.nodes_per_rack, s.rack_cost)));
  const std::vector<measured> all = compare(s, splits, out);
  const auto best = std::find_if(all.begin(), all.end(), [](const measured& m) { return m.name == nodes_plan; });
  if (all.front().first.tokens > 0) draw(all.front().first, best->first, t, out);
  const std::vector<split> few(splits.begin(),
                               splits.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(2, splits.size())));
  trade(s, few, all, out);
  if (!other) drift(s, recorded, few, out);
  hand_over(s, all_of(recorded), start, t, out);
  out.end(s.plan_path);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  settings s;
  ui::command_line app(
      "place_experts",
      "Places experts on nodes and GPUs, and requests on nodes, so that tokens stay close to their experts.",
      {"TRACE --nodes 8 --gpus 8 --slots 16,18,24 --report report.html", "TRACE --judge OTHER --plan plan.json",
       "LOADS --start plan.json --plan location.json --format sglang"});
  app.add_file("TRACE", s.trace_path, "recorded routing or loads, as engines write them").required();
  const auto judge = app.add_file("--judge", s.judge_path, "judge on this trace, instead of on a part of TRACE");
  app.add_option("--nodes", s.nodes, "nodes").within(1u, 65535u).shows_default();
  app.add_option("--gpus", s.gpus_per_node, "GPUs per node").within(1u, 65535u).shows_default();
  const auto rack =
      app.add_option("--rack", s.nodes_per_rack, "nodes per rack, where racks are far apart").within(1u, 65535u);
  const auto rack_cost = app.add_option("--rack-cost", s.rack_cost, "what a byte between racks costs, over inside one")
                             .within(0.001, 1000.0)
                             .shows_default()
                             .needs(rack);
  app.add_option("--slots", s.slots_per_node, "expert slots per node and layer; several: 16,18,24")
      .split_at(',')
      .within(1u, 1u << 24);
  const auto limit =
      app.add_option("--limit", s.limit, "most load of a node, over the mean").within(1.0, 1e6).shows_default();
  const auto splits = app.add_option("--splits", s.splits, "random halves to plan and judge on")
                          .within(1u, 1000000u)
                          .shows_default()
                          .excludes(judge);
  const auto seed = app.add_option("--seed", s.seed, "seed of the halves and of the solver").shows_default();
  const auto size =
      app.add_option("--expert-mb", s.expert_megabytes, "size of an expert in one layer, for the migration")
          .within(0.0, 1e9)
          .shows_default();
  app.add_threads(s.threads);
  app.add_file("--start", s.start_path, "the plan in force, in any format: the last plan starts from it");
  const auto plan = app.add_file("--plan", s.plan_path, "write the placement made from all of TRACE here");
  app.add_option("--format", s.format, "as what: json, sglang, tensorrt-llm or vllm-ascend")
      .one_of({"json", "sglang", "tensorrt-llm", "vllm-ascend"})
      .shows_default()
      .needs(plan);
  app.add_option("--layers", s.reading.layers, "layers, where TRACE is bare ids (SGLang)");
  app.add_option("--first-layer", s.first_layer,
                 "number in the model of TRACE's layer 0, where it leaves out dense ones")
      .within(0u, 1000u)
      .shows_default();
  app.add_option("--layer-step", s.layer_step,
                 "which layers of the model TRACE's are, where it leaves out dense ones "
                 "between: 2 is every second")
      .within(1u, 1000u)
      .shows_default();
  app.add_option("--model-layers", s.model_layers, "layers of the model, where the last are dense (sglang)")
      .within(1u, 65536u)
      .needs(plan);
  app.add_option("--top-k", s.reading.experts_per_token, "experts per token, likewise");
  app.add_file("--report", s.report_path, "write a page with pictures here (HTML)");
  app.add_output(s.print);
  if (const auto leave = app.read(argc, argv)) return leave();
  for (const ui::option& given : {judge, limit, splits, seed, size, rack, rack_cost}) {
    if (given.is_given()) s.for_requests.push_back(given.name());
  }
  for (int i = 0; i < argc; ++i) {
    s.command += (i == 0 ? "" : " ") + (i == 0 ? std::string("place_experts") : std::string(argv[i]));
  }
  return ui::run("place_experts", [&] { return place_all(s); });
}
