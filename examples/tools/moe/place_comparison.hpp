#pragma once

/// What the routing shows, and plans compared on requests that they were not made from.

#include "place_report.hpp"
#include "place_settings.hpp"
#include "place_study.hpp"
#include "place_voice.hpp"

#include <tetromino/thread_executor.hpp>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace place_experts {

/// What placement lives on: some experts are busier, domains differ, and prefill predicts decode.
inline void describe(const settings& s, const trace& t, voice& out) {
  // the loads of each domain are kept: of more than can be shown, none
  constexpr std::size_t most_domains = 32;
  const std::size_t domains = domains_of(t) <= most_domains ? domains_of(t) : 0;
  profile p = profile::make({t.shape(), domains, t.requests().size(), false, false});
  p.add(t.view());
  const load_imbalance busiest = imbalance(p.loads(phase::decode));
  const phase_similarity similar = prefill_decode_similarity(p);
  statistic same, across;
  if (similar.requests > 0) same.add(similar.same_request);
  if (similar.requests > 1) across.add(similar.across_requests);
  out.section("What the routing shows",
              fmt::format("{} requests, {} tokens ({} of them decoded), {} layers, {} of {} experts per token.",
                          t.requests().size(), t.tokens(), t.view().tokens(phase::decode), t.shape().layers,
                          t.shape().experts_per_token, t.shape().experts));
  rows found = {{"observation", "value"},
                {"busiest expert / mean, mean over layers", number(busiest.mean, 2)},
                {fmt::format("busiest expert / mean, worst layer ({})", s.layers.at(busiest.worst_layer)),
                 number(busiest.worst, 2)},
                {"cosine of prefill and decode use, same request", number(same, 2)},
                {"cosine of prefill and decode use, different requests", number(across, 2)}};
  ordered_json& json = out.found["routing"] = {{"requests", t.requests().size()},
                                               {"tokens", t.tokens()},
                                               {"decode_tokens", t.view().tokens(phase::decode)},
                                               {"layers", t.shape().layers},
                                               {"experts", t.shape().experts},
                                               {"experts_per_token", t.shape().experts_per_token},
                                               {"busiest_expert", busiest.mean},
                                               {"busiest_expert_worst_layer", busiest.worst},
                                               {"cosine_same_request", mean_of(same)},
                                               {"cosine_other_requests", mean_of(across)}};
  const std::size_t n = p.options().domains;
  if (n < 2) return out.table(found);
  const std::vector<double> apart = domain_divergence(p);
  std::vector<std::string> names;
  std::pair<std::size_t, std::size_t> alike{0, 1}, different{0, 1};
  for (std::size_t a = 0; a < n; ++a) {
    names.push_back(domain_name(t, a));
    json["domains"].push_back(names.back());
    json["divergence_bits"].push_back(std::vector<double>(apart.begin() + static_cast<std::ptrdiff_t>(a * n),
                                                          apart.begin() + static_cast<std::ptrdiff_t>((a + 1) * n)));
    for (std::size_t b = a + 1; b < n; ++b) {
      if (apart[a * n + b] < apart[alike.first * n + alike.second]) alike = {a, b};
      if (apart[a * n + b] > apart[different.first * n + different.second]) different = {a, b};
    }
  }
  const auto add = [&](const char* what, std::pair<std::size_t, std::size_t> pair) {
    found.push_back({fmt::format("bits between {}: {} and {}", what, names[pair.first], names[pair.second]),
                     number(apart[pair.first * n + pair.second], 2)});
  };
  if (n > 2) add("the domains most alike", alike);
  add(n > 2 ? "the domains least alike" : "the domains", different);
  out.table(found);
  const double most = apart[different.first * n + different.second];
  if (n > 2) {
    std::string picture = "\nHow far apart the domains are:\n";
    static constexpr const char* shades[] = {"·", "░", "▒", "▓", "█"};
    for (std::size_t a = 0; a < n; ++a) {
      picture += "  ";
      for (std::size_t b = 0; b < n; ++b) {
        const double share = most > 0 ? apart[a * n + b] / most : 0;
        picture += fmt::format("{} ", a == b ? " " : shades[static_cast<std::size_t>(share * 4 + 0.5)]);
      }
      picture += fmt::format(" {}\n", names[a]);
    }
    out.line(picture + fmt::format("  · 0 bits  █ {:.2f} bits", most));
  }
  report::heat_map map{"Divergence of domains", "", "", n, n, apart, 0, most, &report::sequential, "bits", 0, true};
  map.row_names = map.column_names = names;
  out.figure({report::svg(map)},
             "How differently two domains use the experts while decoding, in bits (Jensen and Shannon): 0 is alike, 1 "
             "shares no expert.");
}

