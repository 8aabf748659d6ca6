#pragma once

/// Gathers the statistics of a model's inputs: the example model over calibration documents, in one process. In one
/// stream the model is float throughout. In two, for weights that are packed with error feedback, a second model runs
/// beside it whose weights are packed as soon as the statistics of their input are there, and whose activations are
/// rounded: each layer is calibrated on what will reach it.

#include "model.hpp"

#include <numeric>

namespace moe_lm {

/// Rows [tokens, width] in the order of the experts that they are routed to.
class expert_order {
 public:
  expert_order(std::span<const std::uint16_t> ids, std::size_t experts, std::size_t top_k)
      : top_k_(top_k), offsets_(experts + 1), expert_(ids.size()), place_(ids.size()) {
    for (const std::uint16_t e : ids) ++offsets_[e + 1u];
    std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
    std::vector<std::uint32_t> next(offsets_.begin(), offsets_.end() - 1);
    for (std::size_t i = 0; i < ids.size(); ++i) expert_[place_[i] = next[ids[i]]++] = ids[i];
  }

  /// The rows of expert e are offsets[e] … offsets[e + 1] − 1.
  [[nodiscard]] std::span<const std::uint32_t> offsets() const { return offsets_; }
  /// Rows of one document that meet one expert share a tensor scale.
  [[nodiscard]] row_groups groups() const { return {expert_, offsets_.size() - 1}; }

  [[nodiscard]] std::vector<float> gather(std::span<const float> x, std::size_t width) const {
    std::vector<float> out(place_.size() * width);
    for (std::size_t i = 0; i < place_.size(); ++i) {
      std::copy_n(x.data() + i / top_k_ * width, width, out.data() + place_[i] * width);
    }
    return out;
  }
  /// Σ weight · answer for each token.
  [[nodiscard]] std::vector<float> combine(std::span<const float> answers, std::span<const float> weights,
                                           std::size_t width) const {
    std::vector<float> out(place_.size() / top_k_ * width);
    for (std::size_t i = 0; i < place_.size(); ++i) {
      for (std::size_t c = 0; c < width; ++c) {
        out[i / top_k_ * width + c] += weights[i] * answers[place_[i] * width + c];
      }
    }
    return out;
  }

 private:
  std::size_t top_k_;
  std::vector<std::uint32_t> offsets_, expert_, place_;
};

/// Documents on their way through the layers. Between two steps it keeps two rows [hidden] of each token for each
/// stream; the weights of experts are there a layer at a time.
class calibrator {
 public:
  /// Two streams where `p` packs weights with error feedback. What work can be split is split over the executor; the
  /// statistics are the same on any.
  calibrator(const io::safetensors_file& file, const documents& text, std::span<const std::size_t> chosen,
             const precision& p, tetromino::executor_ref executor)
      : file_(file), text_(text), chosen_(chosen), executor_(executor), packed_(p), held_(shape(file).experts) {
    std::iota(held_.begin(), held_.end(), 0);
    packed_.seen = &out_;
    for (std::size_t i = 0; i < (p.weights && p.weights->error_feedback ? 2 : 1); ++i) {
      streams_.push_back({model(file, precision{}), {}, std::vector<passage>(chosen.size())});
      if (i == 1) streams_[i].whole.rounding = packed_;
      for (std::size_t d = 0; d < chosen.size(); ++d) {
        evaluator run(streams_[i].whole);
        start(run, d);
        streams_[i].documents[d].residual = run.residual();
      }
    }
  }

  /// `done(layer)` is called after each layer.
  template <class Done>
  input_statistics run(const Done& done) {
    const shape& s = streams_[0].whole.size;
    for (std::size_t l = 0; l < s.layers; ++l) {
      for (const char* part : {"attn.q", "attn.k", "attn.v", "attn.o", "moe.gate", "moe.up", "moe.down"}) {
        out_.name(tensor_name(l, part), input_of(l, part));
      }
      for (stream& st : streams_) st.experts = expert_weights(file_, s, precision{}, l, held_);
      gather(input_of(l, "attn.q"), 1, s.hidden, [&](std::size_t d) { return into_attention(l, d); });
      pack(l, {"attn.q", "attn.k", "attn.v"});
      gather(input_of(l, "attn.o"), 1, s.hidden, [&](std::size_t d) { return into_output(l, d); });
      pack(l, {"attn.o"});
      gather(input_of(l, "moe.gate"), s.experts, s.hidden, [&](std::size_t d) { return into_experts(l, d); });
      pack(l, {"moe.gate", "moe.up"});
      gather(input_of(l, "moe.down"), s.experts, s.expert_hidden, [&](std::size_t d) { return into_down(l, d); });
      pack(l, {"moe.down"});
      executor_(chosen_.size(), [&](std::size_t d) { leave_experts(l, d); });
      done(l);
    }
    return std::move(out_);
  }

 private:
  /// A document between two steps.
  struct passage {
    std::vector<float> residual, mixed;
  };
  struct stream {
    model whole;
    expert_weights experts;  // of this layer
    std::vector<passage> documents;
  };
  /// Rows of a document that meet the matrices of an input, in their order: the float model's, and in two streams the
  /// same as the packed weights meet them.
  struct rows_of_document {
    std::vector<float> original, met;
    std::vector<std::uint32_t> offsets;  // [matrices + 1]
  };

  void start(evaluator& run, std::size_t d) const {
    const auto tokens = text_.tokens_of(chosen_[d]);
    run.start(std::span(&tokens, 1));
  }
  void resume(evaluator& run, const stream& st, std::size_t d) const {
    start(run, d);
    run.residual() = st.documents[d].residual;
  }

