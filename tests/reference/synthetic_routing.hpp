#pragma once

/// Made-up routing with the traits of the recorded one: some experts are popular, topics prefer different experts, and
/// a request keeps to its topic from prefill to decode. For benchmarks and tests that need sizes nobody recorded.

#include "generators.hpp"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace reference {

struct synthetic_routing {
  std::size_t layers, experts, experts_per_token;
  std::vector<std::uint16_t> ids;               // [tokens, layers, experts_per_token]
  std::vector<std::uint32_t> topic;             // [requests]
  std::uint32_t prefill_tokens, decode_tokens;  // of each request
};

inline synthetic_routing make_routing(std::uint64_t seed, std::size_t layers, std::size_t experts, std::size_t k,
                                      std::size_t requests, std::uint32_t prefill_tokens, std::uint32_t decode_tokens,
                                      std::size_t topics = 16) {
  generator g(seed);
  // per topic and layer, experts in order of preference; per layer, an order that all topics share in part
  std::vector<std::uint16_t> order(topics * layers * experts);
  std::vector<std::uint16_t> shared(experts);
  for (std::size_t l = 0; l < layers; ++l) {
    for (std::size_t e = 0; e < experts; ++e) shared[e] = static_cast<std::uint16_t>(e);
    for (std::size_t e = 0; e < experts; ++e) std::swap(shared[e], shared[e + g.below(experts - e)]);
    for (std::size_t t = 0; t < topics; ++t) {
      std::uint16_t* const mine = order.data() + (t * layers + l) * experts;
      for (std::size_t e = 0; e < experts; ++e) mine[e] = shared[e];
      for (std::size_t n = 0; n < experts; ++n) std::swap(mine[g.below(experts)], mine[g.below(experts)]);
    }
  }
  synthetic_routing out{layers, experts, k, {}, {}, prefill_tokens, decode_tokens};
  out.ids.reserve(requests * (prefill_tokens + decode_tokens) * layers * k);
  std::vector<std::uint64_t> taken(experts, 0);
  std::uint64_t row = 0;
  for (std::size_t r = 0; r < requests; ++r) {
    const std::size_t topic = g.below(topics);
    out.topic.push_back(static_cast<std::uint32_t>(topic));
    for (std::uint32_t token = 0; token < prefill_tokens + decode_tokens; ++token) {
      for (std::size_t l = 0; l < layers; ++l) {
        const std::uint16_t* const mine = order.data() + (topic * layers + l) * experts;
        ++row;
        for (std::size_t i = 0; i < k;) {
          // the head of the list is likely: position falls off with the square of a uniform number
          const double u = g.uniform();
          const auto at = static_cast<std::size_t>(u * u * static_cast<double>(experts));
          const std::uint16_t e = mine[at < experts ? at : experts - 1];
          if (taken[e] == row) continue;
          taken[e] = row;
          out.ids.push_back(e);
          ++i;
        }
      }
    }
  }
  return out;
}

}  // namespace reference
