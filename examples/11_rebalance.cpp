/// A plan that keeps in step with the traffic, on recorded routing whose domains follow each other:
/// The loop is all that an engine adds; serving itself is left out.

#include <tetromino/moe/place.hpp>
#include <tetromino/moe/rebalance.hpp>
#include <tetromino/moe/trace_io.hpp>  // needs nlohmann-json

#include <algorithm>
#include <cstdio>
#include <vector>

namespace moe = tetromino::moe;

int main() {
  const moe::trace traffic = moe::read_trace("routing.safetensors");
  const moe::routing_shape shape = traffic.shape();
  std::vector<moe::request> requests(traffic.requests().begin(), traffic.requests().end());
  std::stable_sort(requests.begin(), requests.end(), [](const auto& a, const auto& b) { return a.domain < b.domain; });

  const moe::topology cluster = moe::topology::uniform(4, 1, (shape.experts + 3) / 4 + 1);
  moe::rebalance_options options;
  options.least_tokens = 1000;
  options.plan.price_per_move = 1;
  options.plan.effort = 0.05;  // of a short example
  moe::rebalancer loop = moe::rebalancer::make(moe::contiguous(shape.layers, shape.experts, cluster), cluster, options);
  moe::recorder recorder = moe::recorder::make({shape, 16384});

  for (std::size_t served = 0; served < requests.size(); ++served) {
    const moe::request& r = requests[served];
    for (std::uint64_t t = r.first_token; t < r.first_token + r.tokens; ++t) {  // the engine: a pass of one token
      const bool prefill = t < r.first_token + r.prefill_length;
      const moe::recorded_row row{served, prefill ? moe::phase::prefill : moe::phase::decode};
      recorder.add_pass({&row, 1}, traffic.view().token(t));
    }
    if (served % 20 != 19) continue;

    const double running = 2000;  // the engine: tokens still to come of requests that run, and stay on their nodes
    const moe::rebalance_report seen = loop.consider(recorder, running);
    std::printf("%3zu requests: %.2f nodes/token, imbalance %.2f, divergence %.3f", served + 1, seen.nodes_per_token,
                seen.node_imbalance, seen.divergence);
    if (seen.verdict == moe::rebalance_verdict::new_plan) {
      std::printf("; new plan: %.2f, %zu experts move", seen.planned_nodes_per_token, seen.way.moves);
    }
    std::printf("\n");
    while (const moe::layer_migration* layer = loop.next_layer()) {
      for (const moe::migration_round& round : layer->rounds) {
        static_cast<void>(round);  // the engine: send the weights of round.moves beside those in use (12_migrate)
      }
      loop.commit_layer();
    }
  }
}
