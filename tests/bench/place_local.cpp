/// What `local` reaches on requests it was not made from, beside what was aimed at, and how long it takes:
///   bench_place_local [TRACE] [OTHER_TRACE]
///   bench_place_local --few TRACE NODES GPUS SLOTS REQUESTS HALVES [pairs]
///   bench_place_local --made LAYERS EXPERTS REQUESTS NODES SLOTS
/// TRACE (of 128 experts, 8 per token) is laid out on 8 × 8, 4 × 8, 16 × 4 and 1 × 8 GPUs, OTHER_TRACE (of 16 experts)
/// on 4 nodes. Plans come from random halves of the requests, and are judged on the decode tokens of the other halves,
/// which are assigned by their prefill. `--few` plans from so many requests of each half alone (0: all of it), with the
/// labels of their domains and without. `--made` times plans from made-up routing on nodes of 8 GPUs.

#include "../../examples/tools/moe/place_study.hpp"
#include "synthetic_trace.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/profile.hpp>
#include <tetromino/moe/sampled_trace.hpp>
#include <tetromino/moe/trace_io.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

using namespace tetromino::moe;

double processor_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

std::string spread(const study::statistic& s, int digits) {
  return fmt::format("{:.{}f} ± {:.{}f}", s.mean(), digits, s.deviation(), digits);
}

/// Copies on other visited nodes serve where a node is over this share of the mean: that costs no visit, but remote
/// pairs, which come out lower where plans are tight instead.
double relief(bool pairs) { return pairs ? 0 : 1.05; }

struct reached {
  study::statistic nodes, pairs, imbalance, worst;
};

void add(const trace_view& judged, const placement& p, const topology& t, const std::vector<std::uint32_t>& sources,
         bool pairs, reached& to) {
  cost_options options;
  options.replicas.choice = replica_choice::fewest_nodes;
  options.replicas.node_limit = relief(pairs);
  const cost_report r = evaluate(judged, p, t, sources, options);
  to.nodes.add(r.nodes_per_token());
  to.pairs.add(r.remote_pair_fraction());
  to.imbalance.add(r.node_imbalance);
  to.worst.add(r.worst_node_imbalance);
}

/// Remote pairs, as a share, that no plan and no grouping can do without, whatever it knows: a copy of an expert serves
/// at home at most the uses by one node's requests, so by those of its heaviest users that fit into a node's token
/// budget; copies beyond the first go where they add most. Nodes' slots and load limits are left out, so the truth lies
/// higher.
double least_remote_pairs(const trace_view& judged, const topology& t) {
  const auto& [layers, experts, k] = judged.shape;
  std::vector<double> tokens;
  std::uint64_t all = 0, largest = 0;
  for (const request& r : judged.requests) {
    const std::uint64_t n = r.range(phase::decode).size();
    tokens.push_back(static_cast<double>(n));
    all += n;
    largest = std::max(largest, n);
  }
  const std::vector<std::int64_t> rooms =
      detail::token_room(all, largest, detail::node_speeds(t), group_options{}.token_budget);
  const auto room = static_cast<double>(*std::max_element(rooms.begin(), rooms.end()));
  double local = 0;
  for (std::size_t l = 0; l < layers; ++l) {
    std::vector<std::vector<double>> uses(experts, std::vector<double>(tokens.size()));
    for (std::size_t r = 0; r < tokens.size(); ++r) {
      const token_range range = judged.requests[r].range(phase::decode);
      for (std::uint64_t i = range.first; i < range.last; ++i) {
        for (const std::uint16_t e : judged.experts_of(i, l)) ++uses[e][r];
      }
    }
    std::vector<double> further;  // what copies beyond the first add
    for (const std::vector<double>& of_expert : uses) {
      std::vector<std::size_t> order;
      for (std::size_t r = 0; r < tokens.size(); ++r) {
        if (tokens[r] > 0) order.push_back(r);
      }
      std::sort(order.begin(), order.end(),
                [&](std::size_t a, std::size_t b) { return of_expert[a] * tokens[b] > of_expert[b] * tokens[a]; });
      std::vector<double> copies(t.nodes(), 0.0);
      double filled = 0;  // requests may be cut in two, which only adds
      for (const std::size_t r : order) {
        for (double left = tokens[r]; left > 1e-9;) {
          const auto copy = static_cast<std::size_t>((filled + 1e-9) / room);
          if (copy >= copies.size()) break;
          const double part = std::min(left, room * static_cast<double>(copy + 1) - filled);
          copies[copy] += of_expert[r] * part / tokens[r];
          filled += part;
          left -= part;
        }
      }
      local += copies[0];
      further.insert(further.end(), copies.begin() + 1, copies.end());
    }
    std::sort(further.begin(), further.end(), std::greater<>());
    const std::size_t spare = std::min(t.slots() - experts, further.size());
    for (std::size_t i = 0; i < spare; ++i) local += further[i];
  }
  return 1 - local / (static_cast<double>(all) * static_cast<double>(layers * k));
}

