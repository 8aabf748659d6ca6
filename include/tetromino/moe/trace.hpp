#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"  // tetromino::result, tetromino::error
#include "ids.hpp"       // id_array, no_expert, detail::to_id

#include <algorithm>  // std::max
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t, std::uint32_t, std::uint64_t
#include <iterator>   // std::data, std::size
#include <span>       // std::span
#include <string>     // std::string
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// Which tokens of a request are meant: those of its prompt, those it generated, or both.
enum class phase : std::uint8_t { prefill, decode, all };

/// Tokens first … last − 1 of a trace.
struct token_range {
  std::uint64_t first;
  std::uint64_t last;

  [[nodiscard]] TETROMINO_ABI std::uint64_t size() const noexcept { return last - first; }
};

/// One request of a trace: tokens first_token … first_token + tokens − 1, of which the first `prefill_length` are its
/// prompt.
struct request {
  std::uint64_t first_token = 0;
  std::uint32_t tokens = 0;
  std::uint32_t prefill_length = 0;
  std::uint32_t domain = 0;

  [[nodiscard]] TETROMINO_ABI token_range range(phase p = phase::all) const noexcept {
    const std::uint64_t middle = first_token + prefill_length;
    const std::uint64_t last = first_token + tokens;
    if (p == phase::prefill) return {first_token, middle};
    if (p == phase::decode) return {middle, last};
    return {first_token, last};
  }

  friend TETROMINO_ABI bool operator==(const request&, const request&) = default;
};

/// The size of a routing decision: each token picks `experts_per_token` of `experts` in each of `layers` layers.
struct routing_shape {
  std::size_t layers = 0;
  std::size_t experts = 0;
  std::size_t experts_per_token = 0;

  /// Ids that one token carries.
  [[nodiscard]] TETROMINO_ABI std::size_t ids_per_token() const noexcept { return layers * experts_per_token; }

  friend TETROMINO_ABI bool operator==(const routing_shape&, const routing_shape&) = default;
};

/// Routing that someone else owns: expert ids [tokens, layers, experts_per_token], best expert first, no_expert where
/// nobody serves, and the requests looked at. A part of a trace is the same ids with fewer requests, so views of
/// halves, domains or single requests copy nothing but 24 bytes per request.
///
/// A view made by `trace` is valid: ids below `experts` or no_expert, no expert twice for one token and layer, requests
/// inside the ids. Code in this library relies on it.
struct trace_view {
  routing_shape shape;
  std::span<const std::uint16_t> ids;
  std::span<const request> requests;

  /// All ids of one token: [layers, experts_per_token].
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint16_t> token(std::uint64_t t) const {
    TETROMINO_EXPECTS((t + 1) * shape.ids_per_token() <= ids.size(), "trace_view: token number out of range",
                      (t + 1) * shape.ids_per_token(), ids.size());
    return ids.subspan(t * shape.ids_per_token(), shape.ids_per_token());
  }
  /// The experts of one token in one layer, best first.
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint16_t> experts_of(std::uint64_t t, std::size_t layer) const {
    TETROMINO_EXPECTS(layer < shape.layers, "trace_view: layer number out of range", layer, shape.layers);
    return token(t).subspan(layer * shape.experts_per_token, shape.experts_per_token);
  }
  /// The same ids seen through other requests, which must lie inside them (e.g. made by `select`).
  [[nodiscard]] TETROMINO_ABI trace_view with(std::span<const request> others) const { return {shape, ids, others}; }

  /// Tokens of the requests looked at, in one phase.
  [[nodiscard]] TETROMINO_ABI std::uint64_t tokens(phase p = phase::all) const {
    std::uint64_t sum = 0;
    for (const request& r : requests) sum += r.range(p).size();
    return sum;
  }
};

