#pragma once

/// A run of documents over ranks: each runs attention for its own documents and holds its own experts.

#include "../command_line.hpp"
#include "../input_statistics.hpp"
#include "../ui.hpp"
#include "model.hpp"
#include "mpi_session.hpp"

#include <tetromino/comm/dispatcher.hpp>
#include <tetromino/comm/mpi.hpp>
#include <tetromino/moe/dispatch.hpp>
#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/recorder.hpp>
#include <tetromino/moe/replica.hpp>

#include <chrono>

namespace moe_lm {

namespace moe = tetromino::moe;

/// What the program was asked to do.
struct settings {
  std::string model, text;
  std::string weights = "float32", activations = "float32";
  std::string placement = "contiguous";
  std::string route = "per-node";
  std::string losses;
  std::string calibrate, statistics, half;
  std::size_t nodes = 1, replicas = 0, documents = 0, prefill = 64, batch = 2048, rebalance = 0;
  std::optional<std::uint32_t> drain;  // a rank that leaves
  bool rejoin = false, compare = false;
  ui::output_options print;
};

/// Documents that say what goes into the weights.
struct calibration_text {
  documents text;
  std::vector<std::size_t> chosen;
};

/// The whole run's setting, the same on every rank.
struct workplace {
  const settings& options;
  const mpi::session& mpi;
  const io::safetensors_file& model_file;
  const shape& size;
  const documents& text;
  const std::vector<std::size_t>& chosen;  // which documents are evaluated
  const moe::topology& cluster;
  const calibration_text* calibration;  // if there is any

  [[nodiscard]] std::size_t rank() const { return mpi.rank(); }
  /// Documents to ranks in turn, as engines do; to those that have slots in `serving`.
  [[nodiscard]] std::vector<std::uint32_t> in_turn(const moe::topology& serving) const {
    std::vector<std::uint32_t> ranks, source(chosen.size());
    for (std::uint32_t rank = 0; rank < serving.gpus(); ++rank) {
      if (serving.slots_on_gpu(rank) > 0) ranks.push_back(rank);
    }
    for (std::size_t i = 0; i < source.size(); ++i) source[i] = ranks[i % ranks.size()];
    return source;
  }
  [[nodiscard]] std::vector<std::uint32_t> in_turn() const { return in_turn(cluster); }
  [[nodiscard]] std::vector<std::size_t> all() const {
    std::vector<std::size_t> which(chosen.size());
    std::iota(which.begin(), which.end(), std::size_t{0});
    return which;
  }
  [[nodiscard]] std::span<const std::uint32_t> tokens_of(std::size_t i, std::size_t at_most) const {
    const auto all = text.tokens_of(chosen[i]);
    return all.first(std::min(all.size(), at_most));
  }
};

/// Bytes over each kind of link.
struct traffic {
  std::uint64_t between_nodes = 0, inside_nodes = 0;

  traffic& operator+=(const traffic& other) {
    between_nodes += other.between_nodes;
    inside_nodes += other.inside_nodes;
    return *this;
  }
};

/// What MPI has been handed for other ranks since the last call.
inline traffic carried(const workplace& w) {
  std::array<std::uint64_t, 2> bytes{};
  for (std::size_t r = 0; r < w.mpi.ranks(); ++r) {
    if (r == w.rank()) continue;
    bytes[w.cluster.node_of_gpu(r) == w.cluster.node_of_gpu(w.rank())] += mpi::carried_to()[r];
  }
  mpi::carried_to().assign(w.mpi.ranks(), 0);
  w.mpi.add_up(bytes);
  return {bytes[0], bytes[1]};
}

/// What came of running documents.
struct outcome {
  std::vector<double> losses;  // −log p of each chosen document that ran, on all ranks; 0 of the others
  double seconds = 0;
  std::uint64_t tokens = 0;
  std::vector<std::size_t> mine;    // the documents of this rank, in the order in which they ran
  std::vector<std::uint16_t> ids;   // [tokens of mine, layers, top_k]: the experts that the router chose
  std::vector<moe::request> spans;  // of mine, in `ids`
  traffic measured;
};

inline moe::routing_shape routing_of(const shape& s) { return {s.layers, s.experts, s.top_k}; }

inline tetromino::comm::dispatch_route route_of(const std::string& name) {
  using enum tetromino::comm::dispatch_route;
  return name == "per-node" ? per_node : name == "per-rank" ? per_rank : per_expert;
}

/// Who watches a run, all ranks alike.
struct watchers {
  std::function<void()> between{};  // called after each step
  moe::recorder* seen = nullptr;    // what the router chooses
};

/// Experts where a placement puts them, and everything that runs documents through them.
class engine {
 public:
  engine(const workplace& w, const model& m, const moe::placement& p)
      : w_(w),
        model_(m),
        placement_(p),
        index_(p),
        chooser_(p, w.cluster),
        exchange_(MPI_COMM_WORLD),
        dispatcher_(exchange_, w.cluster, m.size.top_k, route_of(w.options.route)),
        evaluator_(m) {
    for (std::size_t l = 0; l < m.size.layers; ++l) experts_.emplace_back(w.model_file, m.size, m.rounding, l, held(l));
  }