local_options options_for(bool pairs, double limit) {
  local_options options;
  options.node_weight = pairs ? 0 : 1;
  options.pair_weight = pairs ? 1 : 0;
  options.node_imbalance = limit;
  return options;
}

/// A line of the table; `aim` is 0 where there is none. `known` is what a plan made from the judged requests
/// themselves, with their decode tokens known, reaches: what no plan made from others can be expected to pass.
void line(const std::string& name, const std::vector<study::split>& splits, const topology& t, bool pairs, double aim,
          double limit) {
  reached held_out, known;
  study::statistic least;
  double seconds = 0;
  for (const study::split& s : splits) {
    const trace_view calibration = s.calibration.view(), judged = s.judged.view();
    const local_options options = options_for(pairs, limit);
    const double start = processor_seconds();
    const placement p = local(calibration, t, options).experts;
    seconds += processor_seconds() - start;
    const study::contender c{"", study::experts_by::local, study::requests_by::prefill, {1, limit, pairs}};
    add(judged, p, t, study::assign(c, p, calibration, judged, t), pairs, held_out);
    const local_plan best = local(judged, t, options_for(pairs, std::max(limit, 1.08)));
    add(judged, best.experts, t, best.source_of_request, pairs, known);
    if (pairs) least.add(least_remote_pairs(judged, t));
  }
  const study::statistic& value = pairs ? held_out.pairs : held_out.nodes;
  const study::statistic& hindsight = pairs ? known.pairs : known.nodes;
  std::string verdict;
  if (aim > 0) {
    verdict = fmt::format("{:.2f} {}", aim,
                          value.mean() <= aim + 5e-4 && held_out.imbalance.mean() <= 1.1005 ? "met" : "missed");
  }
  fmt::print("{:<34} {:<12} {:>15} {:>15} {:>14} {:>8.2f} {:>12} {:>15} ({:.2f}) {:>7} {:>6.2f}\n", name,
             pairs ? "remote pairs" : "nodes/token", spread(held_out.nodes, 2), spread(held_out.pairs, 3),
             spread(held_out.imbalance, 2), held_out.worst.mean(), verdict, spread(hindsight, pairs ? 3 : 2),
             known.imbalance.mean(), pairs ? fmt::format("{:.3f}", least.mean()) : "",
             seconds / static_cast<double>(splits.size()));
}

void head() {
  fmt::print("{:<34} {:<12} {:>15} {:>15} {:>14} {:>8} {:>12} {:>22} {:>7} {:>6}\n", "cluster, slots per node",
             "objective", "nodes/token", "remote pairs", "node imbalance", "worst", "aim", "judged known (imb.)",
             "bound", "s");
}

