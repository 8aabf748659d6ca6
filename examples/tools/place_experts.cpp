/// Decides where the experts of a mixture-of-experts model live on a cluster, and which node serves which request, from
/// recorded routing:
///   place_experts TRACE --nodes 8 --gpus 8 --slots 16 --report report.html
///   place_experts TRACE --judge OTHER_TRACE --plan placement.json
///   place_experts LOADS --plan location.json --format sglang
/// Plans are made from a part of the requests and judged on the decode tokens of others, which are assigned to nodes by
/// their prefill alone. From loads alone (counts per expert, as engines log them), experts are balanced.

#include <tetromino/moe/trace_io.hpp>

#include "command_line.hpp"
#include "moe/place_report.hpp"
#include "moe/place_study.hpp"
#include "output_file.hpp"
#include "ui.hpp"

#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/placement_io.hpp>
#include <tetromino/thread_executor.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <numeric>
#include <optional>
#include <thread>
#include <variant>

namespace {

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

constexpr std::size_t most_nodes = 256;  // of local and node_affinity

/// The cluster with so many slots on each node.
tetromino::result<topology> try_cluster(const settings& s, std::size_t slots) {
  auto t = topology::try_with_node_slots(s.nodes, s.gpus_per_node, slots);
  return t && s.nodes_per_rack > 0 ? t->try_with_racks(s.nodes_per_rack, s.rack_cost) : t;
}
topology cluster(const settings& s, std::size_t slots) { return try_cluster(s, slots).value(); }

using rows = std::vector<std::vector<std::string>>;
using nlohmann::ordered_json;

/// Everything said goes to the terminal and, if there is one, to the report; with --json, what was found goes to
/// standard output instead, as one object.
class voice {
 public:
  explicit voice(const settings& s)
      : report_path_(s.report_path), speaks_(!s.print.json && !s.print.quiet), json_(s.print.json) {
    found = {{"program", "place_experts"}, {"version", ui::version()}, {"input", s.trace_path}};
    if (report_path_.empty()) return;
    page_.emplace(fmt::format("Where the experts of {} live",
                              ui::printable(std::filesystem::path(s.trace_path).filename().string())));
    const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
    char date[32] = "";
    std::tm utc{};
    if (gmtime_r(&now, &utc) != nullptr) std::strftime(date, sizeof date, "%Y-%m-%d %H:%M UTC", &utc);
    page_->origin(fmt::format("{}, Tetromino {}: {}", date, ui::version(), ui::printable(s.command, 1000)));
  }

  void line(const std::string& text) const {
    if (speaks_) fmt::print("{}\n", text);
  }
  void section(const std::string& title, const std::string& text) {
    line(fmt::format("\n{}\n{}\n", title, text));
    if (page_) page_->heading(title), page_->paragraph(text);
  }
  /// `best` is the row to point out; 0 is none.
  void table(const rows& r, std::size_t best = 0) {
    if (speaks_) {
      ui::table out(r.front());
      for (std::size_t i = 1; i < r.size(); ++i) {
        out.add(r[i]);
        if (i == best) out.mark_last();
      }
      out.print();
    }
    if (page_) page_->table(r, best);
  }
  void figure(const std::vector<std::string>& pictures, const std::string& caption) {
    if (page_) page_->figure(pictures, caption);
  }
  /// What was gained, in one sentence: the report begins with it, the terminal ends with it.
  void summary(const std::string& text) {
    summary_ = text;
    if (page_) page_->lead(text);
  }
  void end(const std::string& plan_path) {
    if (page_) ui::write_file(report_path_, page_->html());
    if (!summary_.empty()) line("\n" + summary_);
    if (!plan_path.empty()) line(fmt::format("The plan: {}", plan_path)), found["plan_file"] = plan_path;
    if (page_) line(fmt::format("The report with pictures: {}", report_path_)), found["report_file"] = report_path_;
    if (json_) ui::print_json(found);
  }

  ordered_json found;

 private:
  std::string report_path_, summary_;
  bool speaks_, json_;
  std::optional<report::page> page_;
};

/// What cannot be measured is null.
ordered_json mean_of(const statistic& s) { return s.count() == 0 ? ordered_json() : ordered_json(s.mean()); }
ordered_json json_of(const statistic& s) {
  return {{"mean", mean_of(s)},
          {"deviation", s.count() < 2 ? ordered_json() : ordered_json(s.deviation())},
          {"count", s.count()}};
}

std::string number(double x, int digits = 3) { return fmt::format("{:.{}f}", x, digits); }
std::string number(const statistic& s, int digits = 3) {
  if (s.count() == 0) return "–";
  return s.count() < 2 ? number(s.mean(), digits)
                       : fmt::format("{:.{}f} ± {:.{}f}", s.mean(), digits, s.deviation(), digits);
}

/// What placement lives on: some experts are busier, domains differ, and prefill predicts decode.
void describe(const settings& s, const trace& t, voice& out) {
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
std::vector<finding> run_all(const settings& s, const char* label, const std::vector<experiment>& list) {
  ui::progress progress(label, list.size(), s.print.quiet);
  const tetromino::thread_executor threads(s.threads);
  return run(list, threads, [&](std::size_t done) { progress.add(done); });
}

const std::string nodes_plan = "local, for nodes/token", pairs_plan = "local, for remote pairs";

/// All contenders on all splits, for each number of slots; baselines for the first number alone.
std::vector<measured> compare(const settings& s, const std::vector<split>& splits, voice& out) {
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
void trade(const settings& s, const std::vector<split>& splits, const std::vector<measured>& lone, voice& out) {
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
void drift(const settings& s, const trace& recorded, const std::vector<split>& splits, voice& out) {
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
std::vector<double> relative_loads(const cost_report& r) {
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
std::vector<double> traffic(const cost_report& r) {
  std::vector<double> out(r.copies_between.begin(), r.copies_between.end());
  for (double& x : out)
    x *= static_cast<double>(r.nodes) / static_cast<double>(std::max<std::uint64_t>(1, r.tokens * r.layers));
  return out;
}

void draw(const cost_report& before, const cost_report& after, const topology& t, voice& out) {
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

/// The rows of a plan for the layers that TRACE has, by their numbers in the model where the plan has such.
placement for_layers(const settings& s, const placement& p, const std::vector<std::uint32_t>& numbers) {
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
std::optional<placement> plan_in_force(const settings& s, const routing_shape& shape, const topology& t) {
  if (s.start_path.empty()) return std::nullopt;
  const routing_file file = read_routing(s.start_path, {shape.experts});
  const placement* const p = std::get_if<placement>(&file.content);
  if (p == nullptr) throw std::runtime_error(fmt::format("{}: expected a plan, got {}", s.start_path, file.format));
  placement start = for_layers(s, *p, file.layers);
  validate(start, t, {.one_copy_per_gpu = false});
  return start;
}

void write_plan(const settings& s, const placement& p, const topology& t) {
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
void hand_over(const settings& s, const half& everything, const std::optional<placement>& start, const topology& t,
               voice& out) {
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

/// The cluster with each number of slots. What `experts` and the options make impossible is found here, before any
/// work.
std::vector<topology> clusters_for(const settings& s, std::size_t experts) {
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

/// Loads alone: how uneven they are, and what balancing makes of them.
int place_loads(settings s, const routing_file& file, voice& out) {
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
