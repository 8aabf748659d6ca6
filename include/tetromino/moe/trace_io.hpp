#pragma once

#include "../detail/macros_off.hpp"

/// Reading recorded routing, loads and plans from files, ours and those of engines. Opt-in: needs nlohmann-json and a
/// POSIX system.

#include "../error.hpp"                 // tetromino::result, tetromino::error
#include "../io/detail/posix_file.hpp"  // detail::file_mapping
#include "../io/safetensors.hpp"        // io::safetensors_file
#include "formats/counts.hpp"           // detail::count_table, detail::add_csv, detail::add_counts
#include "formats/npy.hpp"              // detail::try_read_npy, detail::try_read_zip
#include "formats/request_arrays.hpp"   // detail::request_arrays
#include "formats/routing_lines.hpp"    // detail::routing_lines
#include "formats/tensor_files.hpp"     // detail::read_trace_tensors, detail::read_statistics
#include "loads.hpp"                    // load_table
#include "placement_io.hpp"             // try_read_plan
#include "trace.hpp"                    // trace

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <filesystem>   // std::filesystem::path
#include <istream>      // std::istream
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <variant>      // std::variant, std::get_if
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What a file does not say about itself.
struct trace_read_options {
  std::size_t experts = 0;            ///< experts per layer; 0: as the file says, else the largest id + 1
  std::size_t layers = 0;             ///< of SGLang's routed_experts, which are bare ids
  std::size_t experts_per_token = 0;  ///< likewise
};

/// What a file about routing holds: requests token by token, how often experts were used, or where experts live.
struct routing_file {
  std::string format;  ///< what it was recognised as
  std::variant<trace, load_table, placement> content;
  /// Numbers of its layers in the file, [layers of the content], ascending: those of the model where the file has the
  /// dense ones too, or gives numbers. None in plans that count the layers with experts alone, nor without tokens.
  std::vector<std::uint32_t> layers;
};

