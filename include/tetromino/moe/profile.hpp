#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"  // tetromino::result, tetromino::error
#include "loads.hpp"     // load_view
#include "trace.hpp"     // trace_view, routing_shape, phase, id_array

#include <algorithm>  // std::max
#include <cmath>      // std::log2, std::sqrt
#include <cstddef>    // std::ptrdiff_t, std::size_t
#include <cstdint>    // std::uint16_t, std::uint32_t, std::uint64_t
#include <iterator>   // std::data, std::size
#include <span>       // std::span
#include <string>     // std::string
#include <utility>    // std::swap
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What a profile keeps. Memory in bytes, with C = layers × experts:
/// 16·C for loads, 16·C per domain, 8·C per request, 4·C·(experts − 1) for co-activation, 8·C·experts for transitions.
struct profile_options {
  routing_shape shape;
  std::size_t domains = 0;     ///< keeps loads by domain, for this many
  std::size_t requests = 0;    ///< keeps the signature of each request, for this many
  bool co_activation = false;  ///< keeps how often two experts serve the same token in a layer
  bool transitions = false;    ///< keeps how often expert a in a layer is followed by expert b in the next

  friend TETROMINO_ABI bool operator==(const profile_options&, const profile_options&) = default;
};

/// Whose token is added.
struct token_origin {
  phase when = phase::decode;  ///< prefill or decode
  std::uint32_t domain = 0;
  std::uint32_t request = 0;  ///< its place among the signatures
};

/// What routing says, added up token by token as it happens. Adding, merging and decaying allocate nothing.
class profile {
 public:
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI profile(const profile&) = default;
  TETROMINO_ABI profile(profile&&) = default;
  TETROMINO_ABI profile& operator=(const profile&) = default;
  TETROMINO_ABI profile& operator=(profile&&) = default;

  /// All counts zero. Errors: a shape that has a zero, or experts per token above experts; more than 2^48 counts of a
  /// kind.
  [[nodiscard]] TETROMINO_ABI static result<profile> try_make(const profile_options& options) {
    const routing_shape& s = options.shape;
    if (s.layers == 0 || s.experts == 0 || s.experts > 65'535 || s.experts_per_token == 0 ||
        s.experts_per_token > s.experts) {
      return error(errc::invalid_argument,
                   {"profile: expected layers ≥ 1 and 1 ≤ experts per token ≤ experts ≤ 65535, got ", s.layers,
                    " layers, ", s.experts_per_token, " of ", s.experts, " experts"});
    }
    const std::size_t pairs_of = options.co_activation || options.transitions ? s.experts : 1;
    for (const std::size_t n : {pairs_of, options.domains, options.requests}) {
      if (detail::can_be_array({s.layers, s.experts, n})) continue;
      return error(errc::invalid_argument,
                   {"profile: expected fewer counts, got ", s.layers, " layers × ", s.experts, " experts × ", n});
    }
    profile p;
    p.options_ = options;
    const std::size_t cells = s.layers * s.experts;
    p.ids_.resize(s.ids_per_token());
    p.loads_.assign(2 * cells, 0.0);
    p.domain_loads_.assign(2 * cells * options.domains, 0.0);
    p.signatures_.assign(2 * cells * options.requests, 0.0f);
    if (options.co_activation) p.co_activation_.assign(s.layers * pairs(s.experts), 0.0);
    if (options.transitions) p.transitions_.assign((s.layers - 1) * s.experts * s.experts, 0.0);
    return p;
  }
  [[nodiscard]] TETROMINO_ABI static profile make(const profile_options& options) { return try_make(options).value(); }

  [[nodiscard]] TETROMINO_ABI const profile_options& options() const noexcept { return options_; }
  [[nodiscard]] TETROMINO_ABI const routing_shape& shape() const noexcept { return options_.shape; }
  /// Tokens added so far, less what decay took away.
  [[nodiscard]] TETROMINO_ABI double tokens(phase p = phase::all) const noexcept {
    return p == phase::prefill ? tokens_[0] : p == phase::decode ? tokens_[1] : tokens_[0] + tokens_[1];
  }
  /// Bytes that the counts occupy.
  [[nodiscard]] TETROMINO_ABI std::size_t memory_bytes() const noexcept {
    return sizeof(double) * (loads_.size() + domain_loads_.size() + co_activation_.size() + transitions_.size()) +
           sizeof(float) * signatures_.size();
  }

