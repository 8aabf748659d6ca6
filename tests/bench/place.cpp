/// How long placement takes on one core: solvers, exact cost, profiles and migrations, against layers, experts, GPUs,
/// tokens and nodes.

#include "reference/generators.hpp"
#include "synthetic_trace.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/profile.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <initializer_list>
#include <string>
#include <vector>

namespace {

using namespace tetromino::moe;

/// Runs `work` for half a second, at least three times, and prints the median and the spread (10th to 90th percentile)
/// of its processor time in milliseconds, and the rate of an optional count of things done.
template <class Work>
void time(const std::string& what, const Work& work, double things = 0, const char* unit = "") {
  std::vector<double> ms;
  const std::clock_t start = std::clock();
  do {
    const std::clock_t a = std::clock();
    work();
    ms.push_back(1e3 * static_cast<double>(std::clock() - a) / CLOCKS_PER_SEC);
  } while (ms.size() < 3 || std::clock() - start < CLOCKS_PER_SEC / 2);
  std::sort(ms.begin(), ms.end());
  const double median = ms[ms.size() / 2];
  fmt::print("{:<66} {:>10.3f} ms  ({:.3f} to {:.3f})", what, median, ms[ms.size() / 10], ms[ms.size() * 9 / 10]);
  if (things > 0) fmt::print("  {:.3g} {}", things / median * 1e3, unit);
  fmt::print("\n");
}

std::vector<double> skewed_loads(std::size_t layers, std::size_t experts) {
  reference::generator g(7);
  std::vector<double> out(layers * experts);
  for (double& x : out) x = std::floor(20000 * g.uniform() * g.uniform() * g.uniform());
  return out;
}

void balance() {
  fmt::print("\nbalanced, any shape, no two copies on a GPU (aim: 58 x 256 to 288 slots on 64 GPUs under 10 ms)\n");
  const auto strict = [](std::size_t layers, std::size_t experts, std::size_t nodes, std::size_t slots_per_node) {
    const std::vector<double> loads = skewed_loads(layers, experts);
    const topology t = topology::with_node_slots(nodes, 8, slots_per_node);
    time(fmt::format("{} layers x {} experts to {} slots, {} GPUs", layers, experts, t.slots(), t.gpus()), [&] {
      (void)balanced({layers, experts, loads}, t);
    });
  };
  strict(58, 256, 8, 36);
  for (const std::size_t layers : std::initializer_list<std::size_t>{15, 30, 60, 120}) strict(layers, 256, 8, 36);
  for (const std::size_t experts : std::initializer_list<std::size_t>{64, 128, 256, 512})
    strict(58, experts, 8, experts / 8 + 4);
  for (const std::size_t nodes : std::initializer_list<std::size_t>{2, 4, 8, 16, 32})
    strict(58, 256, nodes, 288 / nodes);

  fmt::print("\nbalanced_eplb: the index tensors of DeepSeek EPLB\n");
  const auto eplb = [](std::size_t layers, std::size_t experts, const eplb_options& o) {
    const std::vector<double> loads = skewed_loads(layers, experts);
    time(fmt::format("{} layers x {} experts to {} slots, {} groups, {} nodes, {} GPUs", layers, experts, o.replicas,
                     o.groups, o.nodes, o.gpus),
         [&] {
           (void)balanced_eplb({layers, experts, loads}, o);
         });
  };
  eplb(58, 256, {288, 8, 4, 32});
  eplb(58, 256, {288, 1, 18, 144});
  eplb(58, 256, {320, 1, 8, 64});
  eplb(58, 512, {576, 8, 8, 64});
}

void judge() {
  fmt::print("\nevaluate: exact cost of a placement on a trace, top-8\n");
  const auto run = [](std::size_t layers, std::size_t experts, std::size_t requests, std::size_t nodes,
                      std::size_t slots_per_node, const char* choice_name, replica_choice choice) {
    const trace t = synthetic_trace(layers, experts, requests, 0, 40);
    const topology cluster = topology::with_node_slots(nodes, 8, slots_per_node);
    const std::vector<double> loads = skewed_loads(layers, experts);
    const placement p = balanced({layers, experts, loads}, cluster);
    std::vector<std::uint32_t> sources(requests);
    for (std::size_t r = 0; r < requests; ++r) sources[r] = static_cast<std::uint32_t>(r % nodes);
    const double pairs = static_cast<double>(t.tokens() * layers * 8);
    cost_options options;
    options.replicas.choice = choice;
    time(
        fmt::format("{} tokens, {} layers x {} experts, {} nodes, {} slots, {}", t.tokens(), layers, experts, nodes,
                    cluster.slots(), choice_name),
        [&] { (void)evaluate(t.view(), p, cluster, sources, options); }, pairs, "pairs/s");
  };
  for (const std::size_t requests : std::initializer_list<std::size_t>{500, 1000, 2000})
    run(8, 128, requests, 8, 16, "no copies", replica_choice::nearest);
  for (const std::size_t layers : std::initializer_list<std::size_t>{16, 32})
    run(layers, 128, 500, 8, 16, "no copies", replica_choice::nearest);
  for (const std::size_t nodes : std::initializer_list<std::size_t>{2, 4, 16})
    run(8, 128, 1000, nodes, 128 / nodes, "no copies", replica_choice::nearest);
  run(8, 128, 1000, 8, 24, "64 copies, nearest", replica_choice::nearest);
  run(8, 128, 1000, 8, 24, "64 copies, even", replica_choice::even);
  run(8, 128, 1000, 8, 24, "64 copies, least loaded", replica_choice::least_loaded);
}

void collect() {
  fmt::print("\nprofile: adding tokens\n");
  const trace t = synthetic_trace(8, 128, 1000, 20, 20);
  const auto run = [&](const char* what, const profile_options& options) {
    profile p = profile::make(options);
    time(
        fmt::format("{} tokens, 8 layers x 128 experts, {} ({:.1f} MB)", t.tokens(), what,
                    static_cast<double>(p.memory_bytes()) * 1e-6),
        [&] { p.add(t.view()); }, static_cast<double>(t.tokens()), "tokens/s");
  };
  run("loads", {t.shape(), 0, 0, false, false});
  run("loads by domain and request", {t.shape(), 16, 1000, false, false});
  run("everything", {t.shape(), 16, 1000, true, true});

  fmt::print("\nmigrate: from one plan to the next\n");
  for (const std::size_t experts : std::initializer_list<std::size_t>{128, 256, 512}) {
    const topology cluster = topology::with_node_slots(8, 8, experts / 8 + 4);
    const std::vector<double> now = skewed_loads(58, experts);
    std::vector<double> later = now;
    std::rotate(later.begin(), later.begin() + 3, later.end());
    const placement from = balanced({58, experts, now}, cluster), to = balanced({58, experts, later}, cluster);
    time(fmt::format("58 layers x {} experts, 64 GPUs, {} moves", experts, migrate(from, to, cluster, 1).moves),
         [&] { (void)migrate(from, to, cluster, 1); });
  }
}

}  // namespace

int main() {
  balance();
  judge();
  collect();
}
