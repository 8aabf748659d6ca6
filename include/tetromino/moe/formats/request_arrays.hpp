#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"                // result, error
#include "../../io/detail/file_text.hpp"  // shape_text
#include "../trace.hpp"                   // trace
#include "number_array.hpp"               // number_array, append_ids

#include <algorithm>  // std::copy_n, std::count, std::max, std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t, std::uint32_t, std::uint64_t
#include <numeric>    // std::iota
#include <string>     // std::string
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Leaves out layers in which no token has an expert: the dense ones of a model, which some engines record too.
/// `numbers` [layers] are those of the layers in the model.
inline void drop_layers_of_nobody(routing_shape& shape, std::vector<std::uint16_t>& ids,
                                  std::vector<std::uint32_t>& numbers) {
  const std::size_t k = shape.experts_per_token, rows = ids.size() / k;
  std::vector<bool> used(shape.layers, false);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] != no_expert) used[i / k % shape.layers] = true;
  }
  const auto left = static_cast<std::size_t>(std::count(used.begin(), used.end(), true));
  if (left == shape.layers || left == 0) return;
  std::size_t to = 0;
  for (std::size_t row = 0; row < rows; ++row) {
    if (!used[row % shape.layers]) continue;
    std::copy_n(ids.begin() + static_cast<std::ptrdiff_t>(row * k), k, ids.begin() + static_cast<std::ptrdiff_t>(to));
    to += k;
  }
  ids.resize(to);
  std::size_t kept = 0;
  for (std::size_t l = 0; l < shape.layers; ++l) {
    if (used[l]) numbers[kept++] = numbers[l];
  }
  numbers.resize(left);
  shape.layers = left;
}

/// 0, 1, … for layers that a file holds in their order.
[[nodiscard]] inline std::vector<std::uint32_t> numbers_of_layers(std::size_t layers) {
  std::vector<std::uint32_t> out(layers);
  std::iota(out.begin(), out.end(), std::uint32_t{0});
  return out;
}

[[nodiscard]] inline std::size_t largest_id(const std::vector<std::uint16_t>& ids) {
  std::size_t largest = 0;
  for (const std::uint16_t id : ids) largest = id == no_expert ? largest : std::max<std::size_t>(largest, id);
  return largest;
}

/// Puts the routing of requests, one array [tokens, layers, experts per token] each, together to a trace.
class request_arrays {
 public:
  /// Takes a request of which the first `prompt_tokens` are its prompt; says what is wrong, or nothing.
  [[nodiscard]] std::string add(const number_array& array, std::uint64_t prompt_tokens) {
    if (array.shape.size() != 3) {
      return text("expected [tokens, layers, experts per token], got ", tetromino::detail::shape_text(array.shape));
    }
    if (array.shape[0] > 0xFFFF'FFFF) return text("expected at most 2^32 - 1 tokens, got ", array.shape[0]);
    if (requests_.empty()) shape_ = {array.shape[1], 0, array.shape[2]};
    if (array.shape[1] != shape_.layers || array.shape[2] != shape_.experts_per_token) {
      return text("expected ", shape_.layers, " layers and ", shape_.experts_per_token,
                  " experts per token as before, got ", tetromino::detail::shape_text(array.shape));
    }
    if (std::string bad = append_ids(array, ids_); !bad.empty()) return bad;
    const auto tokens = static_cast<std::uint32_t>(array.shape[0]);
    requests_.push_back(
        {tokens_, tokens, static_cast<std::uint32_t>(std::min<std::uint64_t>(prompt_tokens, tokens)), 0});
    tokens_ += tokens;
    return {};
  }

  /// The trace of all requests, and the numbers of its layers. `experts` 0: the largest id + 1.
  [[nodiscard]] result<trace> finish(std::size_t experts, std::vector<std::uint32_t>& layers) {
    if (ids_.empty()) return error(errc::malformed_file, "expected the routing of at least one token, got none");
    shape_.experts = experts != 0 ? experts : largest_id(ids_) + 1;
    layers = numbers_of_layers(shape_.layers);
    drop_layers_of_nobody(shape_, ids_, layers);
    return trace::try_make(shape_, std::move(ids_), std::move(requests_));
  }

 private:
  routing_shape shape_;
  std::vector<std::uint16_t> ids_;
  std::vector<request> requests_;
  std::uint64_t tokens_ = 0;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
