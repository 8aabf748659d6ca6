#pragma once

#include "../../error.hpp"  // text
#include "file_text.hpp"    // printable

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>      // std::find_if
#include <array>          // std::array
#include <cstddef>        // std::size_t
#include <cstdint>        // std::int64_t, std::uint64_t
#include <string>         // std::string
#include <string_view>    // std::string_view
#include <unordered_set>  // std::unordered_set
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::detail {

/// JSON that goes away without asking for memory. Json's own destructor first moves what a list or an object holds to a
/// new list, and ends the program where there is no room for one; for an empty one it needs none.
template <class Json>
class json_document {
 public:
  TETROMINO_ABI json_document() = default;
  TETROMINO_ABI json_document(json_document&& other) noexcept : root_(std::move(other.root_)) {}
  TETROMINO_ABI json_document& operator=(json_document&& other) noexcept {
    root_.swap(other.root_);
    return *this;
  }
  TETROMINO_ABI ~json_document() { empty(root_); }

  [[nodiscard]] TETROMINO_ABI Json& operator*() noexcept { return root_; }
  [[nodiscard]] TETROMINO_ABI const Json& operator*() const noexcept { return root_; }

 private:
  TETROMINO_ABI static void empty(Json& json) noexcept {  // as deep as parse_json goes
    if (auto* const list = json.template get_ptr<typename Json::array_t*>()) {
      for (Json& value : *list) empty(value);
      list->clear();
    } else if (auto* const object = json.template get_ptr<typename Json::object_t*>()) {
      for (auto& member : *object) empty(member.second);
      object->clear();
    }
  }

  Json root_;
};

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Tells `events` what JSON holds, piece by piece, as nlohmann::json::sax_parse does; that one would have compilers
/// translate the readers of five binary formats too, which are more than all the rest. (Its own parser is no promise of
/// nlohmann's: seen with 3.11.) False where `events` said so.
template <class Events>
[[nodiscard]] bool follow_json(std::string_view written, Events& events) {
  auto input = nlohmann::detail::input_adapter(written.begin(), written.end());
  return nlohmann::detail::parser<nlohmann::json, decltype(input)>(std::move(input)).sax_parse(&events);
}

/// Builds JSON that nobody vouches for, event by event: each key once per object, and no more than it may hold. Json is
/// nlohmann::json, or ordered_json, which keeps the order of keys. (The library's own parser with a callback looks
/// through the whole list at the end of each object in it, and ordered_json's through all keys for each.)
template <class Json>
class json_builder {
 public:
  json_builder(Json& out, std::size_t most_values) : root_(out), left_(most_values) {}

  [[nodiscard]] const std::string& problem() const { return problem_; }

  bool null() { return add(nullptr); }
  bool boolean(bool value) { return add(value); }
  bool number_integer(std::int64_t value) { return add(value); }
  bool number_unsigned(std::uint64_t value) { return add(value); }
  bool number_float(double value, const std::string& /*written*/) { return add(value); }
  bool string(std::string& value) { return add(std::move(value)); }
  bool binary(const nlohmann::json::binary_t& /*value*/) { return false; }
  bool start_object(std::size_t /*unknown*/) { return open(Json::object()); }
  bool start_array(std::size_t /*unknown*/) { return open(Json::array()); }
  bool key(std::string& name) {
    auto& object = open_.back().json->template get_ref<typename Json::object_t&>();
    bool is_new = true;
    if constexpr (requires { object.try_emplace(std::move(name)); }) {
      const auto [at, inserted] = object.try_emplace(std::move(name));
      member_ = &at->second;
      is_new = inserted;
      if (!is_new) name = at->first;
    } else {
      is_new = open_.back().keys.insert(name).second;
      if (is_new) member_ = &object.emplace_back(std::move(name), Json()).second;
    }
    return is_new || fail(text("expected each key once, got ", printable(name, 40), " twice"));
  }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool parse_error(std::size_t /*at*/, const std::string& /*near*/, const nlohmann::json::exception&) {
    return fail("expected JSON, got something else");
  }

 private:
  static constexpr std::size_t most_levels = 16;
  struct container {
    Json* json = nullptr;                    // in the one before
    std::unordered_set<std::string> keys{};  // where the object itself finds none quickly
  };

  bool fail(std::string problem) {
    if (problem_.empty()) problem_ = std::move(problem);
    return false;
  }
  Json& place(Json value) {
    if (open_.empty()) return root_ = std::move(value);
    Json& in = *open_.back().json;
    if (in.is_array()) return in.emplace_back(std::move(value));
    return *member_ = std::move(value);
  }
  bool add(Json value) {
    if (left_ == 0) return fail("expected fewer values of JSON");
    --left_;
    place(std::move(value));
    return true;
  }
  bool open(Json empty) {
    if (open_.size() == most_levels) return fail(text("expected at most ", most_levels, " levels of JSON"));
    if (left_ == 0) return fail("expected fewer values of JSON");
    --left_;
    open_.push_back({&place(std::move(empty))});
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  Json& root_;
  std::vector<container> open_;
  Json* member_ = nullptr;  // of the innermost object, for the next value
  std::size_t left_;
  std::string problem_;
};

/// Parses JSON that nobody vouches for into `out`: linear in time, with at most `most_values` values and 16 levels in
/// memory, and each key once per object. Says what is wrong, or nothing.
template <class Json>
[[nodiscard]] std::string parse_json(std::string_view written, Json& out,
                                     std::size_t most_values = std::size_t{1} << 23) {
  json_builder<Json> builder(out, most_values);
  return follow_json(written, builder) ? std::string() : builder.problem();
}

/// NaN and infinities, which JSON does not have but Python writes, as in the config.json of state-space models
/// ("time_step_limit": [0.0, Infinity]): within JSON they are text that nothing else holds.
inline constexpr std::array<std::string_view, 3> python_numbers{"-Infinity", "Infinity", "NaN"};

/// Text of Python's JSON as JSON; `with_python_numbers` is the way back.
inline std::string without_python_numbers(std::string_view written) {
  std::string out;
  out.reserve(written.size());
  bool in_text = false;
  for (std::size_t i = 0; i < written.size();) {
    const std::string_view rest = written.substr(i);
    const auto number = std::find_if(python_numbers.begin(), python_numbers.end(),
                                     [&](std::string_view one) { return !in_text && rest.starts_with(one); });
    if (number != python_numbers.end()) {
      out += text("\"\\u0001", *number, '"');
      i += number->size();
      continue;
    }
    if (in_text && rest[0] == '\\' && rest.size() > 1)
      out += written[i++];
    else if (rest[0] == '"')
      in_text = !in_text;
    out += written[i++];
  }
  return out;
}

inline std::string with_python_numbers(std::string_view written) {
  constexpr std::string_view before = "\"\\u0001";
  std::string out;
  out.reserve(written.size());
  for (std::size_t i = 0; i < written.size();) {
    const std::string_view rest = written.substr(i);
    const auto number = std::find_if(python_numbers.begin(), python_numbers.end(), [&](std::string_view one) {
      return rest.starts_with(before) && rest.substr(before.size()).starts_with(one) &&
             rest.substr(before.size() + one.size()).starts_with('"');
    });
    if (number != python_numbers.end()) {
      out += *number;
      i += before.size() + number->size() + 1;
    } else {
      out += written[i++];
    }
  }
  return out;
}

/// The text that a JSON object has under a key; empty if it has none, or something else.
inline std::string json_text(const nlohmann::json& object, const char* key) {
  if (!object.is_object()) return {};
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