struct measured {
  std::string name;
  std::size_t slots;
  outcome result;
  cost_report first;  // of the first split
};

/// Runs all experiments on the threads there are, telling how far it got.
inline std::vector<finding> run_all(const settings& s, const char* label, const std::vector<experiment>& list) {
  ui::progress progress(label, list.size(), s.print.quiet);
  const tetromino::thread_executor threads(s.threads);
  return run(list, threads, [&](std::size_t done) { progress.add(done); });
}

inline const std::string nodes_plan = "local, for nodes/token", pairs_plan = "local, for remote pairs";

/// All contenders on all splits, for each number of slots; baselines for the first number alone.
inline std::vector<measured> compare(const settings& s, const std::vector<split>& splits, voice& out) {
  const aim nodes{s.seed, s.limit, false}, pairs{s.seed, s.limit, true};
  std::vector<std::pair<std::size_t, contender>> plans;
  for (const contender& c :
       {by_default, by_load,
        contender{"contiguous, requests by prefill", experts_by::contiguous, requests_by::prefill, nodes},
        contender{"local experts, requests in turn", experts_by::local, requests_by::turn, nodes}}) {
    plans.emplace_back(s.slots_per_node.front(), c);
  }
  for (const std::size_t slots : s.slots_per_node) {
    plans.emplace_back(slots, contender{nodes_plan, experts_by::local, requests_by::prefill, nodes});
    plans.emplace_back(slots, contender{pairs_plan, experts_by::local, requests_by::prefill, pairs});
  }
  std::vector<topology> clusters;
  for (const auto& plan : plans) {
    clusters.push_back(cluster(s, plan.first));
  }
  std::vector<experiment> list;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    // of equal size, the first: what is planned for it is planned once
    const topology& t = *std::find(clusters.begin(), clusters.end(), clusters[i]);
    for (const split& part : splits) list.push_back({&plans[i].second, &part.calibration, &part.judged, &t});
  }
  const std::vector<finding> found = run_all(s, "comparing plans", list);
  std::vector<measured> all;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    const finding* const of_plan = found.data() + i * splits.size();
    all.push_back({plans[i].second.name, plans[i].first, {}, of_plan->cost});
    for (std::size_t j = 0; j < splits.size(); ++j) all.back().result.add(of_plan[j]);
  }
  rows r = {{"plan", "slots/node", "remote pairs", "nodes/token", "node imbalance", "GPU imbalance", "kB/token",
             "s to place"}};
  if (s.nodes_per_rack > 0) r.front().insert(r.front().begin() + 4, "cost/token");
  // all plans are judged on the same tokens: where there are none, none is best
  const bool is_measured = all.front().result.nodes_per_token.count() > 0;
  const auto fewest = [](const measured& a, const measured& b) {
    return a.result.nodes_per_token.mean() < b.result.nodes_per_token.mean();
  };
  const auto best = static_cast<std::size_t>(std::min_element(all.begin(), all.end(), fewest) - all.begin());
  for (const measured& m : all) {
    const outcome& o = m.result;
    out.found["plans"].push_back({{"name", m.name},
                                  {"slots_per_node", m.slots},
                                  {"best", is_measured && &m == &all[best]},
                                  {"remote_pairs", json_of(o.remote_pairs)},
                                  {"nodes_per_token", json_of(o.nodes_per_token)},
                                  {"node_imbalance", json_of(o.node_imbalance)},
                                  {"gpu_imbalance", json_of(o.gpu_imbalance)},
                                  {"cost_per_token", json_of(o.cost_per_token)},
                                  {"bytes_per_token", json_of(o.bytes_per_token)},
                                  {"seconds_to_place", json_of(o.seconds_to_place)}});
    r.push_back({m.name, std::to_string(m.slots), number(o.remote_pairs), number(o.nodes_per_token, 2),
                 number(o.node_imbalance, 2), number(o.gpu_imbalance, 2),
                 is_measured ? number(o.bytes_per_token.mean() * 1e-3, 0) : "–",
                 is_measured ? number(o.seconds_to_place.mean(), 2) : "–"});
    if (s.nodes_per_rack > 0) r.back().insert(r.back().begin() + 4, number(o.cost_per_token, 2));
  }
  out.table(r, is_measured ? best + 1 : 0);
  if (!is_measured) {
    out.summary("The judged requests have no decode tokens: plans cannot be compared on them.");
    return all;
  }
  const outcome &before = all.front().result, &after = all[best].result;
  const double was = before.nodes_per_token.mean(), is = after.nodes_per_token.mean();
  out.summary(fmt::format(
      "On requests that were not planned with, a token visits {:.2f} other nodes in a layer instead of {:.2f} ({:.0f} "
      "% "
      "fewer; {}, {} slots per node), with the busiest node at {:.2f} of the mean instead of {:.2f} and the busiest "
      "GPU "
      "at {:.2f} instead of {:.2f}.",
      is, was, was > 0 ? 100 * (1 - is / was) : 0, all[best].name, all[best].slots, after.node_imbalance.mean(),
      before.node_imbalance.mean(), after.gpu_imbalance.mean(), before.gpu_imbalance.mean()));
  return all;
}