inline namespace TETROMINO_ISA {

/// The requests of `from` with the given numbers, in that order. Precondition: numbers below from.requests.size().
[[nodiscard]] inline std::vector<request> select(const trace_view& from, std::span<const std::uint32_t> numbers) {
  std::vector<request> out;
  out.reserve(numbers.size());
  for (const std::uint32_t n : numbers) {
    TETROMINO_EXPECTS(n < from.requests.size(), "select: request number out of range", n, from.requests.size());
    out.push_back(from.requests[n]);
  }
  return out;
}

/// Checks ids and requests against each other: a shape without zero, at most 65,535 experts, experts_per_token ≤
/// experts, ids.size() a multiple of ids_per_token, each id no_expert or below `experts` and once per token and layer,
/// requests inside the tokens, prefill inside the request. Errors name the token or the request.
[[nodiscard]] inline result<void> try_validate(const trace_view& view) {
  const routing_shape& s = view.shape;
  if (s.layers == 0 || s.experts == 0 || s.experts_per_token == 0 || s.experts > 65'535 ||
      s.experts_per_token > s.experts) {
    return error(errc::invalid_argument,
                 {"trace: expected layers ≥ 1 and 1 ≤ experts per token ≤ experts ≤ 65535, got ", s.layers, " layers, ",
                  s.experts_per_token, " of ", s.experts, " experts"});
  }
  if (s.layers > view.ids.size() / s.experts_per_token ? !view.ids.empty() : view.ids.size() % s.ids_per_token() != 0) {
    return error(errc::shape_mismatch, {"trace: expected a multiple of ", s.layers, " × ", s.experts_per_token,
                                        " ids, got ", view.ids.size()});
  }
  const std::size_t k = s.experts_per_token;
  std::vector<std::uint64_t> last_seen(s.experts, 0);  // number of the last row + 1 that named the expert
  const std::size_t rows = view.ids.size() / k;
  for (std::size_t row = 0; row < rows; ++row) {
    for (const std::uint16_t e : view.ids.subspan(row * k, k)) {
      if (e == no_expert) continue;
      if (e >= s.experts) {
        return error(errc::invalid_argument, {"trace: expected expert ids below ", s.experts, ", got ", e, " in token ",
                                              row / s.layers, ", layer ", row % s.layers});
      }
      if (last_seen[e] == row + 1) {
        return error(errc::invalid_argument, {"trace: expected distinct experts, got ", e, " twice in token ",
                                              row / s.layers, ", layer ", row % s.layers});
      }
      last_seen[e] = row + 1;
    }
  }
  const std::size_t tokens = rows / s.layers;
  for (std::size_t i = 0; i < view.requests.size(); ++i) {
    const request& r = view.requests[i];
    if (r.first_token > tokens || r.tokens > tokens - r.first_token || r.prefill_length > r.tokens) {
      return error(errc::invalid_argument,
                   {"trace: expected request ", i, " inside ", tokens, " tokens, got ", r.tokens, " tokens from ",
                    r.first_token, " with prefill ", r.prefill_length});
    }
  }
  return {};
}

inline void validate(const trace_view& view) { try_validate(view).value(); }

}  // namespace TETROMINO_ISA

/// Recorded routing that owns its ids: what `try_make` was given, validated, ready to be viewed.
class trace {
 public:
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI trace(const trace&) = default;
  TETROMINO_ABI trace(trace&&) = default;
  TETROMINO_ABI trace& operator=(const trace&) = default;
  TETROMINO_ABI trace& operator=(trace&&) = default;

  /// Takes ids [tokens, layers, experts_per_token] and requests over those tokens. `domain_names` may be empty; else
  /// each request's domain is an index into it. Errors: see try_validate.
  [[nodiscard]] TETROMINO_ABI static result<trace> try_make(routing_shape shape, std::vector<std::uint16_t> ids,
                                                            std::vector<request> requests,
                                                            std::vector<std::string> domain_names = {}) {
    if (auto ok = try_validate(trace_view{shape, ids, requests}); !ok) return ok.error();
    for (std::size_t i = 0; i < requests.size(); ++i) {
      if (!domain_names.empty() && requests[i].domain >= domain_names.size()) {
        return error(errc::invalid_argument, {"trace: expected domains below ", domain_names.size(), ", got ",
                                              requests[i].domain, " in request ", i});
      }
    }
    trace t;
    t.shape_ = shape;
    t.ids_ = std::move(ids);
    t.requests_ = std::move(requests);
    t.domain_names_ = std::move(domain_names);
    return t;
  }
  [[nodiscard]] TETROMINO_ABI static trace make(routing_shape shape, std::vector<std::uint16_t> ids,
                                                std::vector<request> requests,
                                                std::vector<std::string> domain_names = {}) {
    return try_make(shape, std::move(ids), std::move(requests), std::move(domain_names)).value();
  }

