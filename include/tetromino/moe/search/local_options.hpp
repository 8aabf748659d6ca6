#pragma once

#include "../../detail/macros_off.hpp"

#include "../../execution.hpp"  // executor_ref
#include "../placement.hpp"     // placement
#include "../trace.hpp"         // phase

#include <cstddef>     // std::size_t
#include <cstdint>     // std::uint32_t, std::uint64_t
#include <functional>  // std::function
#include <span>        // std::span
#include <utility>     // std::move
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// Where a running search stands.
struct local_progress {
  std::size_t step = 0;   ///< steps done
  std::size_t steps = 0;  ///< of so many
  double nodes_per_token = 0;
  double remote_pair_fraction = 0;
  double node_imbalance = 0;  ///< mean over layers
  double seconds = 0;         ///< since the search began
};

/// What `local` looks for and how long. The two weights state what matters: other nodes per token where the exchange
/// sends one copy per node, remote pairs where it sends one per expert, or a mix; only their ratio counts.
struct local_options {
  double node_weight = 1;
  double pair_weight = 0;

  /// Limits on max / mean over nodes and over GPUs, in each layer, on the calibration tokens, those of domains weighed
  /// (see `local`); other requests come out up to a tenth above, less where copies are chosen by load
  /// (`replica_options::node_limit`). 0: no limit. A GPU limit is met with spare slots, as far as they go.
  double node_imbalance = 1.02;
  double gpu_imbalance = 0;

  bool replicas = true;              ///< fill spare slots with copies; else they stay empty
  phase served = phase::decode;      ///< whose traffic and load is counted
  double token_budget = 1.05;        ///< max / mean of tokens over source nodes, by the speed of their live GPUs
  std::size_t nodes_per_expert = 1;  ///< copies of each expert on at least so many nodes: none is lost with a node

  /// Plan in force, to start from and to keep unless there is a better one. It may lack experts, after the loss of a
  /// GPU (see carry_over).
  const placement* start = nullptr;

  /// Layers that may change; all others stay as they are in `start`, which then has to hold each expert. None: all may.
  /// Requests are grouped for all layers, whichever change.
  std::span<const std::uint32_t> layers{};

  /// What a copy that was not on its node in `start` must save to be worth its move, in visits (or pairs) per 1,000
  /// tokens of its layer.
  double price_per_move = 0;

  executor_ref executor{};  ///< layers are searched on its threads: the plan is the same on any number of them
  std::uint64_t seed = 1;
  double effort = 1;                    ///< scales the number of proposals
  std::uint64_t max_proposals = 0;      ///< per layer; 0: as many as effort says
  std::size_t sample_tokens = 16'384;   ///< tokens that the search looks at
  std::size_t sample_requests = 1'024;  ///< requests that they come from

  /// Seconds after which the search hurries to its end; 0: none. A search that this cuts short depends on the
  /// machine; all others give the same plan everywhere.
  double time_limit_seconds = 0;
  std::function<bool(const local_progress&)> progress{};  ///< called after each step; false ends the search
};

namespace detail::inline TETROMINO_ISA {

/// A copy, member by member: the constructor that a compiler adds has no tag (see TETROMINO_ABI).
[[nodiscard]] inline local_options copy_of(const local_options& o) {
  const auto& [node_weight, pair_weight, node_imbalance, gpu_imbalance, replicas, served, token_budget,
               nodes_per_expert, start, layers, price_per_move, executor, seed, effort, max_proposals, sample_tokens,
               sample_requests, time_limit_seconds, progress] = o;
  return {node_weight,      pair_weight,   node_imbalance,  gpu_imbalance,      replicas, served, token_budget,
          nodes_per_expert, start,         layers,          price_per_move,     executor, seed,   effort,
          max_proposals,    sample_tokens, sample_requests, time_limit_seconds, progress};
}

}  // namespace detail::inline TETROMINO_ISA

/// A placement and the node on which each request of the calibration runs, made for each other.
struct local_plan {
  placement experts;
  std::vector<std::uint32_t> source_of_request;  ///< [requests of the view] node
  local_progress reached;                        ///< on the sampled calibration tokens
  std::size_t copies_moved = 0;                  ///< copies on nodes that had none in `start`

  TETROMINO_ABI local_plan(placement where, std::vector<std::uint32_t> sources, const local_progress& found = {},
                           std::size_t moved = 0)
      : experts(std::move(where)), source_of_request(std::move(sources)), reached(found), copies_moved(moved) {}
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI local_plan(const local_plan&) = default;
  TETROMINO_ABI local_plan(local_plan&&) = default;
  TETROMINO_ABI local_plan& operator=(const local_plan&) = default;
  TETROMINO_ABI local_plan& operator=(local_plan&&) = default;
};

}  // namespace TETROMINO_NAMESPACE::moe

#include "../../detail/macros_back.hpp"