/// Traffic against imbalance: the more load a node may have over the mean, the less needs to travel.
inline void trade(const settings& s, const std::vector<split>& splits, const std::vector<measured>& lone, voice& out) {
  const std::vector<double> limits = {1.0, 1.03, 1.06, 1.1, 1.2, 1.4};
  out.section("Traffic against imbalance",
              fmt::format("The solver is allowed more and more load on a node, over the mean; what it then reaches on "
                          "the judged requests{}.",
                          splits.size() == 1 ? "" : fmt::format(", mean of {} halves", splits.size())));
  report::curve nodes{"Nodes per token", "node imbalance on judged requests", "nodes per token", {}};
  report::curve pairs{"Remote pairs", "node imbalance on judged requests", "remote pairs", {}};
  struct point {
    std::size_t slots;
    topology cluster;
    contender plan;
  };
  std::vector<point> points;
  for (const std::size_t slots : s.slots_per_node) {
    const topology t = cluster(s, slots);
    for (const bool for_pairs : {false, true}) {
      for (const double limit : limits) {
        points.push_back({slots, t, {"", experts_by::local, requests_by::prefill, {s.seed, limit, for_pairs}}});
      }
    }
  }
  std::vector<experiment> list;
  for (const point& p : points) {
    for (const split& part : splits) list.push_back({&p.plan, &part.calibration, &part.judged, &p.cluster});
  }
  const std::vector<finding> found = run_all(s, "drawing the curve", list);
  rows r = {{"slots/node", "limit", "objective", "remote pairs", "nodes/token", "node imbalance"}};
  for (std::size_t i = 0; i < points.size(); ++i) {
    const auto& [slots, t, plan] = points[i];
    const bool for_pairs = plan.to.pairs;
    outcome o;
    for (std::size_t j = 0; j < splits.size(); ++j) o.add(found[i * splits.size() + j]);
    report::curve& c = for_pairs ? pairs : nodes;
    if (i % limits.size() == 0) c.lines.push_back({fmt::format("local, {} slots/node", slots), {}, true});
    if (o.node_imbalance.count() > 0) {
      c.lines.back().points.emplace_back(o.node_imbalance.mean(),
                                         (for_pairs ? o.remote_pairs : o.nodes_per_token).mean());
    }
    out.found["limits"].push_back({{"slots_per_node", slots},
                                   {"limit", plan.to.limit},
                                   {"objective", for_pairs ? "remote_pairs" : "nodes_per_token"},
                                   {"remote_pairs", mean_of(o.remote_pairs)},
                                   {"nodes_per_token", mean_of(o.nodes_per_token)},
                                   {"node_imbalance", mean_of(o.node_imbalance)}});
    r.push_back({std::to_string(slots), number(plan.to.limit, 2), for_pairs ? "remote pairs" : "nodes/token",
                 number(o.remote_pairs), number(o.nodes_per_token, 2), number(o.node_imbalance, 2)});
  }
  for (const measured& m : lone) {
    if (m.name == nodes_plan || m.name == pairs_plan || m.result.node_imbalance.count() == 0) continue;
    const double x = m.result.node_imbalance.mean();
    nodes.lines.push_back({m.name, {{x, m.result.nodes_per_token.mean()}}, false});
    pairs.lines.push_back({m.name, {{x, m.result.remote_pairs.mean()}}, false});
  }
  out.table(r);
  out.figure({report::svg(nodes), report::svg(pairs)},
             "Each line is one number of slots; its points are growing limits. Squares are the baselines.");
}

