#pragma once

/// Reading recorded routing from files. Opt-in: needs nlohmann-json, and a POSIX system for safetensors.

#include "../error.hpp"              // tetromino::result, tetromino::error
#include "../io/safetensors.hpp"     // io::safetensors_file
#include "detail/trace_builder.hpp"  // detail::trace_builder
#include "trace.hpp"                 // trace

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>     // std::max_element
#include <charconv>      // std::from_chars
#include <cstddef>       // std::size_t
#include <cstdint>       // std::int64_t, std::uint64_t
#include <filesystem>    // std::filesystem::path
#include <fstream>       // std::ifstream
#include <istream>       // std::istream
#include <optional>      // std::optional
#include <string>        // std::string, std::getline
#include <string_view>   // std::string_view
#include <system_error>  // std::errc
#include <utility>       // std::move
#include <vector>        // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What a file does not say about itself.
struct trace_read_options {
  std::size_t experts = 0;  ///< experts per layer; 0: as the file says, else the largest id + 1
};

namespace detail {

// An integer tensor of any width, as 64-bit numbers.
[[nodiscard]] inline result<std::vector<std::int64_t>> read_integers(const io::safetensors_file& file,
                                                                     std::string_view name, std::size_t expected) {
  const auto tensor = file.try_get(name);
  if (!tensor) return tensor.error();
  const io::safetensors_tensor& t = **tensor;
  if (t.shape().size() != 1 || t.elements() != expected) {
    return error(errc::shape_mismatch, text(file.path(), ": tensor ", name, ": expected [", expected, "], got ",
                                            t.shape().size(), " dimensions and ", t.elements(), " elements"));
  }
  std::vector<std::int64_t> out;
  const auto read = [&]<class T>(T) {
    const auto values = t.try_copy_as<T>();
    if (!values) return false;
    out.assign(values->begin(), values->end());
    return true;
  };
  if (read(std::uint8_t{}) || read(std::int8_t{}) || read(std::uint16_t{}) || read(std::int16_t{}) ||
      read(std::uint32_t{}) || read(std::int32_t{}) || read(std::int64_t{})) {
    return out;
  }
  return error(errc::malformed_file,
               text(file.path(), ": tensor ", name, ": expected integers of at most 64 bits with sign, found ",
                    io::name(t.dtype())));
}

// Metadata value as a number; 0 if there is none.
[[nodiscard]] inline std::size_t metadata_number(const io::safetensors_file& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) return 0;
  const std::string& digits = found->second;
  std::size_t value = 0;
  const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return code == std::errc() && end == digits.data() + digits.size() ? value : 0;
}

[[nodiscard]] inline std::vector<std::string> split_names(std::string_view names) {
  std::vector<std::string> out;
  for (;;) {
    const std::size_t comma = names.find(',');
    out.emplace_back(names.substr(0, comma));
    if (comma == std::string_view::npos) return out;
    names.remove_prefix(comma + 1);
  }
}

}  // namespace detail

