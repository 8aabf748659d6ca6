#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"       // tetromino::result, tetromino::error
#include "profile.hpp"        // profile
#include "search/random.hpp"  // detail::search_random
#include "trace.hpp"          // trace, request, phase, no_expert

#include <algorithm>  // std::max
#include <cmath>      // std::llround
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t, std::uint64_t
#include <span>       // std::span
#include <utility>    // std::move, std::swap
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// How many tokens are drawn, and from which stream of random numbers.
struct sampled_trace_options {
  std::size_t tokens = 16'384;  ///< of all requests together, shared by what each has in the profile
  std::uint64_t seed = 1;
};

namespace detail::inline TETROMINO_ISA {

/// Draws the experts of tokens from how often one request used each of them.
class token_sampler {
 public:
  token_sampler(const routing_shape& shape, std::uint64_t seed)
      : shape_(shape), random_(seed), order_(shape.experts), end_(shape.experts) {
    for (std::size_t e = 0; e < shape.experts; ++e) order_[e] = static_cast<std::uint16_t>(e);
  }

  /// The tokens that uses[layers, experts] are of. No token uses an expert twice, so there are no fewer than the uses
  /// of any expert.
  [[nodiscard]] double tokens(std::span<const float> uses) const {
    double most = 0;
    for (std::size_t l = 0; l < shape_.layers; ++l) most = std::max(most, tokens_of_layer(uses, l));
    return most;
  }

  /// Adds the ids [layers, experts per token] of one token. Each expert is drawn with the probability uses / tokens, by
  /// systematic sampling in random order (Madow 1949), so that none is drawn twice; what is left belongs to nobody.
  void draw(std::span<const float> uses, double tokens, std::vector<std::uint16_t>& to) {
    for (std::size_t l = 0; l < shape_.layers; ++l) {
      for (std::size_t i = shape_.experts; i > 1; --i) std::swap(order_[i - 1], order_[random_.below(i)]);
      double sum = 0;
      for (std::size_t i = 0; i < shape_.experts; ++i) {
        sum += static_cast<double>(uses[l * shape_.experts + order_[i]]);
        end_[i] = sum;
      }
      double at = static_cast<double>(random_.bits() >> 11) * 0x1p-53 * tokens;
      std::size_t i = 0;
      for (std::size_t j = 0; j < shape_.experts_per_token; ++j, at += tokens) {
        while (i < shape_.experts && end_[i] <= at) ++i;
        to.push_back(i < shape_.experts ? order_[i] : no_expert);
        if (i < shape_.experts) ++i;  // also where sums are rounded
      }
    }
  }

 private:
  [[nodiscard]] double tokens_of_layer(std::span<const float> uses, std::size_t l) const {
    double sum = 0, most = 0;
    for (const float x : uses.subspan(l * shape_.experts, shape_.experts)) {
      sum += static_cast<double>(x);
      most = std::max(most, static_cast<double>(x));
    }
    return std::max(most, sum / static_cast<double>(shape_.experts_per_token));
  }

  routing_shape shape_;
  search_random random_;
  std::vector<std::uint16_t> order_;
  std::vector<double> end_;  // [experts] of each one's part, in that order
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// A trace for solvers that need one, such as `local`, where an engine keeps a profile: request i has tokens whose
/// experts are drawn by its signature, as often in each phase as it used them, independently of each other. Which
/// experts serve the same token is not in a signature: on the recorded routing, plans for fewest visited nodes come out
/// 7 to 8 % dearer than from the trace itself, plans for fewest remote pairs alike. Requests without tokens stay
/// without; domains are not told apart. Same profile and seed, same trace. Errors: a profile that keeps no requests or
/// has no tokens, no tokens asked for.
[[nodiscard]] inline result<trace> try_sampled_trace(const profile& of, const sampled_trace_options& options = {}) {
  if (of.options().requests == 0) {
    return error(errc::invalid_argument, "sampled_trace: expected a profile that keeps requests, got one without");
  }
  if (options.tokens == 0) return error(errc::invalid_argument, "sampled_trace: expected at least 1 token, got 0");
  detail::token_sampler sampler(of.shape(), options.seed);
  struct part {
    std::span<const float> uses;
    double tokens;
  };
  std::vector<part> parts;  // prefill and decode of each request
  double all = 0;
  for (std::size_t r = 0; r < of.options().requests; ++r) {
    for (const phase p : {phase::prefill, phase::decode}) {
      const std::span<const float> uses = of.signature(r, p);
      parts.push_back({uses, sampler.tokens(uses)});
      all += parts.back().tokens;
    }
  }
  if (!(all > 0)) return error(errc::invalid_argument, "sampled_trace: expected a profile of tokens, got one of none");
  std::vector<std::uint16_t> ids;
  std::vector<request> requests;
  const auto draw = [&](const part& from) {
    const double share = static_cast<double>(options.tokens) * from.tokens / all;
    const auto count = from.tokens > 0 ? std::max<long long>(1, std::llround(share)) : 0;
    for (long long i = 0; i < count; ++i) sampler.draw(from.uses, from.tokens, ids);
    return static_cast<std::uint32_t>(count);
  };
  for (std::size_t i = 0; i < parts.size(); i += 2) {
    const std::uint64_t first = ids.size() / of.shape().ids_per_token();
    const std::uint32_t prefill = draw(parts[i]), decode = draw(parts[i + 1]);
    requests.push_back({first, prefill + decode, prefill, 0});
  }
  return trace::try_make(of.shape(), std::move(ids), std::move(requests));
}
[[nodiscard]] inline trace sampled_trace(const profile& of, const sampled_trace_options& options = {}) {
  return try_sampled_trace(of, options).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
