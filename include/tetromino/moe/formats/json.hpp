#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"                // text
#include "../../io/detail/file_text.hpp"  // printable

#include <nlohmann/json.hpp>  // nlohmann::json

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint64_t
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

using tetromino::detail::text;

/// Builds JSON that nobody vouches for, event by event: each key once per object, and no more than it may hold. (The
/// library's own parser with a callback looks through the whole list at the end of each object in it.)
class json_builder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  json_builder(nlohmann::json& out, std::size_t most_values) : root_(out), left_(most_values) {}

  [[nodiscard]] const std::string& problem() const { return problem_; }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t& /*written*/) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t& /*value*/) override { return false; }
  bool start_object(std::size_t /*unknown*/) override { return open(nlohmann::json::object()); }
  bool start_array(std::size_t /*unknown*/) override { return open(nlohmann::json::array()); }
  bool key(string_t& name) override {
    const auto [at, is_new] = open_.back()->get_ref<nlohmann::json::object_t&>().try_emplace(std::move(name));
    member_ = &at->second;
    return is_new || fail(text("expected each key once, got ", tetromino::detail::printable(at->first, 40), " twice"));
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t /*at*/, const std::string& /*near*/,
                   const nlohmann::json::exception& /*error*/) override {
    return fail("expected JSON, got something else");
  }

 private:
  static constexpr std::size_t most_levels = 16;

  bool fail(std::string problem) {
    if (problem_.empty()) problem_ = std::move(problem);
    return false;
  }
  nlohmann::json& place(nlohmann::json value) {
    if (open_.empty()) return root_ = std::move(value);
    if (open_.back()->is_array()) return open_.back()->emplace_back(std::move(value));
    return *member_ = std::move(value);
  }
  bool add(nlohmann::json value) {
    if (left_ == 0) return fail("expected fewer values of JSON");
    --left_;
    place(std::move(value));
    return true;
  }
  bool open(nlohmann::json container) {
    if (open_.size() == most_levels) return fail(text("expected at most ", most_levels, " levels of JSON"));
    if (left_ == 0) return fail("expected fewer values of JSON");
    --left_;
    open_.push_back(&place(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  nlohmann::json& root_;
  std::vector<nlohmann::json*> open_;  // each in the one before
  nlohmann::json* member_ = nullptr;   // of the innermost object, for the next value
  std::size_t left_;
  std::string problem_;
};

/// Parses JSON that nobody vouches for into `out`: linear in time, with at most `most_values` values and 16 levels in
/// memory, and each key once per object. Says what is wrong, or nothing.
[[nodiscard]] inline std::string parse_json(std::string_view written, nlohmann::json& out,
                                            std::size_t most_values = std::size_t{1} << 23) {
  json_builder builder(out, most_values);
  return nlohmann::json::sax_parse(written.begin(), written.end(), &builder) ? std::string() : builder.problem();
}

/// A whole number from 0 to `most`; false if the value is none.
[[nodiscard]] inline bool whole_number(const nlohmann::json& j, std::uint64_t most, std::uint64_t& out) {
  const auto* n = j.get_ptr<const nlohmann::json::number_unsigned_t*>();
  if (n == nullptr || *n > most) return false;
  out = *n;
  return true;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