/// What happens when the traffic is not the one that was planned for.
inline void drift(const settings& s, const trace& recorded, const std::vector<split>& splits, voice& out) {
  const std::size_t n = domains_of(recorded);
  if (n < 2 || n > 32) return;
  out.section("Drift",
              fmt::format("nodes/token (and node imbalance) when one domain is served; \"local\" is planned on all "
                          "domains, on the served one, or on each of the others (mean). {} slots per node.",
                          s.slots_per_node.front()));
  const topology t = cluster(s, s.slots_per_node.front());
  const contender local{"", experts_by::local, requests_by::prefill, {s.seed, s.limit, false}};
  struct parts {
    std::vector<half> calibration, judged;  // [domains]
  };
  std::vector<parts> by_domain;
  for (const split& part : splits) {
    parts& of = by_domain.emplace_back();
    for (std::size_t d = 0; d < n; ++d) {
      of.calibration.push_back(part.calibration.of_domain(d));
      of.judged.push_back(part.judged.of_domain(d));
    }
  }
  const std::size_t columns = 5;
  std::vector<experiment> list;
  std::vector<std::size_t> cell;  // of the table, for each experiment
  const auto serve = [&](std::size_t served, std::size_t column, const experiment& e) {
    list.push_back(e);
    cell.push_back(served * columns + column);
  };
  for (std::size_t served = 0; served < n; ++served) {
    for (std::size_t i = 0; i < splits.size(); ++i) {
      const half* const all = &splits[i].calibration;
      const half* const judged = &by_domain[i].judged[served];
      serve(served, 0, {&by_default, all, judged, &t});
      serve(served, 1, {&by_load, all, judged, &t});
      serve(served, 2, {&local, all, judged, &t});
      for (std::size_t d = 0; d < n; ++d) {
        serve(served, d == served ? 3 : 4, {&local, &by_domain[i].calibration[d], judged, &t});
      }
    }
  }
  const std::vector<finding> found = run_all(s, "letting traffic drift", list);
  std::vector<outcome> cells(n * columns);
  for (std::size_t i = 0; i < found.size(); ++i) cells[cell[i]].add(found[i]);
  rows r = {{"served", "contiguous", "balanced, on all", "local, on all", "local, on the served", "local, on another"}};
  for (std::size_t served = 0; served < n; ++served) {
    std::vector<std::string> row = {domain_name(recorded, served)};
    for (std::size_t c = 0; c < columns; ++c) {
      const outcome& o = cells[served * columns + c];
      out.found["drift"].push_back({{"served", row.front()},
                                    {"plan", r.front()[c + 1]},
                                    {"nodes_per_token", json_of(o.nodes_per_token)},
                                    {"node_imbalance", json_of(o.node_imbalance)}});
      row.push_back(o.nodes_per_token.count() == 0
                        ? "–"
                        : fmt::format("{:.2f} ({:.2f})", o.nodes_per_token.mean(), o.node_imbalance.mean()));
    }
    r.push_back(row);
  }
  out.table(r);
}

/// Pairs per GPU over the mean of its layer: [layers, GPUs].
inline std::vector<double> relative_loads(const cost_report& r) {
  std::vector<double> out(r.pairs_on_gpu.size());
  for (std::size_t l = 0; l < r.layers; ++l) {
    const auto layer = std::span(r.pairs_on_gpu).subspan(l * r.gpus, r.gpus);
    const auto sum = static_cast<double>(std::accumulate(layer.begin(), layer.end(), std::uint64_t{0}));
    for (std::size_t g = 0; g < r.gpus; ++g) {
      out[l * r.gpus + g] = sum > 0 ? static_cast<double>(layer[g] * r.gpus) / sum : 0;
    }
  }
  return out;
}

/// Activations sent per token and layer, from node to node: [nodes, nodes].
inline std::vector<double> traffic(const cost_report& r) {
  std::vector<double> out(r.copies_between.begin(), r.copies_between.end());
  for (double& x : out)
    x *= static_cast<double>(r.nodes) / static_cast<double>(std::max<std::uint64_t>(1, r.tokens * r.layers));
  return out;
}

inline void draw(const cost_report& before, const cost_report& after, const topology& t, voice& out) {
  const auto loads = [&](const char* title, const cost_report& r) {
    report::heat_map map{
        title,         "layer",           "GPU", r.layers, r.gpus, relative_loads(r), 0, 2, &report::diverging,
        "load / mean", t.gpus_on_node(0), false};
    map.high_name = "2 or more";
    return report::svg(map);
  };
  out.figure({loads("Before: contiguous", before), loads("After", after)},
             fmt::format("Load of each GPU in each layer, over the layer's mean: white is the mean, red is overload. "
                         "Gaps separate nodes. The busiest GPU of a layer has {:.2f} times the mean before and {:.2f} "
                         "times after (mean over layers).",
                         before.gpu_imbalance, after.gpu_imbalance));
  const std::vector<double> was = traffic(before), is = traffic(after);
  const double most = std::max(*std::max_element(was.begin(), was.end()), *std::max_element(is.begin(), is.end()));
  const auto matrix = [&](const char* title, const std::vector<double>& values) {
    return report::svg(report::heat_map{title, "from node", "to node", t.nodes(), t.nodes(), values, 0, most,
                                        &report::sequential, "copies", 0, true});
  };
  out.figure({matrix("Before: contiguous, requests in turn", was), matrix("After", is)},
             "Activations that an average token of the row's node sends to the column's node in a layer (mean over "
             "nodes = nodes/token summed over a row).");
}

}  // namespace place_experts
