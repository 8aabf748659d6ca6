#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"  // tetromino::result, tetromino::error
#include "loads.hpp"     // load_view
#include "trace.hpp"     // trace, phase, id_array, no_expert

#include <algorithm>      // std::copy, std::copy_n, std::fill_n, std::max, std::min, std::stable_sort
#include <cmath>          // std::exp2, std::isfinite
#include <cstddef>        // std::byte, std::size_t
#include <cstdint>        // std::uint16_t, std::uint32_t, std::uint64_t
#include <cstring>        // std::memcpy
#include <span>           // std::span
#include <unordered_map>  // std::unordered_map
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What a recorder keeps. Memory in bytes: tokens × (2 × layers × experts per token + 24) + 16 × layers × experts.
struct recorder_options {
  routing_shape shape;
  std::size_t tokens = 65'536;  ///< the latest so many are kept with all their experts; older ones are forgotten
  std::size_t keep_one_in =
      1;  ///< of how many tokens one is kept, chosen by a fixed sequence, so that they span longer
  double half_life_tokens = 0;  ///< tokens after which loads count half; 0: loads are of all tokens ever

  friend TETROMINO_ABI bool operator==(const recorder_options&, const recorder_options&) = default;
};

/// A row of a forward pass: whose token it is.
struct recorded_row {
  std::uint64_t request = 0;  ///< the engine's number of the request, the same in each pass
  phase when = phase::decode;
};

/// Takes routing from an engine as it happens, layer by layer, in bounded memory: exact loads of all tokens, and the
/// latest tokens with all their experts, by request. `loads` is what `balanced` wants; `to_trace` is what `local`,
/// `group` and `evaluate` want. Each rank keeps its own, and one merges them.
class recorder {
 public:
  /// Errors: a shape that has a zero, more than 65,535 experts or more than 2^48 in all layers, experts per token above
  /// experts, no token kept.
  [[nodiscard]] TETROMINO_ABI static result<recorder> try_make(const recorder_options& options) {
    const routing_shape& s = options.shape;
    if (s.layers == 0 || s.experts == 0 || s.experts > 65'535 || s.experts_per_token == 0 ||
        s.experts_per_token > s.experts) {
      return error(errc::invalid_argument,
                   {"recorder: expected layers ≥ 1 and 1 ≤ experts per token ≤ experts ≤ 65535, got ", s.layers,
                    " layers, ", s.experts_per_token, " of ", s.experts, " experts"});
    }
    if (!detail::can_be_array({s.layers, s.experts})) {
      return error(errc::invalid_argument,
                   {"recorder: expected fewer counts, got ", s.layers, " layers × ", s.experts, " experts"});
    }
    if (options.tokens == 0 || options.keep_one_in == 0 || !std::isfinite(options.half_life_tokens) ||
        options.half_life_tokens < 0) {
      return error(
          errc::invalid_argument,
          detail::text("recorder: expected at least 1 token, 1 in at least 1 kept and a half-life of 0 or more, "
                       "got ",
                       options.tokens, ", ", options.keep_one_in, " and ", options.half_life_tokens));
    }
    recorder r;
    r.options_ = options;
    for (std::vector<double>& loads : r.loads_) loads.assign(s.layers * s.experts, 0.0);
    return r;
  }
  [[nodiscard]] TETROMINO_ABI static recorder make(const recorder_options& options) {
    return try_make(options).value();
  }

  [[nodiscard]] TETROMINO_ABI const recorder_options& options() const noexcept { return options_; }
  /// Tokens of a phase that `loads` counts, the older ones less.
  [[nodiscard]] TETROMINO_ABI double tokens(phase p = phase::all) const noexcept {
    return p == phase::prefill ? tokens_[0] : p == phase::decode ? tokens_[1] : tokens_[0] + tokens_[1];
  }
  /// Tokens kept with their experts.
  [[nodiscard]] TETROMINO_ABI std::size_t kept() const noexcept { return rows_.size(); }

