#pragma once

#include "../../error.hpp"  // error, result
#include "../dtype.hpp"     // io::dtype
#include "file_text.hpp"    // printable, shape_text, invalid_utf8, checked_product
#include "json.hpp"         // follow_json

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>    // std::sort, std::stable_sort
#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint64_t
#include <functional>   // std::less
#include <map>          // std::map
#include <numeric>      // std::iota
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::exchange, std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::io {

/// Free text that travels with a file: `__metadata__` of its header.
using safetensors_metadata = std::map<std::string, std::string, std::less<>>;

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail {

/// The largest header that the format allows.
inline constexpr std::uint64_t safetensors_header_limit = 100'000'000;
inline constexpr std::size_t safetensors_prefix = 8;  // bytes of the header's length, in front of it
inline constexpr std::string_view safetensors_metadata_key = "__metadata__";

inline namespace TETROMINO_ISA {

/// Bytes of a tensor, or why there is no such number: "its 12 bits are not whole bytes".
inline result<std::size_t> tensor_bytes(io::dtype type, std::span<const std::size_t> shape) {
  const auto product = nonzero_product(shape);
  if (!product) {
    return error(errc::malformed_file, {"expected a shape whose product fits in 64 bits, found ", shape_text(shape)});
  }
  const auto bits = checked_product(*product, io::bits_per_element(type));
  if (!bits) {
    return error(errc::malformed_file, {"expected a size in bits that fits in 64 bits, found shape ", shape_text(shape),
                                        " of ", io::name(type)});
  }
  if (is_empty(shape)) return std::size_t{0};
  if (*bits % 8 != 0) {
    return error(errc::malformed_file, {"expected elements that fill whole bytes, found shape ", shape_text(shape),
                                        " of ", io::name(type), ", ", *bits, " bits"});
  }
  return *bits / 8;
}

}  // namespace TETROMINO_ISA

/// One tensor as the header describes it; `begin` and `end` count from the end of the header.
struct safetensors_entry {
  std::string name;
  io::dtype type{};
  std::vector<std::size_t> shape;
  std::size_t begin = 0;
  std::size_t end = 0;

  TETROMINO_ABI safetensors_entry() = default;
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI safetensors_entry(const safetensors_entry&) = default;
  TETROMINO_ABI safetensors_entry(safetensors_entry&&) noexcept = default;
  TETROMINO_ABI safetensors_entry& operator=(const safetensors_entry&) = default;
  TETROMINO_ABI safetensors_entry& operator=(safetensors_entry&&) noexcept = default;
};

/// A header that has been checked against its file: the tensors, by offset, cover the data without gap or overlap.
struct safetensors_header {
  std::vector<safetensors_entry> tensors;
  io::safetensors_metadata metadata;
  std::size_t data_begin = 0;
};

inline namespace TETROMINO_ISA {

/// Follows the JSON text event by event, so that nothing is accepted that the format does not have, and duplicate names
/// are seen. Stops at the first error, kept in `problem`.
class safetensors_events {
 public:
  std::vector<safetensors_entry> tensors;
  io::safetensors_metadata metadata;
  std::string problem;

  bool null() {  // readers of other projects take "__metadata__": null for none
    return place_ == place::header && key_ == safetensors_metadata_key ? true : wrong("null");
  }
  bool boolean(bool value) { return wrong(value ? "true" : "false"); }
  bool number_integer(std::int64_t value) { return wrong(value == 0 ? std::string("-0") : text(value)); }
  bool number_float(double, const std::string& digits) { return wrong(digits.substr(0, longest_number)); }
  bool binary(const nlohmann::json::binary_t&) { return wrong("binary data"); }

  bool number_unsigned(std::uint64_t value) {
    if (place_ != place::shape && place_ != place::offsets) return wrong(text(value));
    if (value > static_cast<std::size_t>(-1)) return wrong(text(value, ", too large for this machine"));
    const std::size_t number = value;
    if (place_ == place::shape) {
      tensors.back().shape.push_back(number);
      return true;
    }
    if (offsets_seen_ == 2) return fail("expected two offsets [begin, end], found more");
    (offsets_seen_++ == 0 ? tensors.back().begin : tensors.back().end) = number;
    return true;
  }

  bool string(std::string& value) {
    if (place_ == place::metadata) {
      metadata.insert_or_assign(key_, std::move(value));
      return true;
    }
    if (place_ != place::tensor || field_ != field::dtype) return wrong(text("the string ", printable(value)));
    const auto type = io::dtype_named(value);
    if (!type) {
      std::string known;
      for (const auto& fact : dtype_facts) known += text(known.empty() ? "" : ", ", fact.name);
      return fail(text("expected one of ", known, ", found ", printable(value)));
    }
    tensors.back().type = *type;
    return true;
  }

  bool start_object(std::size_t) {
    if (place_ == place::outside) {
      place_ = place::header;
    } else if (place_ == place::header && key_ == safetensors_metadata_key) {
      place_ = place::metadata;
    } else if (place_ == place::header) {
      place_ = place::tensor;
      tensors.emplace_back().name = std::move(key_);
      fields_seen_ = {};
      offsets_seen_ = 0;
    } else {
      return wrong("an object");
    }
    return true;
  }

  bool key(std::string& name) {
    key_ = std::move(name);
    if (place_ == place::header && key_ == safetensors_metadata_key) {
      if (std::exchange(metadata_seen_, true)) return fail("expected it once, found it twice");
    } else if (place_ == place::metadata) {
      if (metadata.contains(key_)) return fail("expected each key once, found it twice");
    } else if (place_ == place::tensor) {
      const std::size_t found = key_ == "dtype" ? 0 : key_ == "shape" ? 1 : key_ == "data_offsets" ? 2 : 3;
      if (found == 3) {
        field_ = field::none;
        return fail(text("expected the keys dtype, shape and data_offsets, found ", printable(key_)));
      }
      field_ = static_cast<field>(found);
      if (std::exchange(fields_seen_[found], true)) return fail("expected each key once, found it twice");
    }
    return true;
  }

  bool end_object() {
    if (place_ == place::tensor) {
      for (std::size_t i = 0; i < fields_seen_.size(); ++i) {
        if (fields_seen_[i]) continue;
        field_ = field::none;
        return fail(text("expected the keys dtype, shape and data_offsets, found no ", field_names[i]));
      }
    }
    place_ = place_ == place::header ? place::outside : place::header;
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != place::tensor || (field_ != field::shape && field_ != field::offsets)) return wrong("an array");
    place_ = field_ == field::shape ? place::shape : place::offsets;
    return true;
  }

  bool end_array() {
    if (place_ == place::offsets && offsets_seen_ != 2) {
      return fail(text("expected two offsets [begin, end], found ", offsets_seen_));
    }
    place_ = place::tensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception& reason) {
    constexpr std::size_t longest_reason = 200;
    std::string_view said = reason.what();
    if (const auto tag = said.find("] "); tag < longest_reason) said.remove_prefix(tag + 2);
    problem =
        text("the header: expected JSON, found a fault at byte ", position, ": ", printable(said, longest_reason));
    return false;
  }

 private:
  enum class place { outside, header, metadata, tensor, shape, offsets };
  enum class field { dtype, shape, offsets, none };
  static constexpr std::array<std::string_view, 3> field_names{"dtype", "shape", "data_offsets"};
  static constexpr std::size_t longest_number = 40;

  bool fail(std::string_view what) {
    problem = text(subject(), ": ", what);
    return false;
  }
  bool wrong(std::string_view found) { return fail(text("expected ", expected(), ", found ", found)); }

  std::string subject() const {
    switch (place_) {
      case place::outside:
        return "the header";
      case place::header:
        return key_ == safetensors_metadata_key ? key_ : text("tensor ", printable(key_));
      case place::metadata:
        return text(safetensors_metadata_key, " key ", printable(key_));
      default:
        break;
    }
    const std::string tensor = text("tensor ", printable(tensors.back().name));
    return field_ == field::none ? tensor : text(tensor, ", ", field_names[static_cast<std::size_t>(field_)]);
  }

  std::string_view expected() const {
    switch (place_) {
      case place::outside:
        return "a JSON object";
      case place::header:
        return key_ == safetensors_metadata_key ? "an object of strings" : "an object";
      case place::metadata:
        return "a string";
      case place::tensor:
        break;
      case place::shape:
        return "whole numbers from 0 to 2^64 - 1";
      case place::offsets:
        return "two whole numbers [begin, end]";
    }
    return field_ == field::dtype   ? "the name of a number type"
           : field_ == field::shape ? "an array of whole numbers"
                                    : "two whole numbers [begin, end]";
  }

  place place_ = place::outside;
  field field_ = field::none;
  std::string key_;
  bool metadata_seen_ = false;
  std::array<bool, 3> fields_seen_{};
  std::size_t offsets_seen_ = 0;
};

/// Checks tensors against each other and against the bytes of data, and sorts them by offset. Returns what is wrong, or
/// an empty text.
inline std::string check_safetensors_entries(std::vector<safetensors_entry>& tensors, std::size_t data_bytes) {
  const auto subject = [](const safetensors_entry& tensor) { return text("tensor ", printable(tensor.name)); };

  std::vector<std::size_t> by_name(tensors.size());
  std::iota(by_name.begin(), by_name.end(), std::size_t{0});
  std::sort(by_name.begin(), by_name.end(),
            [&](std::size_t a, std::size_t b) { return tensors[a].name < tensors[b].name; });
  for (std::size_t i = 1; i < by_name.size(); ++i) {
    if (tensors[by_name[i]].name == tensors[by_name[i - 1]].name) {
      return text(subject(tensors[by_name[i]]), ": expected each name once, found it twice");
    }
  }

  for (const safetensors_entry& tensor : tensors) {
    const auto offsets = [&] { return text("data_offsets [", tensor.begin, ", ", tensor.end, "]"); };
    if (tensor.begin > tensor.end) {
      return text(subject(tensor), ": expected an end after the beginning, found ", offsets());
    }
    if (tensor.end > data_bytes) {
      return text(subject(tensor), ": expected an end within the ", data_bytes, " bytes of data, found ", offsets(),
                  " (is the file cut short?)");
    }
    const auto bytes = tensor_bytes(tensor.type, tensor.shape);
    if (!bytes) return text(subject(tensor), ": ", bytes.error().what());
    if (*bytes != tensor.end - tensor.begin) {
      return text(subject(tensor), ": expected ", *bytes, " bytes for ", io::name(tensor.type), " of shape ",
                  shape_text(tensor.shape), ", found ", tensor.end - tensor.begin, " in ", offsets());
    }
  }

  std::stable_sort(tensors.begin(), tensors.end(), [](const safetensors_entry& a, const safetensors_entry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  std::size_t covered = 0;
  for (const safetensors_entry& tensor : tensors) {
    if (tensor.begin != covered) {
      return text(subject(tensor), ": expected it to begin at byte ", covered, " of the data, where the one before it ",
                  "ends; found byte ", tensor.begin, tensor.begin < covered ? ", an overlap" : ", a hole");
    }
    covered = tensor.end;
  }
  if (covered != data_bytes) {
    return text("expected the tensors to cover the ", data_bytes, " bytes of data, found that they end at byte ",
                covered);
  }
  return {};
}

/// How many bytes a file's header has, from the 8 bytes before it; `path` is for messages only.
inline result<std::size_t> safetensors_header_bytes(std::span<const std::uint8_t> begin, std::uint64_t file_bytes,
                                                    std::string_view path) {
  const auto malformed = [&](const auto&... what) { return error(errc::malformed_file, {path, ": ", what...}); };
  if (file_bytes < safetensors_prefix) {
    return malformed("expected at least the 8 bytes of a header length, found a file of ", file_bytes, " bytes");
  }
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < safetensors_prefix; ++i) length |= std::uint64_t{begin[i]} << (8 * i);
  if (length > safetensors_header_limit) {
    return malformed("expected a header of at most ", safetensors_header_limit, " bytes, found a header length of ",
                     length, " (is it a safetensors file?)");
  }
  if (length > file_bytes - safetensors_prefix) {
    return malformed("expected a header of ", length, " bytes after the header length, found only ",
                     file_bytes - safetensors_prefix, " (is the file cut short?)");
  }
  return length;
}

/// Reads and checks the header of a safetensors file of `file_bytes`, of which `file` holds at least the header; `path`
/// is for messages only.
inline result<safetensors_header> parse_safetensors(std::span<const std::uint8_t> file, std::uint64_t file_bytes,
                                                    std::string_view path) {
  const auto malformed = [&](const auto&... what) { return error(errc::malformed_file, {path, ": ", what...}); };
  const auto length = safetensors_header_bytes(file, file_bytes, path);
  if (!length) return length.error();
  const std::string_view json(reinterpret_cast<const char*>(file.data()) + safetensors_prefix, *length);
  if (json.empty() || json.front() != '{') {
    return malformed("the header: expected a JSON object that begins with '{', found ",
                     json.empty() ? std::string("no bytes") : printable(json, 8));
  }
  if (const auto position = invalid_utf8(json)) {
    return malformed("the header: expected UTF-8, found an invalid sequence at byte ", *position);
  }
  // The JSON parser takes a zero byte for the end of its input.
  if (const auto position = json.find('\0'); position != std::string_view::npos) {
    return malformed("the header: expected JSON, found a zero byte at byte ", position);
  }

  safetensors_events events;
  if (!follow_json(json, events)) return malformed(events.problem);
  const std::size_t data_begin = safetensors_prefix + json.size();
  const std::string problem = check_safetensors_entries(events.tensors, file_bytes - data_begin);
  if (!problem.empty()) return malformed(problem);
  return safetensors_header{std::move(events.tensors), std::move(events.metadata), data_begin};
}

/// A text as a JSON string. Pre: valid UTF-8.
inline std::string json_string(std::string_view raw) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : raw) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20) {
      out += "\\u00";
      out += digits[byte / 16];
      out += digits[byte % 16];
    } else {
      out += c;
    }
  }
  return out += '"';
}

/// The length and the text of a header, padded with spaces so that the data begins at a multiple of 8 bytes.
inline std::string write_safetensors_header(std::span<const safetensors_entry> tensors,
                                            const io::safetensors_metadata& metadata) {
  std::string json = "{";
  if (!metadata.empty()) {
    json += text(json_string(safetensors_metadata_key), ":{");
    for (const auto& [key, value] : metadata) {
      json += text(json.back() == '{' ? "" : ",", json_string(key), ':', json_string(value));
    }
    json += '}';
  }
  for (const safetensors_entry& tensor : tensors) {
    json += text(json.size() == 1 ? "" : ",", json_string(tensor.name), ":{\"dtype\":\"", io::name(tensor.type),
                 "\",\"shape\":[");
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) json += text(i == 0 ? "" : ",", tensor.shape[i]);
    json += text("],\"data_offsets\":[", tensor.begin, ',', tensor.end, "]}");
  }
  json += '}';
  json.append((8 - json.size() % 8) % 8, ' ');
  std::string out(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) {
    out[i] = static_cast<char>(static_cast<unsigned char>(std::uint64_t{json.size()} >> (8 * i)));
  }
  return out += json;
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail
