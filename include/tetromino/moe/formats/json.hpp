#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"           // text
#include "../../io/detail/json.hpp"  // json_document, parse_json

#include <nlohmann/json.hpp>  // nlohmann::json

#include <cstdint>  // std::uint64_t

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

using tetromino::detail::json_document;
using tetromino::detail::parse_json;
using tetromino::detail::text;

/// A whole number from 0 to `most`; false if the value is none.
[[nodiscard]] inline bool whole_number(const nlohmann::json& j, std::uint64_t most, std::uint64_t& out) {
  const auto* n = j.get_ptr<const nlohmann::json::number_unsigned_t*>();
  if (n == nullptr || *n > most) return false;
  out = *n;
  return true;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
