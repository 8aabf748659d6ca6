/// Placement in service, on recorded routing:
///   bench_rebalance [TRACE [SPLITS]]
/// How plans hold in the order of the file (bursts, as a day goes) beside shuffled requests, and what steps pay; limits
/// per GPU; the choice of copies by activated experts; and a simulated drift from two domains to two others over 16
/// periods, renewed in several ways.

#include "../../examples/tools/moe/place_study.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/rebalance.hpp>
#include <tetromino/moe/trace_io.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace tetromino::moe;

double processor_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

/// The nodes that requests are assigned to by their prompts, in one batch.
std::vector<std::uint32_t> assigned(const placement& p, const topology& t, const trace_view& known,
                                    const trace_view& served) {
  const node_affinity affinity = node_affinity::make(p, t, known);
  signature_builder builder = affinity.builder();
  std::vector<request_signature> signatures;
  std::vector<std::uint64_t> tokens;
  for (const request& r : served.requests) {
    signatures.push_back(signature_of(served, r, builder));
    tokens.push_back(r.range(phase::decode).size());
  }
  return group(affinity, signatures, tokens);
}

cost_options serving(std::size_t window, double gpu_limit = 0) {
  cost_options o;
  o.replicas = {replica_choice::fewest_nodes, 1.05, gpu_limit, window};
  o.tokens_per_step = 4096;
  return o;
}

void in_order(const std::vector<study::split>& splits, const topology& t, std::size_t slots, double gpu_imbalance) {
  struct row {
    const char* name;
    bool shuffled;
    std::size_t window;
    study::statistic nodes, pairs, node, gpu, step_node, step_node_worst, step_gpu;
  };
  row rows[] = {{"shuffled, counts for ever", true, 0, {}, {}, {}, {}, {}, {}, {}},
                {"shuffled, counts of 4096 tokens", true, 4096, {}, {}, {}, {}, {}, {}, {}},
                {"file order, counts for ever", false, 0, {}, {}, {}, {}, {}, {}, {}},
                {"file order, counts of 4096 tokens", false, 4096, {}, {}, {}, {}, {}, {}, {}},
                {"file order, counts of 512 tokens", false, 512, {}, {}, {}, {}, {}, {}, {}}};
  for (const study::split& s : splits) {
    local_options options;
    options.node_imbalance = slots == 16 ? 1.01 : 1.03;
    options.gpu_imbalance = gpu_imbalance;
    const placement p = local(s.calibration.view(), t, options).experts;
    for (row& r : rows) {
      study::half judged = s.judged;
      if (!r.shuffled) {
        std::sort(judged.requests.begin(), judged.requests.end(),
                  [](const request& a, const request& b) { return a.first_token < b.first_token; });
      }
      const trace_view served = judged.view();
      const cost_report c =
          evaluate(served, p, t, assigned(p, t, s.calibration.view(), served), serving(r.window, gpu_imbalance));
      r.nodes.add(c.nodes_per_token());
      r.pairs.add(c.remote_pair_fraction());
      r.node.add(c.node_imbalance);
      r.gpu.add(c.gpu_imbalance);
      r.step_node.add(c.step_node_imbalance.mean);
      r.step_node_worst.add(c.step_node_imbalance.worst);
      r.step_gpu.add(c.step_gpu_imbalance.mean);
    }
  }
  for (const row& r : rows) {
    fmt::print(
        "{:>2} slots, GPU limit {:<4} {:<34} {:>6.3f} ± {:.3f} {:>7.3f} {:>7.3f} {:>7.3f} {:>7.3f} {:>7.3f} {:>7.3f}\n",
        slots, gpu_imbalance, r.name, r.nodes.mean(), r.nodes.deviation(), r.pairs.mean(), r.node.mean(),
        r.step_node.mean(), r.step_node_worst.mean(), r.gpu.mean(), r.step_gpu.mean());
  }
}

void bursts(const trace& recorded, std::size_t count) {
  const std::vector<study::split> splits = study::random_halves(recorded, count, 1);
  fmt::print(
      "\nOrder and limits, 8 nodes x 8 GPUs, {} halves; steps of 4096 tokens (aim: node imbalance ≤ 1.10 in file "
      "order; with GPU limit 1.2 at 18 slots: GPU ≤ 1.30, ≤ 2.95 nodes/token)\n",
      count);
  fmt::print("{:<57} {:>14} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}\n", "", "nodes/token", "pairs", "node", "step", "worst",
             "GPU", "step");
  for (const std::size_t slots : std::initializer_list<std::size_t>{16, 18, 24}) {
    in_order(splits, topology::with_node_slots(8, 8, slots), slots, 0);
  }
  for (const double limit : {1.2, 1.05}) in_order(splits, topology::with_node_slots(8, 8, 18), 18, limit);
}

