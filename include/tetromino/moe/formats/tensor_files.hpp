#pragma once

#include "../../detail/macros_off.hpp"

/// Routing in safetensors files: traces, and the statistics that TensorRT-LLM writes.

#include "../../error.hpp"                // result, error
#include "../../io/detail/file_text.hpp"  // printable
#include "../../io/safetensors.hpp"       // io::safetensors_file
#include "../loads.hpp"                   // load_table
#include "../trace.hpp"                   // trace
#include "counts.hpp"                     // count_table
#include "request_arrays.hpp"             // drop_layers_of_nobody, largest_id
#include "tensor_numbers.hpp"             // numbers_of

#include <charconv>      // std::from_chars
#include <cstddef>       // std::size_t
#include <cstdint>       // std::int64_t, std::uint32_t
#include <optional>      // std::optional
#include <string>        // std::string
#include <string_view>   // std::string_view
#include <system_error>  // std::errc
#include <utility>       // std::move, std::pair
#include <vector>        // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// An integer tensor [expected], as 64-bit numbers.
[[nodiscard]] inline result<std::vector<std::int64_t>> read_integers(const io::safetensors_file& file,
                                                                     std::string_view name, std::size_t expected) {
  const auto tensor = file.try_get(name);
  if (!tensor) return tensor.error();
  const io::safetensors_tensor& t = **tensor;
  if (t.shape().size() != 1 || t.elements() != expected) {
    return error(errc::shape_mismatch, {file.path(), ": tensor ", name, ": expected [", expected, "], got ",
                                        t.shape().size(), " dimensions and ", t.elements(), " elements"});
  }
  const auto numbers = numbers_of(t);
  if (!numbers || numbers->type == number_type::u64 || numbers->type >= number_type::f32) {
    return error(errc::malformed_file,
                 {file.path(), ": tensor ", name, ": expected integers of at most 64 bits with sign, found ",
                  io::name(t.dtype())});
  }
  std::vector<std::int64_t> out;
  out.reserve(expected);
  numbers->for_each([&](auto value) {
    out.push_back(static_cast<std::int64_t>(value));
    return true;
  });
  return out;
}

/// Metadata value as a number; 0 if there is none.
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

/// Where requests begin and end; one request of all tokens where the file does not say.
[[nodiscard]] inline result<std::vector<request>> read_requests(const io::safetensors_file& file, std::size_t tokens) {
  if (file.find("request_offsets") == nullptr) {
    if (tokens > 0xFFFF'FFFF) {
      return error(errc::malformed_file,
                   {file.path(), ": expected request_offsets for more than 2^32 tokens, got none"});
    }
    return std::vector<request>{{0, static_cast<std::uint32_t>(tokens), 0, 0}};
  }
  const std::size_t bounds = file["request_offsets"].elements();
  const auto offsets = read_integers(file, "request_offsets", bounds);
  if (!offsets) return offsets.error();
  if (bounds == 0 || offsets->front() != 0 || offsets->back() != static_cast<std::int64_t>(tokens)) {
    return error(errc::malformed_file, {file.path(), ": tensor request_offsets: expected offsets from 0 to ", tokens});
  }
  std::vector<request> requests(bounds - 1);
  for (std::size_t r = 0; r < requests.size(); ++r) {
    const std::int64_t first = (*offsets)[r], last = (*offsets)[r + 1];
    if (first < 0 || last < first || last - first > 0xFFFF'FFFF) {
      return error(errc::malformed_file, {file.path(), ": tensor request_offsets: expected ascending offsets, got ",
                                          first, " and ", last, " for request ", r});
    }
    requests[r].first_token = static_cast<std::uint64_t>(first);
    requests[r].tokens = static_cast<std::uint32_t>(last - first);
  }
  return requests;
}

/// Reads a number from 0 to most(r) for each request from an optional tensor.
template <class Most, class Take>
[[nodiscard]] result<void> read_of_requests(const io::safetensors_file& file, std::string_view name, std::size_t count,
                                            const Most& most, const Take& take) {
  if (file.find(name) == nullptr) return {};
  const auto values = read_integers(file, name, count);
  if (!values) return values.error();
  for (std::size_t r = 0; r < count; ++r) {
    if ((*values)[r] < 0 || (*values)[r] > most(r)) {
      return error(errc::malformed_file, {file.path(), ": tensor ", name, ": expected 0 to ", most(r), ", got ",
                                          (*values)[r], " for request ", r});
    }
    take(r, static_cast<std::uint32_t>((*values)[r]));
  }
  return {};
}