void aims(const trace& recorded, const std::string& name) {
  const std::vector<study::split> splits = study::random_halves(recorded, 5, 1);
  fmt::print("\n{}: {} requests, half to plan from, 5 times; imbalance aim 1.10\n", name, recorded.requests().size());
  head();
  const double node_aims[] = {3.30, 2.95, 2.35}, pair_aims[] = {0.69, 0.62, 0.50};
  const std::size_t slots[] = {16, 18, 24};
  // where copies relieve nodes as tokens are served, the plan may be a little less even
  const auto limit_for = [&](const topology& t, bool pairs) {
    return t.slots() == recorded.shape().experts ? 1.01 : pairs ? 1.0 : 1.03;
  };
  for (std::size_t i = 0; i < 3; ++i) {
    const topology t = topology::with_node_slots(8, 8, slots[i]);
    line(fmt::format("8 nodes x 8 GPUs, {}", slots[i]), splits, t, false, node_aims[i], limit_for(t, false));
    line(fmt::format("8 nodes x 8 GPUs, {}", slots[i]), splits, t, true, pair_aims[i], limit_for(t, true));
  }
  const auto both = [&](const std::string& what, const topology& t) {
    line(what, splits, t, false, 0, limit_for(t, false));
    line(what, splits, t, true, 0, limit_for(t, true));
  };
  both("4 nodes x 8 GPUs, 32", topology::with_node_slots(4, 8, 32));
  both("4 nodes x 8 GPUs, 36", topology::with_node_slots(4, 8, 36));
  both("16 nodes x 4 GPUs, 8", topology::with_node_slots(16, 4, 8));
  both("16 nodes x 4 GPUs, 9", topology::with_node_slots(16, 4, 9));
  both("1 node, its 8 GPUs as nodes, 16", topology::with_node_slots(8, 1, 16));

  fmt::print(
      "\nTraffic against imbalance, 8 nodes x 8 GPUs, 16 slots per node: the limit on the calibration requests\n");
  head();
  const topology t = topology::with_node_slots(8, 8, 16);
  for (const double limit : {1.0, 1.03, 1.06, 1.1, 1.2, 1.4}) {
    line(fmt::format("limit {:.2f}", limit), splits, t, false, 0, limit);
    line(fmt::format("limit {:.2f}", limit), splits, t, true, 0, limit);
  }
}

void cut_signatures(const trace& recorded) {
  fmt::print("\nSignatures cut down (8 nodes x 8 GPUs, 16 slots, nodes/token on the judged requests)\n");
  const topology t = topology::with_node_slots(8, 8, 16);
  const std::vector<study::split> splits = study::random_halves(recorded, 5, 1);
  std::vector<placement> plans;
  for (const study::split& s : splits)
    plans.push_back(local(s.calibration.view(), t, options_for(false, 1.01)).experts);
  const auto run = [&](const std::string& name, const signature_options& cut) {
    reached r;
    double entries = 0, count = 0;
    for (std::size_t i = 0; i < splits.size(); ++i) {
      const trace_view calibration = splits[i].calibration.view(), judged = splits[i].judged.view();
      group_options options;
      options.signature = cut;
      const node_affinity affinity = node_affinity::make(plans[i], t, calibration, options);
      signature_builder builder = affinity.builder();
      std::vector<request_signature> signatures;
      std::vector<std::uint64_t> tokens;
      for (const request& q : judged.requests) {
        signatures.push_back(signature_of(judged, q, builder));
        tokens.push_back(q.range(phase::decode).size());
        entries += static_cast<double>(signatures.back().entries.size());
        ++count;
      }
      add(judged, plans[i], t, group(affinity, signatures, tokens), false, r);
    }
    fmt::print("{:<34} {:>6.0f} entries {:>15}\n", name, entries / count, spread(r.nodes, 3));
  };
  run("whole", {});
  for (const std::size_t top : std::initializer_list<std::size_t>{32, 16, 8, 4, 2}) {
    run(fmt::format("the {} most used of each layer", top), {top, 0});
  }
  for (const std::size_t buckets : std::initializer_list<std::size_t>{4, 2, 1}) {
    run(fmt::format("layers hashed into {}", buckets), {0, buckets});
  }
  run("the 8 most used, 4 buckets", {8, 4});
}

/// What is lost where an engine keeps a profile of each request and no trace: plan and grouping from tokens drawn from
/// it, beside those from the trace that it counted.
void from_profile(const trace& recorded) {
  fmt::print(
      "\nPlanned from a profile with signatures, and from the trace itself (8 nodes x 8 GPUs, judged requests)\n");
  fmt::print("{:<34} {:<12} {:>15} {:>15} {:>14}\n", "slots per node, planned from", "objective", "nodes/token",
             "remote pairs", "node imbalance");
  const std::vector<study::split> splits = study::random_halves(recorded, 5, 1);
  for (const std::size_t slots : std::initializer_list<std::size_t>{16, 18, 24}) {
    const topology t = topology::with_node_slots(8, 8, slots);
    for (const bool pairs : {false, true}) {
      reached results[2];
      for (const study::split& s : splits) {
        profile counted = profile::make({recorded.shape(), 0, s.calibration.view().requests.size()});
        counted.add(s.calibration.view());
        const trace drawn = sampled_trace(counted, {2 * s.calibration.view().tokens(), 1});
        for (const bool from_trace : {false, true}) {
          const trace_view from = from_trace ? s.calibration.view() : drawn.view();
          const placement p = local(from, t, options_for(pairs, 1.02)).experts;
          const study::contender c{"", study::experts_by::local, study::requests_by::prefill, {1, 1.02, pairs}};
          add(s.judged.view(), p, t, study::assign(c, p, from, s.judged.view(), t), pairs, results[from_trace ? 1 : 0]);
        }
      }
      for (const bool from_trace : {true, false}) {
        const reached& r = results[from_trace ? 1 : 0];
        fmt::print("{:<34} {:<12} {:>15} {:>15} {:>14}\n",
                   fmt::format("{}, {}", slots, from_trace ? "the trace" : "a profile"),
                   pairs ? "remote pairs" : "nodes/token", spread(r.nodes, 2), spread(r.pairs, 3),
                   spread(r.imbalance, 2));
      }
    }
  }
}