  /// Begins a forward pass of these rows. A request's tokens come in their order. Errors: phase::all; a pass begun
  /// before and not ended.
  [[nodiscard]] TETROMINO_ABI result<void> try_begin_pass(std::span<const recorded_row> rows) {
    if (in_pass_) return error(errc::invalid_argument, "recorder: expected the pass before to have ended");
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].when == phase::all) {
        return error(errc::invalid_argument,
                     {"recorder: expected row ", i, " to be prefill or decode, got phase::all"});
      }
    }
    in_pass_ = true;
    is_added_.assign(options_.shape.layers, false);
    pass_.assign(rows.begin(), rows.end());
    place_.resize(rows.size());
    // of a pass of more rows than are kept, the last ones
    const std::size_t first = rows.size() - std::min(rows.size(), options_.tokens);
    for (std::size_t i = 0; i < rows.size(); ++i) place_[i] = keeps_next() && i >= first ? keep(rows[i]) : not_kept;
    return {};
  }
  TETROMINO_ABI void begin_pass(std::span<const recorded_row> rows) { try_begin_pass(rows).value(); }

  /// Adds one layer of the pass: ids[rows, experts per token], best first; −1 (or the largest number of an unsigned
  /// type) is nobody, as in rows of padding. Errors (nothing is added then): no pass, another number of ids, a layer or
  /// an id out of range, a layer that the pass has already, an expert twice for one token.
  template <id_array Ids>
  [[nodiscard]] TETROMINO_ABI result<void> try_add_layer(std::size_t layer, const Ids& all) {
    const std::span ids(std::data(all), std::size(all));
    const auto& [layers, experts, k] = options_.shape;
    if (!in_pass_ || layer >= layers || ids.size() != pass_.size() * k) {
      return error(errc::shape_mismatch,
                   {"recorder: expected ", pass_.size(), " × ", k, " ids of a layer below ", layers, " in a pass, got ",
                    ids.size(), " of layer ", layer, in_pass_ ? "" : ", in no pass"});
    }
    if (is_added_[layer]) {
      return error(errc::invalid_argument,
                   {"recorder: expected each layer once in a pass, got layer ", layer, " again"});
    }
    ids_.resize(ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::uint32_t id = detail::to_id(ids[i], experts);
      if (id == detail::no_id) {
        return error(errc::invalid_argument, {"recorder: expected experts below ", experts, " or -1, got ", ids[i],
                                              " in row ", i / k, ", layer ", layer});
      }
      ids_[i] = static_cast<std::uint16_t>(id);
      for (std::size_t j = i - i % k; j < i; ++j) {
        if (id != no_expert && ids_[j] == ids_[i]) {
          return error(errc::invalid_argument, {"recorder: expected distinct experts, got ", ids[i], " twice in row ",
                                                i / k, ", layer ", layer});
        }
      }
    }
    for (std::size_t row = 0; row < pass_.size(); ++row) {
      double* const load = loads_[pass_[row].when == phase::decode ? 1 : 0].data() + layer * experts;
      const std::uint16_t* const chosen = ids_.data() + row * k;
      for (std::size_t i = 0; i < k; ++i) {
        if (chosen[i] != no_expert) load[chosen[i]] += 1;
      }
      if (place_[row] != not_kept) std::copy_n(chosen, k, kept_ids(place_[row]) + layer * k);
    }
    is_added_[layer] = true;
    return {};
  }
  template <id_array Ids>
  TETROMINO_ABI void add_layer(std::size_t layer, const Ids& ids) {
    try_add_layer(layer, ids).value();
  }

  /// Ends the pass. Layers that were not added had nobody. Errors: no pass.
  [[nodiscard]] TETROMINO_ABI result<void> try_end_pass() {
    if (!in_pass_) return error(errc::invalid_argument, "recorder: expected a pass to have begun");
    in_pass_ = false;
    for (const recorded_row& row : pass_) tokens_[row.when == phase::decode ? 1 : 0] += 1;
    since_decay_ += static_cast<double>(pass_.size());
    // in steps of a sixty-fourth of the half-life, so that small passes cost little
    if (options_.half_life_tokens > 0 && since_decay_ * 64 >= options_.half_life_tokens) {
      const double factor = std::exp2(-since_decay_ / options_.half_life_tokens);
      for (std::vector<double>& loads : loads_) {
        for (double& x : loads) x *= factor;
      }
      for (double& x : tokens_) x *= factor;
      since_decay_ = 0;
    }
    return {};
  }
  TETROMINO_ABI void end_pass() { try_end_pass().value(); }

  /// A whole pass at once, in the order in which engines hold it: ids[layers, rows, experts per token]. Errors: as
  /// begin_pass and add_layer; what was added before the error stays.
  template <id_array Ids>
  [[nodiscard]] TETROMINO_ABI result<void> try_add_pass(std::span<const recorded_row> rows, const Ids& all) {
    const std::span ids(std::data(all), std::size(all));
    const std::size_t of_layer = rows.size() * options_.shape.experts_per_token;
    if (ids.size() != of_layer * options_.shape.layers) {
      return error(errc::shape_mismatch,
                   {"recorder: expected ", options_.shape.layers, " × ", of_layer, " ids, got ", ids.size()});
    }
    if (auto ok = try_begin_pass(rows); !ok) return ok;
    for (std::size_t l = 0; l < options_.shape.layers; ++l) {
      if (auto ok = try_add_layer(l, ids.subspan(l * of_layer, of_layer)); !ok) {
        in_pass_ = false;
        return ok;
      }
    }
    return try_end_pass();
  }
  template <id_array Ids>
  TETROMINO_ABI void add_pass(std::span<const recorded_row> rows, const Ids& ids) {
    try_add_pass(rows, ids).value();
  }

  /// Pairs of all tokens, per layer and expert in one phase: [layers, experts]. Precondition: prefill or decode.
  [[nodiscard]] TETROMINO_ABI load_view loads(phase p) const {
    TETROMINO_EXPECTS(p != phase::all, "recorder: loads are kept for prefill and for decode");
    return {options_.shape.layers, options_.shape.experts, loads_[p == phase::decode ? 1 : 0]};
  }

  /// The tokens kept, as a trace: requests by when their oldest token was seen, each with its prompt first.
  [[nodiscard]] TETROMINO_ABI trace to_trace() const {
    std::unordered_map<std::uint64_t, std::uint32_t> number_of_request;
    std::vector<request> requests;
    struct entry {
      std::uint32_t request;
      bool decode;
      std::size_t place;
    };
    std::vector<entry> order;
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const std::size_t place = (oldest_ + i) % rows_.size();
      const auto [found, is_new] =
          number_of_request.try_emplace(rows_[place].request, static_cast<std::uint32_t>(requests.size()));
      if (is_new) requests.emplace_back();
      const bool decode = rows_[place].when == phase::decode;
      order.push_back({found->second, decode, place});
      ++requests[found->second].tokens;
      requests[found->second].prefill_length += decode ? 0U : 1U;
    }
    std::stable_sort(order.begin(), order.end(), [](const entry& a, const entry& b) {
      return a.request != b.request ? a.request < b.request : a.decode < b.decode;
    });
    std::uint64_t first = 0;
    for (request& r : requests) {
      r.first_token = first;
      first += r.tokens;
    }
    std::vector<std::uint16_t> ids;
    ids.reserve(order.size() * options_.shape.ids_per_token());
    for (const entry& e : order)
      ids.insert(ids.end(), kept_ids(e.place), kept_ids(e.place) + options_.shape.ids_per_token());
    return trace::make(options_.shape, std::move(ids), std::move(requests));
  }

  /// Adds what another recorder has, as if its passes came after. Errors: another shape; a pass that has not ended.
  [[nodiscard]] TETROMINO_ABI result<void> try_merge(const recorder& other) {
    if (other.options_.shape != options_.shape || in_pass_ || other.in_pass_) {
      return error(errc::shape_mismatch, "recorder: expected to merge one of the same shape, both between passes");
    }
    for (std::size_t p = 0; p < 2; ++p) {
      tokens_[p] += other.tokens_[p];
      for (std::size_t i = 0; i < loads_[p].size(); ++i) loads_[p][i] += other.loads_[p][i];
    }
    const std::size_t count = other.rows_.size(), first = other.oldest_;  // other may be this one
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t from = (first + i) % count;
      const recorded_row row = other.rows_[from];
      const std::vector<std::uint16_t> ids(other.kept_ids(from), other.kept_ids(from) + options_.shape.ids_per_token());
      std::copy(ids.begin(), ids.end(), kept_ids(keep(row)));
    }
    return {};
  }
  TETROMINO_ABI void merge(const recorder& other) { try_merge(other).value(); }

  /// All that it has as bytes, for another rank to merge (the same byte order and library there). Precondition: between
  /// passes.
  [[nodiscard]] TETROMINO_ABI std::vector<std::byte> to_bytes() const {
    TETROMINO_EXPECTS(!in_pass_, "recorder: between passes");
    const auto& [layers, experts, k] = options_.shape;
    std::vector<std::byte> out;
    const auto put = [&](const void* from, std::size_t bytes) {
      const auto* const first = static_cast<const std::byte*>(from);
      out.insert(out.end(), first, first + bytes);
    };
    const std::uint64_t head[] = {layers, experts, k, rows_.size()};
    put(head, sizeof head);
    put(tokens_, sizeof tokens_);
    for (const std::vector<double>& loads : loads_) put(loads.data(), sizeof(double) * loads.size());
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const std::size_t place = (oldest_ + i) % rows_.size();
      const std::uint64_t row[] = {rows_[place].request, rows_[place].when == phase::decode ? 1U : 0U};
      put(row, sizeof row);
      put(kept_ids(place), sizeof(std::uint16_t) * options_.shape.ids_per_token());
    }
    return out;
  }

  /// Merges the bytes of another rank's recorder. Errors (nothing is merged then): bytes of another shape, cut short or
  /// changed on their way.
  [[nodiscard]] TETROMINO_ABI result<void> try_merge(std::span<const std::byte> bytes) {
    const auto bad = [&] {
      return error(errc::malformed_file,
                   {"recorder: expected the bytes of a recorder of the same shape, got ", bytes.size(), " other ones"});
    };
    const auto take = [&](void* to, std::size_t n) {
      if (bytes.size() < n) return false;
      std::memcpy(to, bytes.data(), n);
      bytes = bytes.subspan(n);
      return true;
    };
    recorder other;
    other.options_ = options_;
    std::uint64_t head[4] = {};
    if (!take(head, sizeof head) || !take(other.tokens_, sizeof other.tokens_) || head[0] != options_.shape.layers ||
        head[1] != options_.shape.experts || head[2] != options_.shape.experts_per_token) {
      return bad();
    }
    for (std::size_t p = 0; p < 2; ++p) {
      other.loads_[p].resize(loads_[p].size());
      if (!take(other.loads_[p].data(), sizeof(double) * loads_[p].size())) return bad();
      if (auto ok = try_validate(load_view{options_.shape.layers, options_.shape.experts, other.loads_[p]}); !ok)
        return ok;
    }
    const std::size_t of_token = options_.shape.ids_per_token();
    if (bytes.size() != head[3] * (2 * sizeof(std::uint64_t) + sizeof(std::uint16_t) * of_token) ||
        !(other.tokens_[0] >= 0) || !(other.tokens_[1] >= 0)) {
      return bad();
    }
    other.options_.tokens = std::max<std::size_t>(head[3], 1);
    for (std::uint64_t i = 0; i < head[3]; ++i) {
      std::uint64_t row[2] = {};
      if (!take(row, sizeof row) || row[1] > 1) return bad();
      std::uint16_t* const ids = other.kept_ids(other.keep({row[0], row[1] == 1 ? phase::decode : phase::prefill}));
      if (!take(ids, sizeof(std::uint16_t) * of_token)) return bad();
    }
    const std::vector<request> all{{0, static_cast<std::uint32_t>(head[3]), 0, 0}};
    if (auto ok = try_validate(trace_view{options_.shape, other.kept_, all}); !ok) return ok;
    return try_merge(other);
  }
  TETROMINO_ABI void merge(std::span<const std::byte> bytes) { try_merge(bytes).value(); }

 private:
  static constexpr std::size_t not_kept = ~std::size_t{0};

  TETROMINO_ABI recorder() = default;

  [[nodiscard]] TETROMINO_ABI std::uint16_t* kept_ids(std::size_t place) {
    return kept_.data() + place * options_.shape.ids_per_token();
  }
  [[nodiscard]] TETROMINO_ABI const std::uint16_t* kept_ids(std::size_t place) const {
    return kept_.data() + place * options_.shape.ids_per_token();
  }

  // A fixed sequence that follows no pattern of batches. (SplitMix64)
  [[nodiscard]] TETROMINO_ABI bool keeps_next() {
    std::uint64_t z = seen_++ * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) % options_.keep_one_in == 0;
  }

  // Room for a token, with nobody in all its layers; the oldest goes where all room is taken.
  TETROMINO_ABI std::size_t keep(const recorded_row& row) {
    std::size_t place = rows_.size();
    if (place < options_.tokens) {
      rows_.push_back(row);
      kept_.resize(kept_.size() + options_.shape.ids_per_token());
    } else {
      place = oldest_;
      oldest_ = (oldest_ + 1) % rows_.size();
      rows_[place] = row;
    }
    std::fill_n(kept_ids(place), options_.shape.ids_per_token(), no_expert);
    return place;
  }

  recorder_options options_;
  std::vector<double> loads_[2];     // prefill, decode: [layers, experts]
  double tokens_[2] = {0, 0};        // prefill, decode
  double since_decay_ = 0;           // tokens
  std::vector<recorded_row> rows_;   // [kept] a ring, from oldest_ on
  std::vector<std::uint16_t> kept_;  // [kept, layers, experts per token]
  std::size_t oldest_ = 0;
  std::uint64_t seen_ = 0;          // tokens ever
  bool in_pass_ = false;            // between begin_pass and end_pass
  std::vector<bool> is_added_;      // [layers] of the pass
  std::vector<recorded_row> pass_;  // rows of the pass
  std::vector<std::size_t> place_;  // [rows of the pass] where each is kept
  std::vector<std::uint16_t> ids_;  // [rows of the pass, experts per token]
};

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