  /// Adds one token: ids[layers, experts per token], integers of any type; −1 (or the largest number of an unsigned
  /// type, such as no_expert) where nobody serves. Errors (nothing is added then): another number of ids, an id, a
  /// domain or a request out of range, phase::all.
  template <id_array Ids>
  [[nodiscard]] TETROMINO_ABI result<void> try_add(const Ids& ids, const token_origin& origin) {
    const routing_shape& s = options_.shape;
    if (std::size(ids) != s.ids_per_token()) {
      return error(errc::shape_mismatch, {"profile: expected ", s.layers, " × ", s.experts_per_token,
                                          " ids for a token, got ", std::size(ids)});
    }
    if (origin.when == phase::all) {
      return error(errc::invalid_argument, "profile: expected a token of prefill or of decode, got phase::all");
    }
    if (auto ok = check_origin("domain", origin.domain, options_.domains); !ok) return ok;
    if (auto ok = check_origin("request", origin.request, options_.requests); !ok) return ok;
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      const std::uint32_t id = detail::to_id(std::data(ids)[i], s.experts);
      if (id == detail::no_id) {
        return error(errc::invalid_argument,
                     {"profile: expected expert ids below ", s.experts, " or -1, got ", std::data(ids)[i]});
      }
      ids_[i] = static_cast<std::uint16_t>(id);
    }
    add_checked(ids_, origin);
    return {};
  }
  template <id_array Ids>
  TETROMINO_ABI void add(const Ids& ids, const token_origin& origin) {
    try_add(ids, origin).value();
  }

  /// Adds all requests of a view; request i becomes signature first_request + i. Precondition: the view is valid (a
  /// trace made it). Errors (nothing is added then): another shape, a domain or a request out of range.
  [[nodiscard]] TETROMINO_ABI result<void> try_add(const trace_view& from, std::uint32_t first_request = 0) {
    if (from.shape != options_.shape) {
      return error(errc::shape_mismatch,
                   {"profile: expected routing of ", shape_text(options_.shape), ", got ", shape_text(from.shape)});
    }
    for (std::size_t r = 0; r < from.requests.size(); ++r) {
      if (auto ok = check_origin("domain", from.requests[r].domain, options_.domains); !ok) return ok;
      if (auto ok = check_origin("request", first_request + r, options_.requests); !ok) return ok;
    }
    for (std::size_t r = 0; r < from.requests.size(); ++r) {
      const request& q = from.requests[r];
      token_origin origin{phase::prefill, q.domain, first_request + static_cast<std::uint32_t>(r)};
      for (const phase p : {phase::prefill, phase::decode}) {
        origin.when = p;
        const token_range range = q.range(p);
        for (std::uint64_t t = range.first; t < range.last; ++t) add_checked(from.token(t), origin);
      }
    }
    return {};
  }
  TETROMINO_ABI void add(const trace_view& from, std::uint32_t first_request = 0) {
    try_add(from, first_request).value();
  }

  /// Adds the counts of another profile, e.g. one that another rank kept. Errors: other options.
  [[nodiscard]] TETROMINO_ABI result<void> try_merge(const profile& other) {
    if (other.options_ != options_) {
      return error(errc::shape_mismatch, {"profile: expected to merge a profile with the same options, got one of ",
                                          shape_text(other.options_.shape), ", ", other.options_.domains,
                                          " domains and ", other.options_.requests, " requests"});
    }
    tokens_[0] += other.tokens_[0];
    tokens_[1] += other.tokens_[1];
    add_to(loads_, other.loads_);
    add_to(domain_loads_, other.domain_loads_);
    add_to(signatures_, other.signatures_);
    add_to(co_activation_, other.co_activation_);
    add_to(transitions_, other.transitions_);
    return {};
  }
  TETROMINO_ABI void merge(const profile& other) { try_merge(other).value(); }

  /// Multiplies all counts by `factor`, so that the past fades: called every so many tokens, the weight of a token
  /// falls exponentially. Errors: a factor outside 0 … 1.
  [[nodiscard]] TETROMINO_ABI result<void> try_decay(double factor) {
    if (!(factor >= 0 && factor <= 1)) {
      return error(errc::invalid_argument, {"profile: expected a factor from 0 to 1, got ", factor});
    }
    const auto scale = [&]<class Number>(std::vector<Number>& counts) {
      for (Number& c : counts) c = static_cast<Number>(c * factor);
    };
    tokens_[0] *= factor;
    tokens_[1] *= factor;
    scale(loads_);
    scale(domain_loads_);
    scale(signatures_);
    scale(co_activation_);
    scale(transitions_);
    return {};
  }
  TETROMINO_ABI void decay(double factor) { try_decay(factor).value(); }

  /// Pairs per layer and expert in one phase (prefill or decode): [layers, experts].
  [[nodiscard]] TETROMINO_ABI load_view loads(phase p) const {
    return {options_.shape.layers, options_.shape.experts, part(loads_, 0, p)};
  }
  /// Prefill and decode together: [layers, experts].
  [[nodiscard]] TETROMINO_ABI std::vector<double> total_loads() const {
    std::vector<double> out(loads_.begin(), loads_.begin() + static_cast<std::ptrdiff_t>(cells()));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += loads_[cells() + i];
    return out;
  }
  /// The same counts for the tokens of one domain.
  [[nodiscard]] TETROMINO_ABI load_view domain_loads(std::size_t domain, phase p) const {
    TETROMINO_EXPECTS(domain < options_.domains, "profile: domain number out of range", domain, options_.domains);
    return {options_.shape.layers, options_.shape.experts, part(domain_loads_, domain, p)};
  }
  /// How often one request used each expert in one phase: [layers, experts].
  [[nodiscard]] TETROMINO_ABI std::span<const float> signature(std::size_t request, phase p) const {
    TETROMINO_EXPECTS(request < options_.requests, "profile: request number out of range", request, options_.requests);
    return part(signatures_, request, p);
  }
  /// Tokens for which both experts were chosen in `layer`; 0 for a == b. Precondition: co-activation is kept.
  [[nodiscard]] TETROMINO_ABI double co_activation(std::size_t layer, std::size_t a, std::size_t b) const {
    TETROMINO_EXPECTS(options_.co_activation && layer < options_.shape.layers && a < options_.shape.experts &&
                          b < options_.shape.experts,
                      "profile: co-activation is kept, layer and experts in range", layer, options_.shape.layers, a,
                      options_.shape.experts, b);
    return a == b ? 0.0 : co_activation_[pair_index(layer, a, b)];
  }
  /// How often b in layer + 1 followed a in `layer`, for all b: [experts]. Precondition: transitions are kept.
  [[nodiscard]] TETROMINO_ABI std::span<const double> transitions(std::size_t layer, std::size_t a) const {
    TETROMINO_EXPECTS(options_.transitions && layer + 1 < options_.shape.layers && a < options_.shape.experts,
                      "profile: transitions are kept, layer has a next one, expert in range", layer + 1,
                      options_.shape.layers, a, options_.shape.experts);
    const std::size_t n = options_.shape.experts;
    return std::span(transitions_).subspan((layer * n + a) * n, n);
  }

 private:
  TETROMINO_ABI profile() = default;

  [[nodiscard]] TETROMINO_ABI static std::size_t pairs(std::size_t n) { return n * (n - 1) / 2; }
  [[nodiscard]] TETROMINO_ABI static std::string shape_text(const routing_shape& s) {
    return detail::text(s.layers, " layers × ", s.experts_per_token, " of ", s.experts, " experts");
  }
  [[nodiscard]] TETROMINO_ABI std::size_t cells() const noexcept {
    return options_.shape.layers * options_.shape.experts;
  }

  [[nodiscard]] TETROMINO_ABI std::size_t pair_index(std::size_t layer, std::size_t a, std::size_t b) const {
    if (a < b) std::swap(a, b);
    return layer * pairs(options_.shape.experts) + a * (a - 1) / 2 + b;
  }

  // Counts are kept as [owner, prefill and decode, layers, experts].
  template <class Number>
  [[nodiscard]] TETROMINO_ABI std::span<const Number> part(const std::vector<Number>& counts, std::size_t owner,
                                                           phase p) const {
    TETROMINO_EXPECTS(p != phase::all, "profile: counts are kept for prefill and for decode");
    return std::span(counts).subspan((2 * owner + (p == phase::decode ? 1 : 0)) * cells(), cells());
  }

  [[nodiscard]] TETROMINO_ABI static result<void> check_origin(const char* what, std::size_t number, std::size_t kept) {
    if (kept == 0 || number < kept) return {};
    return error(errc::invalid_argument, {"profile: expected a ", what, " number below ", kept, ", got ", number});
  }

  TETROMINO_ABI void add_checked(std::span<const std::uint16_t> ids, const token_origin& origin) {
    const auto& [layers, experts, k] = options_.shape;
    const std::size_t half = origin.when == phase::decode ? cells() : 0;
    double* const load = loads_.data() + half;
    double* const domain = options_.domains > 0 ? domain_loads_.data() + 2 * cells() * origin.domain + half : nullptr;
    float* const signature = options_.requests > 0 ? signatures_.data() + 2 * cells() * origin.request + half : nullptr;
    tokens_[origin.when == phase::decode ? 1 : 0] += 1;
    for (std::size_t l = 0; l < layers; ++l) {
      const std::uint16_t* const now = ids.data() + l * k;
      for (std::size_t i = 0; i < k; ++i) {
        if (now[i] == no_expert) continue;
        const std::size_t cell = l * experts + now[i];
        load[cell] += 1;
        if (domain != nullptr) domain[cell] += 1;
        if (signature != nullptr) signature[cell] += 1;
      }
      if (options_.co_activation) add_co_activation(l, {now, k});
      if (options_.transitions && l + 1 < layers) add_transitions(l, {now, k}, {now + k, k});
    }
  }
  TETROMINO_ABI void add_co_activation(std::size_t l, std::span<const std::uint16_t> ids) {
    for (std::size_t i = 1; i < ids.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        if (ids[i] == ids[j] || ids[i] == no_expert || ids[j] == no_expert) continue;
        co_activation_[pair_index(l, ids[i], ids[j])] += 1;
      }
    }
  }
  TETROMINO_ABI void add_transitions(std::size_t l, std::span<const std::uint16_t> now,
                                     std::span<const std::uint16_t> next) {
    const std::size_t experts = options_.shape.experts;
    for (const std::uint16_t a : now) {
      if (a == no_expert) continue;
      double* const row = transitions_.data() + (l * experts + a) * experts;
      for (const std::uint16_t b : next) {
        if (b != no_expert) row[b] += 1;
      }
    }
  }

  template <class Number>
  TETROMINO_ABI static void add_to(std::vector<Number>& counts, const std::vector<Number>& more) {
    for (std::size_t i = 0; i < counts.size(); ++i) counts[i] += more[i];
  }

  profile_options options_;
  double tokens_[2] = {0, 0};
  std::vector<std::uint16_t> ids_;     // [layers, experts per token] of the token being added
  std::vector<double> loads_;          // [2, layers, experts]
  std::vector<double> domain_loads_;   // [domains, 2, layers, experts]
  std::vector<float> signatures_;      // [requests, 2, layers, experts]
  std::vector<double> co_activation_;  // [layers, experts (experts − 1) / 2]
  std::vector<double> transitions_;    // [layers − 1, experts, experts]
};

