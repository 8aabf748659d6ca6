#pragma once

/// Placements as JSON. Opt-in: needs nlohmann-json.

#include "../error.hpp"   // tetromino::result, tetromino::error
#include "placement.hpp"  // placement

#include <nlohmann/json.hpp>  // nlohmann::json

#include <cstddef>      // std::size_t
#include <cstdint>      // std::int32_t
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// A placement as one line of JSON: `{"experts":E,"layers":L,"slot_to_expert":[[…],…],"slots":S}`, −1 for empty slots.
[[nodiscard]] inline std::string to_json(const placement& p) {
  nlohmann::json rows = nlohmann::json::array();
  for (std::size_t l = 0; l < p.layers(); ++l) {
    rows.push_back(std::vector<std::int32_t>(p.layer(l).begin(), p.layer(l).end()));
  }
  const nlohmann::json out = {
      {"layers", p.layers()}, {"experts", p.experts()}, {"slots", p.slots()}, {"slot_to_expert", std::move(rows)}};
  return out.dump();
}

/// Reads what `to_json` wrote; other keys are ignored. Errors say which key is missing or wrong.
[[nodiscard]] inline result<placement> try_placement_from_json(std::string_view written) {
  const nlohmann::json j = nlohmann::json::parse(written, nullptr, /*allow_exceptions=*/false);
  if (!j.is_object()) return error(errc::malformed_file, "placement: expected a JSON object");
  std::size_t sizes[3] = {};
  constexpr const char* keys[3] = {"layers", "experts", "slots"};
  for (std::size_t i = 0; i < 3; ++i) {
    const auto found = j.find(keys[i]);
    const auto* n = found == j.end() ? nullptr : found->get_ptr<const nlohmann::json::number_unsigned_t*>();
    if (n == nullptr) {
      return error(errc::malformed_file, detail::text("placement: expected ", keys[i], ", a whole number"));
    }
    sizes[i] = static_cast<std::size_t>(*n);
  }
  if (sizes[1] == 0 || sizes[1] > placement::max_experts) {
    return error(errc::malformed_file,
                 detail::text("placement: expected 1 to ", placement::max_experts, " experts, got ", sizes[1]));
  }
  const auto rows = j.find("slot_to_expert");
  if (rows == j.end() || !rows->is_array() || rows->size() != sizes[0]) {
    return error(errc::malformed_file,
                 detail::text("placement: expected slot_to_expert, a list of ", sizes[0], " lists"));
  }
  std::vector<std::int32_t> entries;
  for (std::size_t l = 0; l < rows->size(); ++l) {
    const nlohmann::json& row = (*rows)[l];
    if (!row.is_array() || row.size() != sizes[2]) {
      return error(errc::malformed_file, detail::text("placement: expected slot_to_expert of layer ", l, ", a list of ",
                                                      sizes[2], " entries"));
    }
    for (const nlohmann::json& e : row) {
      const bool fits = e.is_number_unsigned() && *e.get_ptr<const nlohmann::json::number_unsigned_t*>() < sizes[1];
      const bool empty = e.is_number_integer() && !e.is_number_unsigned() &&
                         *e.get_ptr<const nlohmann::json::number_integer_t*>() == empty_slot;
      if (!fits && !empty) {
        return error(errc::malformed_file,
                     detail::text("placement: expected experts from -1 (empty) to ", sizes[1] - 1, " in layer ", l,
                                  ", got ", e.is_structured() ? e.type_name() : e.dump(-1, ' ', true).substr(0, 40)));
      }
      entries.push_back(e.get<std::int32_t>());
    }
  }
  return placement::try_make(sizes[0], sizes[1], sizes[2], std::move(entries));
}
[[nodiscard]] inline placement placement_from_json(std::string_view written) {
  return try_placement_from_json(written).value();
}

}  // namespace tetromino::moe
