#pragma once

#include "../../detail/macros_off.hpp"

#include "../trace.hpp"                 // trace_view, phase
#include "random.hpp"                   // search_random
#include "requests/domain_weights.hpp"  // domain_weights, weight_one

#include <algorithm>  // std::any_of, std::count_if, std::max, std::min, std::transform
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int64_t, std::uint16_t, std::uint32_t, std::uint64_t
#include <span>       // std::span
#include <utility>    // std::swap
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Tokens that stand for a trace: of at most so many requests, evenly spaced within each, in random order. Where nobody
/// serves, the id is shape.experts: one more expert, which no node ever holds. A request has tokens by its weight (see
/// domain_weights): some may be there twice.
struct search_sample {
  routing_shape shape;
  std::vector<std::uint32_t> requests;          // [sampled requests] their numbers in the view
  std::vector<std::uint64_t> tokens_of;         // [sampled requests] sampled tokens
  std::vector<std::uint32_t> request_of_token;  // [sampled tokens] place in `requests`
  std::vector<std::uint16_t> ids;               // [layers, sampled tokens, experts per token]
  std::vector<std::int64_t> loads;              // [layers, experts] of all tokens, scaled to the sampled ones
  std::vector<std::size_t> pairs;               // [layers] choices of sampled tokens that somebody serves
  bool is_weighted = false;                     // whether requests weigh differently

  [[nodiscard]] std::size_t tokens() const noexcept { return request_of_token.size(); }
  [[nodiscard]] std::span<const std::uint16_t> layer(std::size_t l) const {
    const std::size_t n = tokens() * shape.experts_per_token;
    return std::span(ids).subspan(l * n, n);
  }
  [[nodiscard]] std::span<const std::int64_t> layer_loads(std::size_t l) const {
    return std::span(loads).subspan(l * shape.experts, shape.experts);
  }
};

[[nodiscard]] inline search_sample take_sample(const trace_view& from, phase served, std::size_t most_tokens,
                                               std::size_t most_requests, search_random& random) {
  search_sample out;
  out.shape = from.shape;
  const std::size_t layers = from.shape.layers, experts = from.shape.experts, k = from.shape.experts_per_token;
  std::vector<std::uint32_t> order;
  for (std::size_t r = 0; r < from.requests.size(); ++r) {
    if (from.requests[r].range(served).size() > 0) order.push_back(static_cast<std::uint32_t>(r));
  }
  for (std::size_t i = 0; i + 1 < order.size(); ++i) {
    std::swap(order[i], order[i + random.below(order.size() - i)]);
  }
  order.resize(std::min(order.size(), std::max<std::size_t>(most_requests, 1)));
  const std::vector<std::uint64_t> weights = domain_weights(from.requests, served);
  out.is_weighted = std::any_of(weights.begin(), weights.end(), [](std::uint64_t w) { return w != weight_one; });
  std::uint64_t all = 0, weighed = 0;
  for (const std::uint32_t r : order) {
    all += from.requests[r].range(served).size();
    weighed += from.requests[r].range(served).size() * weights[r];
  }
  const std::uint64_t kept = std::min<std::uint64_t>(all, std::max<std::size_t>(most_tokens, 1));

  std::vector<std::uint64_t> tokens;
  std::uint64_t carried = 0;  // parts of tokens, so that roundings even out
  for (const std::uint32_t r : order) {
    const token_range range = from.requests[r].range(served);
    carried += range.size() * weights[r] * kept;
    const std::uint64_t share = std::max<std::uint64_t>(1, carried / weighed);
    carried %= weighed;
    for (std::uint64_t i = 0; i < share; ++i) {
      tokens.push_back(range.first + i * range.size() / share);
      out.request_of_token.push_back(static_cast<std::uint32_t>(out.requests.size()));
    }
    out.requests.push_back(r);
    out.tokens_of.push_back(share);
  }
  for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
    const std::size_t j = i + random.below(tokens.size() - i);
    std::swap(tokens[i], tokens[j]);
    std::swap(out.request_of_token[i], out.request_of_token[j]);
  }
  out.ids.resize(layers * tokens.size() * k);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const std::uint16_t* const e = from.token(tokens[t]).data();
    for (std::size_t l = 0; l < layers; ++l) {
      std::transform(e + l * k, e + (l + 1) * k, out.ids.data() + (l * tokens.size() + t) * k,
                     [&](std::uint16_t id) { return static_cast<std::uint16_t>(std::min<std::size_t>(id, experts)); });
    }
  }
  for (std::size_t l = 0; l < layers; ++l) {
    const std::span<const std::uint16_t> chosen = out.layer(l);
    out.pairs.push_back(static_cast<std::size_t>(
        std::count_if(chosen.begin(), chosen.end(), [&](std::uint16_t id) { return id < experts; })));
  }

  // loads from more tokens than are searched: they cost one pass
  out.loads.assign(layers * experts, 0);
  const std::uint64_t served_tokens = from.tokens(served);
  const std::uint64_t step = std::max<std::uint64_t>(1, served_tokens / 262'144);
  std::uint64_t seen = 0, counted = 0;
  for (std::size_t r = 0; r < from.requests.size(); ++r) {
    const token_range range = from.requests[r].range(served);
    for (std::uint64_t t = range.first; t < range.last; ++t) {
      if (seen++ % step != 0) continue;
      counted += weights[r];
      const std::uint16_t* e = from.token(t).data();
      for (std::size_t l = 0; l < layers; ++l) {
        for (std::size_t i = 0; i < k; ++i, ++e) {
          if (*e != no_expert) out.loads[l * experts + *e] += static_cast<std::int64_t>(weights[r]);
        }
      }
    }
  }
  for (std::int64_t& x : out.loads) {
    x = x * static_cast<std::int64_t>(tokens.size()) / static_cast<std::int64_t>(std::max<std::uint64_t>(counted, 1));
  }
  return out;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