/// Reads a trace from a safetensors file: `experts` U8, U16, I16 or I32 [tokens, layers, experts per token], best
/// first; `request_offsets` [requests + 1], ascending from 0 to tokens; `prefill_length` [requests] and `domain`
/// [requests] if there are such tensors, else 0. Metadata `num_experts` and `domains` (names, separated by commas) are
/// used where present. Errors: files that break this, ids out of range.
[[nodiscard]] inline result<trace> try_read_trace_safetensors(const std::filesystem::path& path,
                                                              const trace_read_options& options = {}) {
  const auto file = io::safetensors_file::try_open(path);
  if (!file) return file.error();
  const auto experts = file->try_get("experts");
  if (!experts) return experts.error();
  const io::safetensors_tensor& ids_tensor = **experts;
  if (ids_tensor.shape().size() != 3) {
    return error(errc::shape_mismatch,
                 detail::text(file->path(), ": tensor experts: expected [tokens, layers, experts per token], got ",
                              ids_tensor.shape().size(), " dimensions"));
  }
  std::vector<std::uint16_t> ids;
  std::optional<std::int64_t> outside;
  const auto read = [&]<class T>(T) {
    const auto values = ids_tensor.try_copy_as<T>();
    if (!values) return false;
    ids.reserve(values->size());
    for (const T v : *values) {
      if (v < 0 || std::int64_t{v} > 0xFFFE) outside = v;
      ids.push_back(static_cast<std::uint16_t>(v));
    }
    return true;
  };
  if (!read(std::uint8_t{}) && !read(std::uint16_t{}) && !read(std::int16_t{}) && !read(std::int32_t{})) {
    return error(errc::malformed_file,
                 detail::text(file->path(), ": tensor experts: expected U8, U16, I16 or I32, found ",
                              io::name(ids_tensor.dtype())));
  }
  if (outside) {
    return error(errc::malformed_file,
                 detail::text(file->path(), ": tensor experts: expected ids from 0 to 65534, got ", *outside));
  }
  routing_shape shape{ids_tensor.shape()[1], options.experts, ids_tensor.shape()[2]};
  if (shape.experts == 0) shape.experts = detail::metadata_number(*file, "num_experts");
  if (shape.experts == 0 && !ids.empty()) shape.experts = *std::max_element(ids.begin(), ids.end()) + std::size_t{1};

  const auto offsets_tensor = file->try_get("request_offsets");
  if (!offsets_tensor) return offsets_tensor.error();
  const std::size_t bounds = (**offsets_tensor).elements();
  const std::size_t count = bounds == 0 ? 0 : bounds - 1;
  const auto offsets = detail::read_integers(*file, "request_offsets", bounds);
  if (!offsets) return offsets.error();
  const auto tokens = static_cast<std::int64_t>(ids_tensor.shape()[0]);
  if (bounds == 0 || offsets->front() != 0 || offsets->back() != tokens) {
    return error(errc::malformed_file,
                 detail::text(file->path(), ": tensor request_offsets: expected offsets from 0 to ", tokens));
  }
  std::vector<request> requests(count);
  for (std::size_t r = 0; r < count; ++r) {
    const std::int64_t first = (*offsets)[r], last = (*offsets)[r + 1];
    if (first < 0 || last < first || last - first > 0xFFFF'FFFF) {
      return error(errc::malformed_file, detail::text(file->path(),
                                                      ": tensor request_offsets: expected ascending "
                                                      "offsets, got ",
                                                      first, " and ", last, " for request ", r));
    }
    requests[r].first_token = static_cast<std::uint64_t>(first);
    requests[r].tokens = static_cast<std::uint32_t>(last - first);
  }
  if (file->find("prefill_length") != nullptr) {
    const auto lengths = detail::read_integers(*file, "prefill_length", count);
    if (!lengths) return lengths.error();
    for (std::size_t r = 0; r < count; ++r) {
      if ((*lengths)[r] < 0 || (*lengths)[r] > requests[r].tokens) {
        return error(errc::malformed_file,
                     detail::text(file->path(), ": tensor prefill_length: expected 0 to ", requests[r].tokens, ", got ",
                                  (*lengths)[r], " for request ", r));
      }
      requests[r].prefill_length = static_cast<std::uint32_t>((*lengths)[r]);
    }
  }
  std::vector<std::string> names;
  if (file->find("domain") != nullptr) {
    const auto domains = detail::read_integers(*file, "domain", count);
    if (!domains) return domains.error();
    const auto listed = file->metadata().find("domains");
    if (listed != file->metadata().end()) names = detail::split_names(listed->second);
    for (std::size_t r = 0; r < count; ++r) {
      const std::int64_t most = names.empty() ? 0xFFFF : static_cast<std::int64_t>(names.size()) - 1;
      if ((*domains)[r] < 0 || (*domains)[r] > most) {
        return error(errc::malformed_file, detail::text(file->path(), ": tensor domain: expected 0 to ", most, ", got ",
                                                        (*domains)[r], " for request ", r));
      }
      requests[r].domain = static_cast<std::uint32_t>((*domains)[r]);
    }
  }
  auto made = trace::try_make(shape, std::move(ids), std::move(requests), std::move(names));
  if (!made) return error(made.error().code(), detail::text(file->path(), ": ", made.error().what()));
  return made;
}
[[nodiscard]] inline trace read_trace_safetensors(const std::filesystem::path& path,
                                                  const trace_read_options& options = {}) {
  return try_read_trace_safetensors(path, options).value();
}

