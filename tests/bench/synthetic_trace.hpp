#pragma once

/// A trace of made-up routing, top-8, for sizes that nobody recorded.

#include "../reference/synthetic_routing.hpp"

#include <tetromino/moe/trace.hpp>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

inline tetromino::moe::trace synthetic_trace(std::size_t layers, std::size_t experts, std::size_t requests,
                                             std::uint32_t prefill, std::uint32_t decode) {
  reference::synthetic_routing made = reference::make_routing(11, layers, experts, 8, requests, prefill, decode);
  std::vector<tetromino::moe::request> list;
  for (std::size_t r = 0; r < requests; ++r) {
    list.push_back({r * (prefill + decode), prefill + decode, prefill, made.topic[r]});
  }
  return tetromino::moe::trace::make({layers, experts, 8}, std::move(made.ids), std::move(list));
}