  /// Evaluates documents of those chosen, at most `at_most` tokens of each, where source_of_document[chosen] says.
  outcome run(std::span<const std::size_t> which, std::span<const std::uint32_t> source_of_document,
              std::size_t at_most, const char* label, const watchers& watched = {}) {
    outcome out;
    seen_ = watched.seen;
    out.losses.assign(w_.chosen.size(), 0.0);
    const auto batches = my_batches(which, source_of_document, at_most, out);
    std::uint64_t longest = 0;
    for (const auto& b : batches) longest = std::max<std::uint64_t>(longest, b.size());
    documents_per_rank_ = static_cast<std::uint32_t>(w_.mpi.largest(longest));
    const std::uint64_t steps = w_.mpi.largest(batches.size());
    static_cast<void>(carried(w_));
    w_.mpi.wait_for_all();
    const auto start = std::chrono::steady_clock::now();
    {
      std::optional<ui::progress> progress;
      if (w_.mpi.is_first()) progress.emplace(label, steps, w_.options.print.quiet);
      for (std::uint64_t i = 0; i < steps; ++i) {
        step(i < batches.size() ? batches[i] : std::vector<std::size_t>{}, at_most, out);
        if (progress) progress->add(1);
        if (!watched.between) continue;
        out.measured += carried(w_);
        watched.between();
      }
    }
    w_.mpi.wait_for_all();
    out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    w_.mpi.add_up(out.losses);
    for (const std::size_t i : which) out.tokens += w_.tokens_of(i, at_most).size();
    out.measured += carried(w_);
    return out;
  }

  /// Experts that each rank holds, all layers together: [ranks].
  [[nodiscard]] std::vector<std::size_t> experts_on_ranks() const {
    std::vector<std::size_t> held(w_.mpi.ranks(), 0);
    for (std::size_t l = 0; l < placement_.layers(); ++l) {
      for (std::size_t s = 0; s < placement_.slots(); ++s) {
        if (placement_.layer(l)[s] != moe::empty_slot) ++held[w_.cluster.gpu_of_slot(s)];
      }
    }
    return held;
  }

  /// The bytes of one expert's weights in one layer.
  [[nodiscard]] std::size_t bytes_of_expert() { return experts_.front().take(0).size(); }

  /// Carries weights to where `next` has them in a layer, round by round beside those in use, and serves the layer as
  /// `next` says from then on. What went over the links.
  traffic migrate(const moe::layer_migration& way, const moe::placement& next) {
    static_cast<void>(carried(w_));
    const auto me = static_cast<std::uint32_t>(w_.rank());
    const std::size_t first_slot = w_.cluster.first_slot(me);
    std::vector<std::pair<std::size_t, std::vector<std::byte>>> arrived;
    for (const moe::migration_round& round : way.rounds) {
      std::vector<std::byte> out, in;
      std::optional<std::size_t> to, from;
      for (const moe::expert_move& m : round.moves) {
        if (m.from_gpu == me) {
          const auto mine = held(way.layer);
          const auto slot = std::find(mine.begin(), mine.end(), static_cast<std::int32_t>(m.expert)) - mine.begin();
          out = experts_[way.layer].take(static_cast<std::size_t>(slot));
          to = m.to_gpu;
        }
        if (m.to_gpu == me) {
          in.resize(bytes_of_expert());
          from = m.from_gpu;
        }
      }
      w_.mpi.pass_on(out, to, in, from);
      for (const moe::expert_move& m : round.moves) {
        if (m.to_gpu == me) arrived.emplace_back(m.to_slot - first_slot, std::move(in));
      }
    }
    for (const auto& [slot, bytes] : arrived) experts_[way.layer].put(slot, bytes);
    std::copy(next.layer(way.layer).begin(), next.layer(way.layer).end(), placement_.layer(way.layer).begin());
    index_ = moe::replica_index(placement_);
    chooser_ = moe::replica_chooser(placement_, w_.cluster);
    return carried(w_);
  }

 private:
  /// This rank's documents in batches of about `batch` tokens.
  [[nodiscard]] std::vector<std::vector<std::size_t>> my_batches(std::span<const std::size_t> which,
                                                                 std::span<const std::uint32_t> source,
                                                                 std::size_t at_most, outcome& out) const {
    std::vector<std::vector<std::size_t>> batches;
    std::size_t tokens = 0;
    for (const std::size_t i : which) {
      if (source[i] != w_.rank()) continue;
      out.mine.push_back(i);
      const std::size_t size = w_.tokens_of(i, at_most).size();
      if (batches.empty() || tokens + size > w_.options.batch) {
        batches.emplace_back();
        tokens = 0;
      }
      batches.back().push_back(i);
      tokens += size;
    }
    return batches;
  }