/// Max / mean over experts, layer by layer.
struct load_imbalance {
  double mean = 0;              ///< over layers
  double worst = 0;             ///< of the worst layer
  std::size_t worst_layer = 0;  ///< the first such layer
};

inline namespace TETROMINO_ISA {

/// First finding: how unevenly experts are used. A layer without load counts as even (1). Errors: bad loads.
/// (arXiv 2604.23150)
[[nodiscard]] inline result<load_imbalance> try_imbalance(const load_view& loads) {
  if (auto ok = try_validate(loads); !ok) return ok.error();
  load_imbalance out;
  for (std::size_t l = 0; l < loads.layers; ++l) {
    double most = 0, mean = 0;
    for (const double x : loads.layer(l)) {
      most = std::max(most, x);
      mean += x / static_cast<double>(loads.experts);
    }
    const double ratio = mean > 0 ? most / mean : 1.0;
    out.mean += ratio / static_cast<double>(loads.layers);
    if (ratio > out.worst) {
      out.worst = ratio;
      out.worst_layer = l;
    }
  }
  return out;
}
[[nodiscard]] inline load_imbalance imbalance(const load_view& loads) { return try_imbalance(loads).value(); }

/// Second finding: how differently two loads are spread over experts: the Jensen–Shannon divergence in bits, 0 (alike)
/// to 1 (no expert in common), mean over the layers in which both have load; 0 if there is none. Errors: bad loads,
/// different shapes. (arXiv 2604.23150)
[[nodiscard]] inline result<double> try_divergence(const load_view& a, const load_view& b) {
  if (auto ok = try_validate(a); !ok) return ok.error();
  if (auto ok = try_validate(b); !ok) return ok.error();
  if (a.layers != b.layers || a.experts != b.experts) {
    return error(errc::shape_mismatch, {"divergence: expected loads of one shape, got ", a.layers, " × ", a.experts,
                                        " and ", b.layers, " × ", b.experts});
  }
  double sum = 0;
  std::size_t layers = 0;
  for (std::size_t l = 0; l < a.layers; ++l) {
    double total_a = 0, total_b = 0;
    for (const double x : a.layer(l)) total_a += x;
    for (const double x : b.layer(l)) total_b += x;
    if (!(total_a > 0) || !(total_b > 0)) continue;
    ++layers;
    for (std::size_t e = 0; e < a.experts; ++e) {
      const double p = a.layer(l)[e] / total_a, q = b.layer(l)[e] / total_b, m = (p + q) / 2;
      if (p > 0) sum += p * std::log2(p / m) / 2;
      if (q > 0) sum += q * std::log2(q / m) / 2;
    }
  }
  return layers == 0 ? 0.0 : std::max(0.0, sum / static_cast<double>(layers));
}
[[nodiscard]] inline double divergence(const load_view& a, const load_view& b) { return try_divergence(a, b).value(); }

/// Divergence between the decode loads of all domains of a profile: [domains, domains].
[[nodiscard]] inline std::vector<double> domain_divergence(const profile& of) {
  const std::size_t n = of.options().domains;
  std::vector<double> out(n * n, 0.0);
  for (std::size_t a = 0; a < n; ++a) {
    for (std::size_t b = 0; b < a; ++b) {
      const double d = divergence(of.domain_loads(a, phase::decode), of.domain_loads(b, phase::decode));
      out[a * n + b] = d;
      out[b * n + a] = d;
    }
  }
  return out;
}

}  // namespace TETROMINO_ISA

