#pragma once

/// Where experts lie and documents run: by name, or from what the router chooses for the beginnings of documents.

#include "engine.hpp"

#include <tetromino/moe/place.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/placement.hpp>

#include <fmt/format.h>

#include <fstream>
#include <limits>
#include <sstream>

namespace moe_lm {

/// A placement and where each document runs.
struct plan {
  moe::placement placement;
  std::vector<std::uint32_t> source_of_document;
};

/// Documents of a node to its ranks that have slots in `serving`, the longest first, each to the rank with the fewest
/// tokens.
inline std::vector<std::uint32_t> ranks_of(const workplace& w, const moe::topology& serving,
                                           std::span<const std::size_t> which,
                                           const std::vector<std::uint32_t>& node_of_document) {
  const auto tokens = [&](std::size_t d) { return w.tokens_of(d, std::string::npos).size(); };
  std::vector<std::size_t> order(which.begin(), which.end()), load(w.mpi.ranks());
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return tokens(a) > tokens(b); });
  std::vector<std::uint32_t> rank(w.chosen.size());
  for (std::size_t r = 0; r < load.size(); ++r) {
    if (serving.slots_on_gpu(r) == 0) load[r] = std::numeric_limits<std::size_t>::max();
  }
  for (const std::size_t d : order) {
    const std::size_t first = serving.first_gpu(node_of_document[d]);
    const auto loads = std::span(load).subspan(first, serving.gpus_on_node(node_of_document[d]));
    const auto lightest = std::min_element(loads.begin(), loads.end());
    *lightest += tokens(d);
    rank[d] = static_cast<std::uint32_t>(first + static_cast<std::size_t>(lightest - loads.begin()));
  }
  return rank;
}

/// Runs the beginnings of documents, each where `source` says: what the router chose, on all ranks; a request for each
/// of `which`.
inline moe::trace routing_of_beginnings(const workplace& w, engine& e, std::span<const std::size_t> which,
                                        std::span<const std::uint32_t> source) {
  const outcome ran = e.run(which, source, w.options.prefill, "prefill");
  std::vector<std::uint16_t> ids;
  for (const auto& of_rank : w.mpi.gather(ran.ids)) ids.insert(ids.end(), of_rank.begin(), of_rank.end());
  std::vector<moe::request> requests(which.size());
  std::uint64_t first_token = 0;
  for (std::size_t rank = 0; rank < w.mpi.ranks(); ++rank) {
    for (std::size_t r = 0; r < which.size(); ++r) {
      if (source[which[r]] != rank) continue;
      const auto tokens = static_cast<std::uint32_t>(w.tokens_of(which[r], w.options.prefill).size());
      requests[r] = {first_token, tokens, tokens, 0};
      first_token += tokens;
    }
  }
  return moe::trace::make(routing_of(w.size), std::move(ids), std::move(requests));
}

/// Runs the beginning of every document with contiguous experts and plans with what the router chose.
inline plan plan_from_prefill(const workplace& w, const model& m) {
  engine before(w, m, moe::contiguous(w.size.layers, w.size.experts, w.cluster));
  const moe::trace seen = routing_of_beginnings(w, before, w.all(), w.in_turn());
  const moe::routing_shape& shape = seen.shape();
  if (w.options.placement == "balanced") {
    std::vector<double> loads(w.size.layers * w.size.experts);
    const auto ids = seen.view().ids;
    for (std::size_t i = 0; i < ids.size(); ++i)
      ++loads[i / shape.experts_per_token % shape.layers * shape.experts + ids[i]];
    return {moe::balanced({shape.layers, shape.experts, loads}, w.cluster), w.in_turn()};
  }
  moe::local_options options;
  options.served = moe::phase::prefill;
  plan out;
  w.mpi.together("moe_engine", [&] {  // the same plan everywhere: the search depends on its seed alone
    const moe::local_plan found = moe::local(seen.view(), w.cluster, options);
    out = {found.experts, ranks_of(w, w.cluster, w.all(), found.source_of_request)};
  });
  return out;
}

inline plan plan_by_name(const workplace& w, const model& m) {
  const std::string& name = w.options.placement;
  if (name == "contiguous") return {moe::contiguous(w.size.layers, w.size.experts, w.cluster), w.in_turn()};
  if (name == "balanced" || name == "local") return plan_from_prefill(w, m);
  plan out{{}, w.in_turn()};
  w.mpi.together("moe_engine", [&] {
    std::ifstream in(name);
    std::stringstream written;
    if (!(written << in.rdbuf())) {
      throw error(errc::io, fmt::format("--placement {}: expected contiguous, balanced, local or a file that can be "
                                        "read",
                                        name));
    }
    out.placement = moe::placement_from_text(written.str());
    if (out.placement.layers() != w.size.layers || out.placement.experts() != w.size.experts) {
      throw error(errc::shape_mismatch,
                  fmt::format("{}: expected a placement of {} layers × {} experts, as the model has, got {} × {}", name,
                              w.size.layers, w.size.experts, out.placement.layers(), out.placement.experts()));
    }
    moe::validate(out.placement, w.cluster);
  });
  return out;
}

}  // namespace moe_lm
