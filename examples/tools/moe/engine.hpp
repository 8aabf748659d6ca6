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
  std::size_t nodes = 1, replicas = 0, documents = 0, prefill = 64, batch = 2048;
  bool compare = false;
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
  /// Documents to ranks in turn, as engines do.
  [[nodiscard]] std::vector<std::uint32_t> in_turn() const {
    std::vector<std::uint32_t> source(chosen.size());
    for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::uint32_t>(i % mpi.ranks());
    return source;
  }
  [[nodiscard]] std::span<const std::uint32_t> tokens_of(std::size_t i, std::size_t at_most) const {
    const auto all = text.tokens_of(chosen[i]);
    return all.first(std::min(all.size(), at_most));
  }
};

/// Bytes over each kind of link.
struct traffic {
  std::uint64_t between_nodes = 0, inside_nodes = 0;
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
  std::vector<double> losses;  // −log p of each chosen document, on all ranks
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

/// Experts where a placement puts them, and everything that runs documents through them.
class engine {
 public:
  engine(const workplace& w, const model& m, const moe::placement& p)
      : w_(w),
        model_(m),
        index_(p),
        chooser_(p, w.cluster),
        exchange_(MPI_COMM_WORLD),
        dispatcher_(exchange_, w.cluster, m.size.top_k, route_of(w.options.route)),
        evaluator_(m) {
    const std::size_t first = w.cluster.first_slot(w.rank()), slots = w.cluster.slots_on_gpu(w.rank());
    for (std::size_t l = 0; l < m.size.layers; ++l) {
      held_.push_back(p.layer(l).subspan(first, slots));
      experts_.emplace_back(w.model_file, m.size, m.rounding, l, held_.back());
      replicated_.push_back(false);
      for (std::size_t e = 0; e < m.size.experts; ++e) {
        if (index_.slots_of(l, e).size() > 1) replicated_.back() = true;
      }
    }
  }

  /// Evaluates the chosen documents, at most `at_most` tokens of each, where source_of_document says.
  outcome run(std::span<const std::uint32_t> source_of_document, std::size_t at_most, const char* label) {
    outcome out;
    out.losses.assign(w_.chosen.size(), 0.0);
    const auto batches = my_batches(source_of_document, at_most, out);
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
      }
    }
    w_.mpi.wait_for_all();
    out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    w_.mpi.add_up(out.losses);
    for (std::size_t i = 0; i < w_.chosen.size(); ++i) out.tokens += w_.tokens_of(i, at_most).size();
    out.measured = carried(w_);
    return out;
  }

 private:
  /// This rank's documents in batches of about `batch` tokens.
  [[nodiscard]] std::vector<std::vector<std::size_t>> my_batches(std::span<const std::uint32_t> source,
                                                                 std::size_t at_most, outcome& out) const {
    std::vector<std::vector<std::size_t>> batches;
    std::size_t tokens = 0;
    for (std::size_t i = 0; i < w_.chosen.size(); ++i) {
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
    evaluator_(
        tokens,
        [&](std::size_t layer, std::span<const float> x, std::span<const std::uint16_t> ids,
            std::span<const float> weights, std::span<float> y) {
          const std::size_t k = model_.size.top_k;
          for (std::size_t t = 0; t < tags_.size(); ++t) {
            std::copy_n(ids.data() + t * k, k, out.ids.data() + base + (t * model_.size.layers + layer) * k);
          }
          run_experts(layer, x, ids, weights, y);
        },
        losses);
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
    for (std::size_t s = 0; s < held_[layer].size(); ++s) {
      for (std::size_t i = plan.expert_offsets()[s]; i < plan.expert_offsets()[s + 1]; ++i) {
        groups_[i] = static_cast<std::uint32_t>(static_cast<std::size_t>(held_[layer][s]) * documents +
                                                dispatcher_.received_tags()[plan.expert_rows()[i]]);
      }
    }
    row_groups groups{groups_, model_.size.experts * documents};
    if (replicated_[layer]) groups.agree = [&](std::span<float> amax) { w_.mpi.largest(amax); };
    const auto answers = runner_(experts_[layer], model_.rounding, rows_, plan.expert_offsets(), groups);
    dispatcher_.try_combine(answers, y, width).value();
  }

  const workplace& w_;
  const model& model_;
  moe::replica_index index_;
  moe::replica_chooser chooser_;
  tetromino::comm::mpi_exchange exchange_;
  tetromino::comm::dispatcher<tetromino::comm::mpi_exchange> dispatcher_;
  evaluator evaluator_;
  expert_runner runner_;
  std::vector<std::span<const std::int32_t>> held_;  // [layers][slots of this rank]
  std::vector<expert_weights> experts_;              // [layers]
  std::vector<bool> replicated_;                     // [layers]
  std::uint32_t documents_per_rank_ = 1;
  std::vector<std::uint32_t> tags_, gpus_, groups_;
  std::vector<moe::expert_call> calls_;
  std::vector<float> rows_;
};

}  // namespace moe_lm