/// Cosine between the prefill and the decode signature, of one request and of different ones.
struct phase_similarity {
  double same_request = 0;
  double across_requests = 0;
  std::size_t requests = 0;  ///< those with prefill and decode tokens
};

inline namespace TETROMINO_ISA {

/// Third finding: a request's prefill predicts its decode. Means over requests, and over ordered pairs of different
/// requests. Time and memory grow linearly with requests. (arXiv 2604.23150)
[[nodiscard]] inline phase_similarity prefill_decode_similarity(const profile& of) {
  const std::size_t cells = of.shape().layers * of.shape().experts;
  std::vector<double> prefill_sum(cells, 0.0), decode_sum(cells, 0.0);
  phase_similarity out;
  double same = 0;
  for (std::size_t r = 0; r < of.options().requests; ++r) {
    const std::span<const float> p = of.signature(r, phase::prefill), d = of.signature(r, phase::decode);
    double pp = 0, dd = 0, pd = 0;
    for (std::size_t i = 0; i < cells; ++i) {
      pp += double{p[i]} * p[i];
      dd += double{d[i]} * d[i];
      pd += double{p[i]} * d[i];
    }
    if (!(pp > 0) || !(dd > 0)) continue;
    ++out.requests;
    same += pd / std::sqrt(pp * dd);
    for (std::size_t i = 0; i < cells; ++i) {
      prefill_sum[i] += p[i] / std::sqrt(pp);
      decode_sum[i] += d[i] / std::sqrt(dd);
    }
  }
  // Σ over pairs = (Σ prefill) · (Σ decode), less the pairs of a request with itself
  double all = 0;
  for (std::size_t i = 0; i < cells; ++i) all += prefill_sum[i] * decode_sum[i];
  const auto n = static_cast<double>(out.requests);
  if (out.requests > 0) out.same_request = same / n;
  if (out.requests > 1) out.across_requests = (all - same) / (n * (n - 1));
  return out;
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