/// A trace in a file that has a tensor `experts`, and the numbers of its layers.
[[nodiscard]] inline result<trace> read_trace_tensors(const io::safetensors_file& file, std::size_t experts,
                                                      std::vector<std::uint32_t>& layers) {
  const io::safetensors_tensor& tensor = file["experts"];
  const auto bad = [&](errc code, const auto&... what) {
    return error(code, {file.path(), ": tensor experts: ", what...});
  };
  if (tensor.shape().size() != 3) {
    return bad(errc::shape_mismatch, "expected [tokens, layers, experts per token], got ", tensor.shape().size(),
               " dimensions");
  }
  const auto numbers = numbers_of(tensor);
  if (!numbers) return bad(errc::malformed_file, "expected integers, found ", io::name(tensor.dtype()));
  std::vector<std::uint16_t> ids;
  ids.reserve(numbers->size());
  if (const std::string problem = append_ids(*numbers, ids); !problem.empty()) {
    return bad(errc::malformed_file, problem);
  }
  auto requests = read_requests(file, tensor.shape()[0]);
  if (!requests) return requests.error();
  if (auto ok = read_of_requests(
          file, "prefill_length", requests->size(), [&](std::size_t r) { return std::int64_t{(*requests)[r].tokens}; },
          [&](std::size_t r, std::uint32_t n) { (*requests)[r].prefill_length = n; });
      !ok) {
    return ok.error();
  }
  std::vector<std::string> names;
  if (const auto listed = file.metadata().find("domains"); listed != file.metadata().end() && file.find("domain")) {
    names = split_names(listed->second);
  }
  const std::int64_t last_domain = names.empty() ? 0xFFFF : static_cast<std::int64_t>(names.size()) - 1;
  if (auto ok = read_of_requests(
          file, "domain", requests->size(), [&](std::size_t) { return last_domain; },
          [&](std::size_t r, std::uint32_t n) { (*requests)[r].domain = n; });
      !ok) {
    return ok.error();
  }
  routing_shape shape{tensor.shape()[1], experts, tensor.shape()[2]};
  if (shape.experts == 0) shape.experts = metadata_number(file, "num_experts");
  if (shape.experts == 0) shape.experts = largest_id(ids) + 1;
  if (!ids.empty()) {
    layers = numbers_of_layers(shape.layers);
    drop_layers_of_nobody(shape, ids, layers);
  }
  auto made = trace::try_make(shape, std::move(ids), std::move(*requests), std::move(names));
  if (!made) return error(made.error().code(), {file.path(), ": ", made.error().what()});
  return made;
}

/// `12_3` as iteration 12, layer 3; nothing if the name is none of those that TensorRT-LLM's statistics have.
[[nodiscard]] inline std::optional<std::pair<std::uint32_t, std::uint32_t>> iteration_and_layer(std::string_view name) {
  const std::size_t bar = name.find('_');
  if (bar == std::string_view::npos) return std::nullopt;
  const auto number = [](std::string_view digits) -> std::optional<std::uint32_t> {
    std::uint32_t value = 0;
    const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return code == std::errc() && end == digits.data() + digits.size() ? std::optional(value) : std::nullopt;
  };
  const auto iteration = number(name.substr(0, bar)), layer = number(name.substr(bar + 1));
  if (!iteration || !layer) return std::nullopt;
  return std::pair(*iteration, *layer);
}

/// Loads out of TensorRT-LLM's statistics: tensors `iteration_layer`, counts [experts], or ids [tokens, experts per
/// token]; summed up over iterations. `layers` are the numbers that the names give.
[[nodiscard]] inline result<load_table> read_statistics(const io::safetensors_file& file, std::size_t experts,
                                                        std::vector<std::uint32_t>& layers) {
  count_table counts;
  for (const io::safetensors_tensor& t : file) {
    const auto name = iteration_and_layer(t.name());
    if (!name) {
      return error(errc::malformed_file, {file.path(),
                                          ": expected a tensor experts (a trace), or tensors called iteration_layer "
                                          "(statistics), found ",
                                          tetromino::detail::printable(t.name(), 40)});
    }
    const std::size_t layer = name->second;
    const auto numbers = numbers_of(t);
    std::string bad = numbers && (t.shape().size() == 1 || t.shape().size() == 2)
                          ? ""
                          : "expected counts [experts] or ids [tokens, experts per token]";
    std::size_t e = 0;
    if (bad.empty()) {
      numbers->for_each([&](auto value) {
        std::uint16_t id = 0;
        if (t.shape().size() == 1) {
          bad = counts.add(layer, e++, static_cast<double>(value));
        } else if (!to_expert_id(value, id)) {
          bad = text("expected ids from 0 to 65534, or -1 for nobody, got ", value);
        } else if (id != no_expert) {
          bad = counts.add(layer, id, 1);
        }
        return bad.empty();
      });
    }
    if (!bad.empty())
      return error(errc::malformed_file,
                   {file.path(), ": tensor ", tetromino::detail::printable(t.name(), 40), ": ", bad});
  }
  auto loads = counts.finish(experts, layers);
  if (!loads) return error(loads.error().code(), {file.path(), ": ", loads.error().what()});
  return loads;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
