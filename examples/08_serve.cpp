// A serving loop: requests find their node, tokens their experts.
#include <tetromino/moe/dispatch.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/replica.hpp>
#include <tetromino/moe/router.hpp>
#include <tetromino/moe/trace_io.hpp>  // needs nlohmann-json

#include <cstdio>
#include <vector>

int main(int argc, char** argv) {
  namespace moe = tetromino::moe;
  const moe::trace recorded = moe::read_trace(argc > 1 ? argv[1] : "routing.safetensors");
  const moe::routing_shape& shape = recorded.shape();
  const auto cluster = moe::topology::with_node_slots(4, 2, shape.experts / 4 + 2);
  const std::vector<double> loads(shape.layers * shape.experts, 1.0);  // nothing known yet
  const moe::placement current = moe::balanced({shape.layers, shape.experts, loads}, cluster);

  // A request arrives: its prompt says on which node it belongs.
  const auto affinity = moe::node_affinity::make(current, cluster, recorded.view());
  moe::online_grouper grouper(affinity);  // within a budget of tokens for each node; group() puts many at once
  const moe::request& arrived = recorded.requests()[0];
  moe::signature_builder prompt = affinity.builder();  // or add() its tokens as they are prefilled
  const auto signature = moe::signature_of(recorded.view(), arrived, prompt);
  const std::uint32_t node = grouper.assign(signature, arrived.tokens);

  // A batch of tokens in one layer: logits to experts, experts to the GPUs that hold them, and what to send to whom.
  const std::size_t tokens = 32, k = shape.experts_per_token;
  std::vector<float> logits(tokens * shape.experts), weights(tokens * k);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = float(i * 2654435761u % 1000) / 100;
  std::vector<std::uint16_t> ids(tokens * k);  // or your router's: integers of any type, -1 for nobody
  moe::route(logits, shape.experts, {.experts_per_token = k}, ids, weights);
  const moe::replica_index copies(current);
  moe::replica_chooser chooser(current, cluster);
  std::vector<std::uint32_t> gpus(tokens * k), rank_of_slot(cluster.slots());
  for (std::size_t t = 0; t < tokens; ++t) {
    chooser.choose(0, std::span(ids).subspan(t * k, k), std::uint32_t(cluster.first_gpu(node)),
                   std::span(gpus).subspan(t * k, k));
  }
  std::vector<moe::expert_call> calls(tokens * k);
  moe::make_calls(copies, cluster, 0, ids, weights, gpus, calls);
  moe::ranks_of_slots(cluster, rank_of_slot);
  moe::dispatch_plan plan(cluster.gpus(), k);
  plan.plan_send(calls, rank_of_slot, moe::row_copies::per_rank);
  std::printf("from node %u, rows to each rank:", node);
  for (const std::int32_t rows : plan.send_counts()) std::printf(" %d", rows);  // as MPI_Alltoallv wants them
  std::printf("\n");
  grouper.release(node, arrived.tokens);  // when the request has ended
}