namespace detail {

// One JSON object of a routing log into `out`; says what is wrong, or nothing.
[[nodiscard]] inline std::string read_routing_line(const std::string& line, routing_record& out) {
  const nlohmann::json j = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (j.is_discarded()) return "expected a JSON object, got something that is not JSON";
  if (!j.is_object()) return text("expected a JSON object, got ", j.type_name());

  const auto number = [&](const char* key, std::uint64_t most, std::uint64_t& value) -> std::string {
    const auto found = j.find(key);
    if (found == j.end()) return text("expected the key ", key);
    const auto* n = found->get_ptr<const nlohmann::json::number_unsigned_t*>();
    if (n == nullptr || *n > most) return text("expected ", key, " to be a whole number from 0 to ", most);
    value = *n;
    return {};
  };
  const auto id = j.find("req_id");
  if (id == j.end()) return "expected the key req_id";
  if (id->is_string()) {
    out.request_name = *id->get_ptr<const std::string*>();
  } else if (id->is_number_integer()) {
    out.request_name = id->dump();
  } else {
    return text("expected req_id to be a string or a whole number, got ", id->type_name());
  }
  if (std::string bad = number("token_idx", routing_record::largest_token, out.token); !bad.empty()) return bad;
  if (std::string bad = number("layer", routing_record::largest_layer, out.layer); !bad.empty()) return bad;

  const auto ids = j.find("topk_ids");
  if (ids == j.end()) return "expected the key topk_ids";
  if (!ids->is_array() || ids->empty()) return "expected topk_ids to be a list of expert ids";
  out.ids.clear();
  for (const nlohmann::json& e : *ids) {
    const auto* n = e.get_ptr<const nlohmann::json::number_unsigned_t*>();
    if (n == nullptr || *n >= 0xFFFF) return "expected topk_ids to hold whole numbers from 0 to 65534";
    out.ids.push_back(static_cast<std::uint16_t>(*n));
  }
  out.in_prefill.reset();
  if (const auto found = j.find("phase"); found != j.end()) {
    const auto* word = found->get_ptr<const std::string*>();
    if (word == nullptr || (*word != "prefill" && *word != "decode")) {
      return "expected phase to be \"prefill\" or \"decode\"";
    }
    out.in_prefill = *word == "prefill";
  }
  if (j.contains("prefill_length")) {
    std::uint64_t length = 0;
    if (std::string bad = number("prefill_length", routing_record::largest_token, length); !bad.empty()) return bad;
    out.in_prefill = out.token < length;
  }
  out.domain.reset();
  if (const auto found = j.find("domain"); found != j.end()) {
    const auto* word = found->get_ptr<const std::string*>();
    if (word == nullptr) return text("expected domain to be a string, got ", found->type_name());
    out.domain = *word;
  }
  return {};
}

}  // namespace detail

/// Reads a trace from a log of JSON lines, one per token and layer:
/// `{"req_id": "a", "token_idx": 0, "layer": 3, "topk_ids": [17, 4]}`, in any order. Optional keys: `phase` ("prefill"
/// or "decode") or `prefill_length` (tokens with a smaller token_idx are prefill); else all tokens count as decode;
/// `domain`, a name. Other keys and empty lines are ignored. Each request needs consecutive token_idx (from any
/// start: a cached prefix is not routed) and, for each token, the same layers as all others; layers are renumbered from
/// 0 in ascending order. Requests keep the order in which they first appear. Errors name the line.
[[nodiscard]] inline result<trace> try_read_trace_json_lines(std::istream& in, const std::string& name,
                                                             const trace_read_options& options = {}) {
  detail::trace_builder builder;
  detail::routing_record record;
  std::string line;
  std::uint64_t number = 0;
  while (std::getline(in, line)) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    std::string bad = detail::read_routing_line(line, record);
    if (bad.empty()) bad = builder.add(record, number);
    if (!bad.empty()) return error(errc::malformed_file, detail::text(name, ", line ", number, ": ", bad));
  }
  if (in.bad()) return error(errc::io, detail::text(name, ": expected to read on after line ", number));
  auto made = builder.finish(options.experts);
  if (!made) return error(made.error().code(), detail::text(name, made.error().what()));
  return made;
}
[[nodiscard]] inline trace read_trace_json_lines(std::istream& in, const std::string& name,
                                                 const trace_read_options& options = {}) {
  return try_read_trace_json_lines(in, name, options).value();
}

/// Reads a trace from a file: safetensors if it is called so, JSON lines otherwise.
[[nodiscard]] inline result<trace> try_read_trace(const std::filesystem::path& path,
                                                  const trace_read_options& options = {}) {
  if (path.extension() == ".safetensors") return try_read_trace_safetensors(path, options);
  std::ifstream in(path, std::ios::binary);
  if (!in) return error(errc::io, detail::text(path.string(), ": expected a file that can be read"));
  return try_read_trace_json_lines(in, path.string(), options);
}
[[nodiscard]] inline trace read_trace(const std::filesystem::path& path, const trace_read_options& options = {}) {
  return try_read_trace(path, options).value();
}

}  // namespace tetromino::moe