/// Eight nodes in two racks, between which a byte costs three times as much: planned and served as if there were none,
/// and with them.
void racks(const trace& recorded) {
  fmt::print("\nTwo racks of 4 nodes x 8 GPUs, a byte between them 3 times as dear (judged requests)\n");
  fmt::print("{:<34} {:>15} {:>15} {:>14}\n", "slots per node, planned", "cost/token", "nodes/token", "node imbalance");
  const std::vector<study::split> splits = study::random_halves(recorded, 5, 1);
  for (const std::size_t slots : std::initializer_list<std::size_t>{16, 24}) {
    const topology alike = topology::with_node_slots(8, 8, slots), far = alike.with_racks(4, 3);
    for (const topology& known : {alike, far}) {
      const study::contender c{
          "", study::experts_by::local, study::requests_by::prefill, {1, slots == 16 ? 1.01 : 1.03, false}};
      study::statistic cost, nodes, imbalance;
      for (const study::split& s : splits) {
        const trace_view calibration = s.calibration.view(), judged = s.judged.view();
        const placement p = study::place(c, calibration, known);
        const cost_report r = study::judge(p, study::assign(c, p, calibration, judged, known), judged, known, 1.05);
        double sum = 0;
        for (std::size_t i = 0; i < r.copies_between.size(); ++i) {
          sum += static_cast<double>(r.copies_between[i]) * far.node_cost(i / 8, i % 8);
        }
        cost.add(sum / static_cast<double>(r.tokens * r.layers));
        nodes.add(r.nodes_per_token());
        imbalance.add(r.node_imbalance);
      }
      fmt::print("{:<34} {:>15} {:>15} {:>14}\n", fmt::format("{}, {}", slots, known == far ? "with racks" : "without"),
                 spread(cost, 2), spread(nodes, 2), spread(imbalance, 2));
    }
  }
}

void few_requests(const trace& recorded, const topology& t, std::size_t requests, std::size_t halves, bool pairs) {
  const double limit = t.slots() == recorded.shape().experts ? 1.01 : 1.03;
  fmt::print("{:<24} {:>15} {:>15} {:>14}\n", "domains", "nodes/token", "remote pairs", "node imbalance");
  for (const bool labelled : {true, false}) {
    reached r;
    for (study::split& s : study::random_halves(recorded, halves, 1)) {
      if (requests > 0) s.calibration.requests.resize(std::min(requests, s.calibration.requests.size()));
      if (!labelled) {
        for (request& q : s.calibration.requests) q.domain = 0;
      }
      const trace_view calibration = s.calibration.view(), judged = s.judged.view();
      const placement p = local(calibration, t, options_for(pairs, limit)).experts;
      const study::contender c{"", study::experts_by::local, study::requests_by::prefill, {1, limit, pairs}};
      add(judged, p, t, study::assign(c, p, calibration, judged, t), pairs, r);
    }
    fmt::print("{:<24} {:>15} {:>15} {:>14}\n", labelled ? "labelled" : "not labelled", spread(r.nodes, 2),
               spread(r.pairs, 3), spread(r.imbalance, 2));
  }
}

void time_local(const std::string& name, const trace& t, const topology& cluster) {
  for (const bool pairs : {false, true}) {
    const double start = processor_seconds();
    static_cast<void>(local(t.view(), cluster, options_for(pairs, 1.02)));
    fmt::print("{:<66} {:<12} {:>7.2f} s\n", name, pairs ? "remote pairs" : "nodes/token", processor_seconds() - start);
  }
}