void activation(const trace& recorded) {
  fmt::print(
      "\nExperts that the busiest GPU activates per layer, steps of 64 decode tokens, 25 % copies, 8 GPUs of a node "
      "(aim: "
      "20 % below least loaded, ≤ 2 us a token)\n");
  const topology t = topology::uniform(1, 8, recorded.shape().experts * 5 / 4 / 8);
  const std::vector<double> loads = study::decode_loads(recorded.view());
  const placement p = balanced({recorded.shape().layers, recorded.shape().experts, loads}, t);
  // steps as an engine has them: a token of each of 64 requests
  std::vector<request> tokens;
  std::vector<std::uint32_t> homes;
  for (std::uint32_t i = 0;; ++i) {
    const std::size_t before = tokens.size();
    for (std::size_t r = 0; r < 64; ++r) {
      const token_range range = recorded.requests()[r * recorded.requests().size() / 64].range(phase::decode);
      if (range.first + i < range.last) {
        tokens.push_back({range.first + i, 1, 0, 0});
        homes.push_back(static_cast<std::uint32_t>(r % 8));
      }
    }
    if (tokens.size() == before) break;
  }
  const std::vector<std::pair<const char*, replica_choice>> choices = {
      {"least loaded copy", replica_choice::least_loaded},
      {"each copy in turn", replica_choice::even},
      {"fewest nodes", replica_choice::fewest_nodes},
      {"fewest pairs of the step", replica_choice::step_pairs},
      {"fewest experts of the step", replica_choice::step_activation}};
  for (const auto& [name, choice] : choices) {
    cost_options o;
    o.replicas.choice = choice;
    o.sources = source_kind::gpu;
    o.tokens_per_step = 64;
    o.bytes_per_expert = 44e6;
    const cost_report c = evaluate(recorded.view().with(tokens), p, t, homes, o);
    fmt::print(
        "{:<30} experts {:>6.3f} (p99 {:.2f}, worst {:.2f})  GPU imbalance of a step {:>6.3f}  "
        "weights {:>7.1f} us a step\n",
        name, c.step_activated.mean, c.step_activated.p99, c.step_activated.worst, c.step_gpu_imbalance.mean,
        c.weight_seconds / static_cast<double>(std::max<std::size_t>(c.steps, 1)) * 1e6);
  }
  step_chooser chooser(p, t, replica_choice::step_activation);
  std::vector<std::uint16_t> ids;
  for (std::size_t i = 0; i < 64; ++i) {
    const auto of_token = recorded.view().experts_of(tokens[i].first_token, 0);
    ids.insert(ids.end(), of_token.begin(), of_token.end());
  }
  std::vector<std::uint32_t> gpus(ids.size());
  const double start = processor_seconds();
  constexpr int repeats = 2000;
  for (int i = 0; i < repeats; ++i) static_cast<void>(chooser.choose(0, ids, gpus));
  fmt::print("choosing: {:.2f} us a token and layer\n", (processor_seconds() - start) / repeats / 64 * 1e6);
}

/// Periods of requests: first of code and math, in the end of chat and general. Neighbouring periods share no request.
std::vector<std::vector<request>> drifting(const trace& recorded, std::size_t periods, std::size_t per_period) {
  std::vector<std::vector<request>> pools(8);  // by half of the trace and domain
  for (std::size_t i = 0; i < recorded.requests().size(); ++i) {
    const request& r = recorded.requests()[i];
    pools[i % 2 * 4 + r.domain % 4].push_back(r);
  }
  std::uint64_t state = 7;
  std::vector<std::vector<request>> out;
  for (std::size_t p = 0; p < periods; ++p) {
    std::vector<request> now;
    for (std::size_t i = 0; i < per_period; ++i) {
      const bool late = study::mixed(state) % (periods - 1) < p;
      const std::vector<request>& pool = pools[p % 2 * 4 + (late ? 2 : 0) + i % 2];
      now.push_back(pool[study::mixed(state) % pool.size()]);
    }
    out.push_back(std::move(now));
  }
  return out;
}

struct drift_figures {
  study::statistic nodes, imbalance, step;
  double worst = 0, between = 0, inside = 0, seconds = 0;
  std::size_t plans = 0;

  void serve(const trace_view& now, const placement& p, const topology& t, const trace_view& known) {
    const cost_report c = evaluate(now, p, t, assigned(p, t, known, now), serving(4096));
    nodes.add(c.nodes_per_token());
    imbalance.add(c.node_imbalance);
    step.add(c.step_node_imbalance.mean);
    worst = std::max(worst, c.node_imbalance);
  }
  void move(const migration& m) {
    between += m.bytes_between_nodes;
    inside += m.bytes_inside_nodes;
    ++plans;
  }
  void print(const std::string& name, double once, double cold, double cold_bytes) const {
    const double gain = once - cold > 0 ? (once - nodes.mean()) / (once - cold) : 0;
    fmt::print("{:<32} {:>6.3f} {:>7.3f} {:>7.3f} {:>7.3f} {:>9.1f} {:>9.1f} {:>6} {:>7.2f} {:>7.0f} % {:>5.0f} %\n",
               name, nodes.mean(), imbalance.mean(), worst, step.mean(), between * 1e-9, inside * 1e-9, plans,
               plans == 0 ? 0 : seconds / static_cast<double>(plans), 100 * gain,
               cold_bytes > 0 ? 100 * between / cold_bytes : 0);
  }
};