  /// Adds rows(document) of all documents to the statistics of an input, a few documents at a time.
  template <class Rows>
  void gather(const std::string& input, std::size_t matrices, std::size_t cols, const Rows& rows) {
    constexpr std::size_t together = 16;
    seen_input& seen = out_.input(input, matrices, cols);
    for (std::size_t first = 0; first < chosen_.size(); first += together) {
      std::vector<rows_of_document> found(std::min(together, chosen_.size() - first));
      executor_(found.size(), [&](std::size_t i) { found[i] = rows(first + i); });
      executor_(matrices, [&](std::size_t e) {  // each matrix sees documents in their order
        for (const rows_of_document& of : found) {
          const std::size_t begin = of.offsets[e] * cols, count = of.offsets[e + 1] * cols - begin;
          seen.add(e, std::span(of.original).subspan(begin, count),
                   of.met.empty() ? std::span<const float>() : std::span(of.met).subspan(begin, count));
        }
      });
    }
  }

  /// Packs weights of the second stream, now that the statistics of their input are there.
  void pack(std::size_t l, std::initializer_list<std::string_view> parts) {
    if (streams_.size() == 1) return;
    const shape& s = streams_[1].whole.size;
    model::layer& layer = streams_[1].whole.layers[l];
    expert_weights& experts = streams_[1].experts;
    for (const std::string_view part : parts) {
      if (part.starts_with("attn")) {
        linear& to = part == "attn.q" ? layer.q : part == "attn.k" ? layer.k : part == "attn.v" ? layer.v : layer.o;
        to = read_projection(file_, s, packed_, l, part);
      } else {
        linear& to = part == "moe.gate" ? experts.gate : part == "moe.up" ? experts.up : experts.down;
        to = read_experts(file_, s, packed_, l, part, held_);
      }
    }
  }

  [[nodiscard]] rows_of_document into_attention(std::size_t l, std::size_t d) const {
    rows_of_document out;
    for (const stream& st : streams_) {
      evaluator run(st.whole);
      resume(run, st, d);
      run.enter_attention(l);
      take(run.rows(), out);
    }
    return out;
  }

  [[nodiscard]] rows_of_document into_output(std::size_t l, std::size_t d) {
    rows_of_document out;
    for (stream& st : streams_) {
      evaluator run(st.whole);
      resume(run, st, d);
      run.enter_attention(l);
      run.mix(l);
      run.meet_output();
      take(run.rows(), out);
      st.documents[d].mixed = run.mixed();
    }
    return out;
  }

  [[nodiscard]] rows_of_document into_experts(std::size_t l, std::size_t d) {
    for (stream& st : streams_) {
      evaluator run(st.whole);
      resume(run, st, d);
      run.mixed() = st.documents[d].mixed;
      run.leave_attention(l);
      st.documents[d].residual = run.residual();
    }
    rounded_rows rows;
    return routed(
        l, d, [&](const stream& st, std::span<const float> x, const expert_order& order) -> const auto& {
          rows.set(st.whole.rounding, x, st.whole.size.hidden, order.groups());
          return rows;
        });
  }

  [[nodiscard]] rows_of_document into_down(std::size_t l, std::size_t d) const {
    expert_runner runner;
    return routed(
        l, d, [&](const stream& st, std::span<const float> x, const expert_order& order) -> const auto& {
          return runner.activate(st.experts, st.whole.rounding, x, order.offsets(), order.groups());
        });
  }

  /// Rows that meet experts, as the packed model routes them. The float model's are of the same tokens and experts,
  /// whether or not its own router chose them: what is owed is what those experts should have made of these tokens.
  template <class Rows>
  [[nodiscard]] rows_of_document routed(std::size_t l, std::size_t d, const Rows& rows) const {
    rows_of_document out;
    const shape& s = streams_[0].whole.size;
    evaluator chooser(streams_.back().whole);
    resume(chooser, streams_.back(), d);
    chooser.enter_experts(l);
    const expert_order order(chooser.ids(), s.experts, s.top_k);
    for (const stream& st : streams_) {
      evaluator run(st.whole);
      resume(run, st, d);
      run.enter_experts(l);
      take(rows(st, order.gather(run.normed(), s.hidden), order), out);
    }
    out.offsets.assign(order.offsets().begin(), order.offsets().end());
    return out;
  }

  /// Each stream's rows in turn.
  static void take(const rounded_rows& rows, rows_of_document& out) {
    if (out.offsets.empty()) {
      out.original = {rows.plain().begin(), rows.plain().end()};
      out.offsets = {0, static_cast<std::uint32_t>(rows.rows())};
    } else {
      out.met = rows.met();
    }
  }

  void leave_experts(std::size_t l, std::size_t d) {
    for (stream& st : streams_) {
      const shape& s = st.whole.size;
      evaluator run(st.whole);
      resume(run, st, d);
      run.enter_experts(l);
      const expert_order order(run.ids(), s.experts, s.top_k);
      expert_runner runner;
      const auto answers =
          runner(st.experts, st.whole.rounding, order.gather(run.normed(), s.hidden), order.offsets(), order.groups());
      run.leave_experts(order.combine(answers, run.weights(), s.hidden));
      st.documents[d].residual = std::move(run.residual());
    }
  }

  const io::safetensors_file& file_;
  const documents& text_;
  std::span<const std::size_t> chosen_;
  tetromino::executor_ref executor_;
  precision packed_;
  std::vector<std::int32_t> held_;  // all experts
  std::vector<stream> streams_;     // the float model's, and perhaps the packed one's
  input_statistics out_;
};

}  // namespace moe_lm