  void step(const std::vector<std::size_t>& batch, std::size_t at_most, outcome& out) {
    std::vector<std::span<const std::uint32_t>> tokens;
    std::vector<double> losses(batch.size());
    tags_.clear();
    const std::size_t ids_per_token = routing_of(model_.size).ids_per_token(), base = out.ids.size();
    for (std::size_t d = 0; d < batch.size(); ++d) {
      tokens.push_back(w_.tokens_of(batch[d], at_most));
      out.spans.push_back(
          {out.ids.size() / ids_per_token + tags_.size(), static_cast<std::uint32_t>(tokens.back().size()), 0, 0});
      tags_.insert(tags_.end(), tokens.back().size(),
                   static_cast<std::uint32_t>(w_.rank()) * documents_per_rank_ + static_cast<std::uint32_t>(d));
    }
    out.ids.resize(base + tags_.size() * ids_per_token);
    if (seen_ != nullptr) {
      std::vector<moe::recorded_row> rows;
      for (std::size_t d = 0; d < batch.size(); ++d) {
        rows.insert(rows.end(), tokens[d].size(), {batch[d], moe::phase::prefill});
      }
      seen_->begin_pass(rows);
    }
    evaluator_(
        tokens,
        [&](std::size_t layer, std::span<const float> x, std::span<const std::uint16_t> ids,
            std::span<const float> weights, std::span<float> y) {
          const std::size_t k = model_.size.top_k;
          for (std::size_t t = 0; t < tags_.size(); ++t) {
            std::copy_n(ids.data() + t * k, k, out.ids.data() + base + (t * model_.size.layers + layer) * k);
          }
          if (seen_ != nullptr) seen_->add_layer(layer, ids);
          run_experts(layer, x, ids, weights, y);
        },
        losses);
    if (seen_ != nullptr) seen_->end_pass();
    for (std::size_t d = 0; d < batch.size(); ++d) out.losses[batch[d]] = losses[d];
  }

  void run_experts(std::size_t layer, std::span<const float> x, std::span<const std::uint16_t> ids,
                   std::span<const float> weights, std::span<float> y) {
    const std::size_t k = model_.size.top_k, width = model_.size.hidden;
    gpus_.resize(ids.size());
    calls_.resize(ids.size());
    for (std::size_t t = 0; t < ids.size(); t += k) {
      chooser_.choose(layer, ids.subspan(t, k), static_cast<std::uint32_t>(w_.rank()), std::span(gpus_).subspan(t, k));
    }
    moe::make_calls(index_, w_.cluster, layer, ids, weights, gpus_, calls_);
    dispatcher_.template try_dispatch<float>(calls_, x, tags_, width).value();

    const moe::dispatch_plan& plan = dispatcher_.plan();
    rows_.resize(plan.expert_rows().size() * width);
    moe::gather_rows(plan.expert_rows(), dispatcher_.template received_rows<float>(), std::span(rows_), width);
    // rows of one document that meet one expert share a tensor scale, on whichever copies of it
    const std::size_t documents = documents_per_rank_ * w_.mpi.ranks();
    groups_.resize(plan.expert_rows().size());
    const auto experts = held(layer);
    for (std::size_t s = 0; s < experts.size(); ++s) {
      for (std::size_t i = plan.expert_offsets()[s]; i < plan.expert_offsets()[s + 1]; ++i) {
        groups_[i] = static_cast<std::uint32_t>(static_cast<std::size_t>(experts[s]) * documents +
                                                dispatcher_.received_tags()[plan.expert_rows()[i]]);
      }
    }
    row_groups groups{groups_, model_.size.experts * documents};
    if (is_replicated(layer)) groups.agree = [&](std::span<float> amax) { w_.mpi.largest(amax); };
    const auto answers = runner_(experts_[layer], model_.rounding, rows_, plan.expert_offsets(), groups);
    dispatcher_.try_combine(answers, y, width).value();
  }

  /// The experts in this rank's slots.
  [[nodiscard]] std::span<const std::int32_t> held(std::size_t layer) const {
    return placement_.layer(layer).subspan(w_.cluster.first_slot(w_.rank()), w_.cluster.slots_on_gpu(w_.rank()));
  }
  [[nodiscard]] bool is_replicated(std::size_t layer) const {
    for (std::size_t e = 0; e < model_.size.experts; ++e) {
      if (index_.slots_of(layer, e).size() > 1) return true;
    }
    return false;
  }

  const workplace& w_;
  const model& model_;
  moe::placement placement_;
  moe::replica_index index_;
  moe::replica_chooser chooser_;
  tetromino::comm::mpi_exchange exchange_;
  tetromino::comm::dispatcher<tetromino::comm::mpi_exchange> dispatcher_;
  evaluator evaluator_;
  expert_runner runner_;
  std::vector<expert_weights> experts_;  // [layers]
  moe::recorder* seen_ = nullptr;
  std::uint32_t documents_per_rank_ = 1;
  std::vector<std::uint32_t> tags_, gpus_, groups_;
  std::vector<moe::expert_call> calls_;
  std::vector<float> rows_;
};

}  // namespace moe_lm