void drift(const trace& recorded) {
  constexpr double expert_bytes = 44e6;
  const topology t = topology::with_node_slots(8, 8, 16);
  const auto periods = drifting(recorded, 16, 160);
  const auto view = [&](std::size_t p) { return recorded.view().with(periods[p]); };
  std::vector<std::vector<request>> with_last{periods[0]};  // each period with the one before
  for (std::size_t p = 1; p < periods.size(); ++p) {
    with_last.push_back(periods[p - 1]);
    with_last.back().insert(with_last.back().end(), periods[p].begin(), periods[p].end());
  }
  const auto two_periods = [&](std::size_t p) { return recorded.view().with(with_last[p]); };
  const auto options = [](const placement* start, double price) {
    local_options o;
    o.node_imbalance = 1.01;
    o.start = start;
    o.price_per_move = price;
    return o;
  };
  const placement first = local(view(0), t, options(nullptr, 0)).experts;
  using next_plan = std::function<std::optional<placement>(std::size_t, const placement&)>;
  using requests_seen = std::function<trace_view(std::size_t)>;
  const auto simulate = [&](const next_plan& next, const requests_seen& from) {
    drift_figures f;
    placement p = first;
    std::size_t known = 0;
    for (std::size_t i = 1; i < periods.size(); ++i) {
      if (i > 1) {
        const double start = processor_seconds();
        auto renewed = next(i - 1, p);
        f.seconds += processor_seconds() - start;
        if (renewed) {
          placement next_to_serve = align(p, std::move(*renewed), t);
          f.move(migrate(p, next_to_serve, t, expert_bytes));
          p = std::move(next_to_serve);
          known = i - 1;
        }
      }
      f.serve(view(i), p, t, from(known));
    }
    return f;
  };
  fmt::print(
      "\nDrift, code and math → chat and general in 16 periods of 160 requests, 8 x 8 GPUs, 16 slots, experts of 44 "
      "MB\n{:<32} {:>6} {:>7} {:>7} {:>7} {:>9} {:>9} {:>6} {:>7} {:>9} {:>7}\n",
      "renewed", "nodes", "imb.", "worst", "step", "GB betw.", "GB ins.", "plans", "s each", "gain", "bytes");
  const drift_figures once = simulate([](std::size_t, const placement&) { return std::nullopt; }, view);
  const drift_figures cold = simulate(
      [&](std::size_t seen, const placement&) { return local(view(seen), t, options(nullptr, 0)).experts; }, view);
  const double a = once.nodes.mean(), b = cold.nodes.mean();
  once.print("never", a, b, cold.between);
  cold.print("each period, cold", a, b, cold.between);
  const auto warm = [&](double price, const requests_seen& from, const char* periods_seen) {
    simulate([&](std::size_t seen, const placement& now) { return local(from(seen), t, options(&now, price)).experts; },
             from)
        .print(fmt::format("each period, warm, price {}{}", price, periods_seen), a, b, cold.between);
  };
  for (const double price : {0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0}) warm(price, view, "");
  for (const double price : {2.0, 4.0}) warm(price, two_periods, ", of two");
  simulate(
      [&](std::size_t seen, const placement&) {
        const std::vector<double> loads = study::decode_loads(view(seen));
        return balanced({recorded.shape().layers, recorded.shape().experts, loads}, t);
      },
      view)
      .print("each period, balanced", a, b, cold.between);

  drift_figures f;
  rebalance_options o;
  o.plan = options(nullptr, 2);
  o.bytes_per_expert = expert_bytes;
  rebalancer loop = rebalancer::make(first, t, o);
  static_cast<void>(loop.consider(view(0)));
  while (loop.next_layer() != nullptr) loop.commit_layer();
  std::size_t known = 0;
  for (std::size_t i = 1; i < periods.size(); ++i) {
    if (i > 1) {
      const double start = processor_seconds();
      const rebalance_report r = loop.consider(view(i - 1));
      f.seconds += processor_seconds() - start;
      if (r.verdict == rebalance_verdict::new_plan) {
        f.move(r.way);
        known = i - 1;
      }
      while (loop.next_layer() != nullptr) loop.commit_layer();
    }
    f.serve(view(i), loop.current(), t, view(known));
  }
  f.print("by the loop, price 2", a, b, cold.between);
}

}  // namespace

int main(int argc, char** argv) {
  const std::filesystem::path data = std::filesystem::path(__FILE__).parent_path() / "../../examples/data";
  const std::string path = argc > 1 ? argv[1] : (data / "routing-128x8.safetensors").string();
  const std::size_t splits = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 5;
  const trace recorded = read_trace(path);
  activation(recorded);
  drift(recorded);
  bursts(recorded, splits);
}