/// The same, of made-up routing, on nodes of 8 GPUs.
void time_made_up(std::size_t layers, std::size_t experts, std::size_t requests, std::size_t nodes, std::size_t slots) {
  time_local(fmt::format("made up: {} layers x {} experts x {} requests, {} nodes, {} slots", layers, experts, requests,
                         nodes, slots),
             synthetic_trace(layers, experts, requests, 0, 4), topology::with_node_slots(nodes, 8, slots));
}

void speed(const trace& recorded) {
  fmt::print("\nlocal, processor time (aims: 8 x 128 x 480 requests under 1 s, 58 x 256 x 10,000 under 30 s)\n");
  for (const std::size_t slots : std::initializer_list<std::size_t>{16, 18, 24}) {
    time_local(fmt::format("the trace: {} requests, 8 nodes, {} slots", recorded.requests().size(), slots), recorded,
               topology::with_node_slots(8, 8, slots));
  }
  for (const std::size_t layers : std::initializer_list<std::size_t>{4, 8, 16}) time_made_up(layers, 128, 2000, 8, 16);
  for (const std::size_t experts : std::initializer_list<std::size_t>{64, 256})
    time_made_up(8, experts, 2000, 8, experts / 8);
  for (const std::size_t requests : std::initializer_list<std::size_t>{500, 8000})
    time_made_up(8, 128, requests, 8, 16);
  for (const std::size_t nodes : std::initializer_list<std::size_t>{2, 16})
    time_made_up(8, 128, 2000, nodes, 128 / nodes);
  time_made_up(58, 256, 10'000, 8, 32);

  fmt::print("\nonline_grouper: one arriving request (aim: under 20 us)\n");
  const topology t = topology::with_node_slots(8, 8, 16);
  const placement p = contiguous(recorded.shape().layers, recorded.shape().experts, t);
  for (const signature_options& cut : {signature_options{}, signature_options{16, 0}}) {
    group_options options;
    options.signature = cut;
    const node_affinity affinity = node_affinity::make(p, t, recorded.view(), options);
    signature_builder builder = affinity.builder();
    std::vector<request_signature> signatures;
    for (const request& r : recorded.requests()) signatures.push_back(signature_of(recorded.view(), r, builder));
    online_grouper grouper(affinity);
    const double start = processor_seconds();
    std::size_t assigned = 0;
    for (; assigned < 20'000; ++assigned)
      static_cast<void>(grouper.assign(signatures[assigned % signatures.size()], 100));
    fmt::print("{:<66} {:>7.2f} us\n", cut.top_experts == 0 ? "whole signatures" : "the 16 most used of each layer",
               (processor_seconds() - start) / static_cast<double>(assigned) * 1e6);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 7 && std::string(argv[1]) == "--few") {
    const auto number = [&](int i) -> std::size_t { return std::stoul(argv[i]); };
    few_requests(read_trace(argv[2]), topology::with_node_slots(number(3), number(4), number(5)), number(6), number(7),
                 argc > 8);
    return 0;
  }
  if (argc > 6 && std::string(argv[1]) == "--made") {
    const auto number = [&](int i) -> std::size_t { return std::stoul(argv[i]); };
    time_made_up(number(2), number(3), number(4), number(5), number(6));
    return 0;
  }
  const std::filesystem::path data = "examples/data";  // seen from the root of the tree
  const std::string path = argc > 1 ? argv[1] : (data / "routing-128x8.safetensors").string();
  const std::string other_path = argc > 2 ? argv[2] : (data / "routing-16x2.safetensors").string();
  const trace recorded = read_trace(path);
  aims(recorded, std::filesystem::path(path).filename().string());
  const trace other = read_trace(other_path);
  fmt::print("\n{}: 4 nodes x 1 GPU\n", std::filesystem::path(other_path).filename().string());
  head();
  const std::vector<study::split> splits = study::random_halves(other, 5, 1);
  for (const std::size_t slots : std::initializer_list<std::size_t>{4, 5, 6}) {
    const topology t = topology::with_node_slots(4, 1, slots);
    line(fmt::format("4 nodes, {} slots", slots), splits, t, false, 0, 1.01);
    line(fmt::format("4 nodes, {} slots", slots), splits, t, true, 0, 1.01);
  }
  cut_signatures(recorded);
  from_profile(recorded);
  racks(recorded);
  speed(recorded);
}