  /// From ids of any integer type, such as int32 or torch's int64, −1 for nobody.
  template <id_array Ids>
  [[nodiscard]] TETROMINO_ABI static result<trace> try_make(const routing_shape& shape, const Ids& ids,
                                                            std::vector<request> requests,
                                                            std::vector<std::string> domain_names = {}) {
    std::vector<std::uint16_t> narrow(std::size(ids));
    for (std::size_t i = 0; i < narrow.size(); ++i) {
      if (auto kept = keep(shape, i / std::max<std::size_t>(shape.ids_per_token(), 1), std::data(ids)[i], narrow[i]);
          !kept) {
        return kept.error();
      }
    }
    return try_make(shape, std::move(narrow), std::move(requests), std::move(domain_names));
  }
  template <id_array Ids>
  [[nodiscard]] TETROMINO_ABI static trace make(const routing_shape& shape, const Ids& ids,
                                                std::vector<request> requests,
                                                std::vector<std::string> domain_names = {}) {
    return try_make(shape, ids, std::move(requests), std::move(domain_names)).value();
  }

  /// From ids in the order in which engines hold a batch: [layers, tokens, experts_per_token].
  template <id_array Ids>
  [[nodiscard]] TETROMINO_ABI static result<trace> try_from_layers(const routing_shape& shape, const Ids& ids,
                                                                   std::vector<request> requests,
                                                                   std::vector<std::string> domain_names = {}) {
    const std::size_t k = shape.experts_per_token, size = std::size(ids);
    if (shape.ids_per_token() == 0 || size % shape.ids_per_token() != 0) {
      return error(errc::shape_mismatch,
                   {"trace: expected a multiple of ", shape.layers, " × ", k, " ids, got ", size});
    }
    const std::size_t tokens = size / shape.ids_per_token();
    std::vector<std::uint16_t> ordered(size);
    for (std::size_t i = 0; i < size; ++i) {
      const std::size_t layer = i / k / tokens, token = i / k % tokens;
      std::uint16_t& to = ordered[(token * shape.layers + layer) * k + i % k];
      if (auto kept = keep(shape, token, std::data(ids)[i], to); !kept) return kept.error();
    }
    return try_make(shape, std::move(ordered), std::move(requests), std::move(domain_names));
  }
  template <id_array Ids>
  [[nodiscard]] TETROMINO_ABI static trace from_layers(const routing_shape& shape, const Ids& ids,
                                                       std::vector<request> requests,
                                                       std::vector<std::string> domain_names = {}) {
    return try_from_layers(shape, ids, std::move(requests), std::move(domain_names)).value();
  }

  [[nodiscard]] TETROMINO_ABI trace_view view() const& noexcept { return {shape_, ids_, requests_}; }
  trace_view view() const&& = delete;  // would dangle

  [[nodiscard]] TETROMINO_ABI const routing_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] TETROMINO_ABI std::size_t tokens() const noexcept { return ids_.size() / shape_.ids_per_token(); }
  [[nodiscard]] TETROMINO_ABI std::span<const request> requests() const noexcept { return requests_; }
  /// Names of the domains that requests refer to; empty when nobody named them.
  [[nodiscard]] TETROMINO_ABI std::span<const std::string> domain_names() const noexcept { return domain_names_; }

 private:
  TETROMINO_ABI trace() = default;

  template <class Id>
  TETROMINO_ABI static result<void> keep(const routing_shape& shape, std::size_t token, Id id, std::uint16_t& to) {
    const std::uint32_t known = detail::to_id(id, shape.experts);
    if (known == detail::no_id) {
      return error(errc::invalid_argument,
                   {"trace: expected expert ids below ", shape.experts, " or -1, got ", id, " in token ", token});
    }
    to = static_cast<std::uint16_t>(known);
    return {};
  }

  routing_shape shape_;
  std::vector<std::uint16_t> ids_;
  std::vector<request> requests_;
  std::vector<std::string> domain_names_;
};

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