namespace detail::inline TETROMINO_ISA {

/// An error of a reader that does not know the file's name.
[[nodiscard]] inline error in_file(const std::string& name, const error& e) {
  return error(e.code(), {name, e.what()[0] == ':' || e.what()[0] == ',' ? "" : ": ", e.what()});
}

/// Takes lines up; `next(line)` is false at the end.
template <class Next>
[[nodiscard]] result<routing_file> read_lines(const Next& next, const std::string& name,
                                              const trace_read_options& options) {
  routing_lines lines({options.layers, options.experts, options.experts_per_token});
  std::string_view line;
  while (next(line)) {
    if (std::string bad = lines.add(line); !bad.empty()) {
      return error(errc::malformed_file, {name, ", line ", lines.line(), ": ", bad});
    }
  }
  std::vector<std::uint32_t> layers;
  auto content = lines.finish(layers);
  if (!content) return in_file(name, content.error());
  return std::visit(
      [&](auto& held) {
        return routing_file{std::string(name_of(lines.kind())), std::move(held), std::move(layers)};
      },
      *content);
}

[[nodiscard]] inline result<routing_file> read_json_text(std::string_view all, const std::string& name,
                                                         const trace_read_options& options) {
  // one object over several lines is a document, everything else lines
  const std::string_view first = all.substr(0, all.find('\n'));
  const bool document = first.size() == all.size() ||
                        all.find_first_not_of(" \t\r\n", first.size()) == std::string_view::npos ||
                        !nlohmann::json::accept(first);
  if (document) {
    json_document<nlohmann::json> written;
    nlohmann::json& j = *written;
    if (std::string bad = parse_json(all, j); bad.empty() && j.is_object()) {
      if (j.contains("logical_count") && !j.contains("type")) {
        count_table counts;
        if (bad = add_counts(j["logical_count"], counts); !bad.empty())
          return error(errc::malformed_file, {name, ": ", bad});
        std::vector<std::uint32_t> layers;
        auto loads = counts.finish(options.experts, layers);
        if (!loads) return in_file(name, loads.error());
        return routing_file{"logical_count (JSON)", std::move(*loads), std::move(layers)};
      }
      if (j.contains("slot_to_expert") || j.contains("physical_to_logical_map") || j.contains("layer_list")) {
        auto plan = plan_of_json(j, options.experts);
        if (!plan) return in_file(name, plan.error());
        return routing_file{std::move(plan->format), std::move(plan->experts), std::move(plan->layers)};
      }
    }
  }
  std::string_view rest = all;
  return read_lines(
      [&](std::string_view& line) {
        if (rest.empty()) return false;
        line = rest.substr(0, rest.find('\n'));
        rest.remove_prefix(std::min(rest.size(), line.size() + 1));
        return true;
      },
      name, options);
}

[[nodiscard]] inline result<routing_file> read_arrays(std::span<const std::uint8_t> bytes, const std::string& name,
                                                      const trace_read_options& options) {
  std::vector<zip_entry> files{{"", bytes}};
  const bool archive = bytes[0] == 'P';
  if (archive) {
    auto entries = try_read_zip(bytes, name);
    if (!entries) return entries.error();
    files = std::move(*entries);
  }
  request_arrays requests;
  count_table counts;
  bool has_requests = false;
  for (const zip_entry& file : files) {
    const std::string subject = archive ? text(name, ": ", tetromino::detail::printable(file.name, 40)) : name;
    if (file.name.ends_with("data.pkl")) {
      return error(errc::malformed_file,
                   {name,
                    ": expected arrays, found what torch.save writes, which can run code when it is read; "
                    "convert it where you trust it: np.save(\"x.npy\", torch.load(path)[\"logical_count\"])"});
    }
    const auto array = try_read_npy(file.bytes, subject);
    if (!array) return array.error();
    // a count per expert of each layer is what a single table can only be; 3 dimensions are ids of a request
    const bool of_request = array->shape.size() == 3 && array->type < number_type::f32;
    has_requests = has_requests || of_request;
    if (std::string bad = of_request ? requests.add(*array, 0) : add_counts(*array, counts); !bad.empty()) {
      return error(errc::malformed_file, {subject, ": ", bad});
    }
  }
  std::vector<std::uint32_t> layers;
  if (has_requests) {
    auto made = requests.finish(options.experts, layers);
    if (!made) return in_file(name, made.error());
    return routing_file{archive ? "NumPy archive of routed experts" : "NumPy array of routed experts", std::move(*made),
                        std::move(layers)};
  }
  auto loads = counts.finish(options.experts, layers);
  if (!loads) return in_file(name, loads.error());
  return routing_file{"NumPy array of counts", std::move(*loads), std::move(layers)};
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Reads a trace from a log of JSON lines, one per token and layer:
/// `{"req_id": "a", "token_idx": 0, "layer": 3, "topk_ids": [17, 4]}`, in any order, −1 for nobody. Optional keys:
/// `phase` ("prefill" or "decode") or `prefill_length` (tokens with a smaller token_idx are prefill); else all tokens
/// count as decode; `domain`, a name. Other keys, empty lines, `{"type": "meta", …}` and lines before the first with
/// routing are passed over. Each request needs consecutive token_idx (from any start: a cached prefix is not routed;
/// where the first one comes again for a layer, the next forward pass begins) and, for each token, the same layers as
/// all others; layers are renumbered from 0 in ascending order (routing_file has their numbers). Requests keep the
/// order in which they first appear. Also takes lines of vLLM or SGLang with `routed_experts`. Errors name the line; 64
/// MiB are the longest.
[[nodiscard]] inline result<trace> try_read_trace_json_lines(std::istream& in, const std::string& name,
                                                             const trace_read_options& options = {}) {
  constexpr std::size_t longest = std::size_t{64} << 20;
  std::string line;
  bool too_long = false;
  auto read = detail::read_lines(
      [&](std::string_view& next) {
        line.clear();
        for (int c = in.get(); c != std::istream::traits_type::eof() && c != '\n'; c = in.get()) {
          line += static_cast<char>(c);
          if (line.size() == longest) return !(too_long = true);
        }
        next = line;
        return !line.empty() || in.good();
      },
      name, options);
  if (too_long) return error(errc::malformed_file, {name, ": expected lines of less than ", longest, " bytes"});
  if (in.bad()) return error(errc::io, {name, ": expected to read on"});
  if (!read) return read.error();
  if (auto* t = std::get_if<trace>(&read->content)) return std::move(*t);
  return error(errc::malformed_file, {name, ": expected requests, found ", read->format});
}
[[nodiscard]] inline trace read_trace_json_lines(std::istream& in, const std::string& name,
                                                 const trace_read_options& options = {}) {
  return try_read_trace_json_lines(in, name, options).value();
}

/// Reads what recorders and engines write about routing, recognised by its contents:
///   safetensors   a trace: `experts` [tokens, layers, experts per token], integers of any width, best first, −1 for
///                 nobody; `request_offsets` [requests + 1], ascending from 0 to tokens (else all is one request);
///                 `prefill_length` and `domain` [requests] (else 0); metadata `num_experts`, `domains` (names,
///                 separated by commas). Or TensorRT-LLM's statistics: `iteration_layer` [experts], or raw ids
///   JSON lines    see read_trace_json_lines: tokens and layers, vLLM's or SGLang's routed_experts, logical_count
///   .npy, .npz    [tokens, layers, experts per token] for each request; or counts [layers, experts]
///   JSON, YAML    logical_count; plans, see read_plan
///   CSV           layer,expert,count
/// Layers in which nobody serves are left out of traces, and those without a count out of loads; the numbers of the
/// others are kept. Reading takes time in proportion to the file; beside it and
/// what is read, memory is for one line of a log, or one JSON document, of at most 2^23 values: half a gigabyte. Errors
/// name the file and what in it is wrong; pickles are refused, with a way to convert them.
[[nodiscard]] inline result<routing_file> try_read_routing(const std::filesystem::path& path,
                                                           const trace_read_options& options = {}) {
  const std::string name = path.string();
  const auto file = tetromino::detail::file_mapping::try_open(path);
  if (!file) return file.error();
  const std::span<const std::uint8_t> bytes = file->bytes();
  const std::string_view all(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (all.starts_with(detail::npy_magic) || all.starts_with(detail::zip_magic)) {
    return detail::read_arrays(bytes, name, options);
  }
  if (all.size() > 8 && all[8] == '{' && all[7] == 0) {
    const auto tensors = io::safetensors_file::try_open(path);
    if (!tensors) return tensors.error();
    std::vector<std::uint32_t> layers;
    if (tensors->find("experts") != nullptr) {
      auto made = detail::read_trace_tensors(*tensors, options.experts, layers);
      if (!made) return made.error();
      return routing_file{"trace (safetensors)", std::move(*made), std::move(layers)};
    }
    auto loads = detail::read_statistics(*tensors, options.experts, layers);
    if (!loads) return loads.error();
    return routing_file{"TensorRT-LLM statistics", std::move(*loads), std::move(layers)};
  }
  const std::size_t begin = all.find_first_not_of(" \t\r\n");
  const std::string_view written = begin == std::string_view::npos ? std::string_view() : all.substr(begin);
  if (written.starts_with('{')) return detail::read_json_text(all, name, options);
  const std::string_view head = written.substr(0, written.find('\n'));
  if (head.find(',') != std::string_view::npos && head.find("expert") != std::string_view::npos) {
    detail::count_table counts;
    if (std::string bad = detail::add_csv(all, counts); !bad.empty()) {
      return error(errc::malformed_file, {name, ": ", bad});
    }
    std::vector<std::uint32_t> layers;
    auto loads = counts.finish(options.experts, layers);
    if (!loads) return detail::in_file(name, loads.error());
    return routing_file{"CSV of counts", std::move(*loads), std::move(layers)};
  }
  if (written.starts_with("placement ") || all.find("initial_global_assignments:") != std::string_view::npos) {
    auto plan = try_read_plan(written, options.experts);
    if (!plan) return detail::in_file(name, plan.error());
    return routing_file{std::move(plan->format), std::move(plan->experts), std::move(plan->layers)};
  }
  return error(
      errc::malformed_file,
      detail::text(name,
                   ": expected routing, loads or a plan (safetensors, JSON, JSON lines, NumPy, CSV, YAML), "
                   "found ",
                   all.starts_with("\x80") ? "a Python pickle, which can run code when it is read: save arrays "
                                             "with np.save where you trust it"
                                           : "none of them"));
}
[[nodiscard]] inline routing_file read_routing(const std::filesystem::path& path,
                                               const trace_read_options& options = {}) {
  return try_read_routing(path, options).value();
}

/// Reads a trace from any of the files of read_routing that hold requests.
[[nodiscard]] inline result<trace> try_read_trace(const std::filesystem::path& path,
                                                  const trace_read_options& options = {}) {
  auto read = try_read_routing(path, options);
  if (!read) return read.error();
  if (auto* t = std::get_if<trace>(&read->content)) return std::move(*t);
  return error(errc::malformed_file,
               {path.string(), ": expected requests, found ", read->format, ", which read_routing takes"});
}
[[nodiscard]] inline trace read_trace(const std::filesystem::path& path, const trace_read_options& options = {}) {
  return try_read_trace(path, options).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
