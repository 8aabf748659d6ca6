#pragma once

#include "../../detail/macros_off.hpp"

#include "../trace.hpp"        // trace
#include "request_arrays.hpp"  // drop_layers_of_nobody, largest_id

#include <algorithm>      // std::adjacent_find, std::any_of, std::is_sorted, std::lower_bound, std::max, std::sort
#include <cstddef>        // std::size_t
#include <cstdint>        // std::uint16_t, std::uint32_t, std::uint64_t
#include <optional>       // std::optional
#include <string>         // std::string
#include <tuple>          // std::tuple
#include <unordered_map>  // std::unordered_map
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// One line of a routing log: the experts of one token in one layer, no_expert where nobody serves.
struct routing_record {
  static constexpr std::uint64_t largest_token = 0xFFFF'FFFE;
  static constexpr std::uint64_t largest_layer = 0xFFFF;

  std::string request_name;
  std::uint64_t token = 0;
  std::uint64_t layer = 0;
  std::vector<std::uint16_t> ids;
  std::optional<bool> in_prefill;
  std::optional<std::string> domain;
};

/// Puts the lines of a routing log, in any order, together to a trace. Memory grows with the lines, not with the
/// numbers they name.
class trace_builder {
 public:
  /// Takes a record from line `line`; says what is wrong with it, or nothing.
  [[nodiscard]] std::string add(const routing_record& record, std::uint64_t line) {
    if (entries_.empty()) experts_per_token_ = record.ids.size();
    if (record.ids.size() != experts_per_token_) {
      return text("expected ", experts_per_token_, " experts per token as on the lines before, got ",
                  record.ids.size());
    }
    const auto [found, is_new] =
        number_of_request_.try_emplace(record.request_name, static_cast<std::uint32_t>(requests_.size()));
    if (is_new) requests_.push_back({record.request_name, {}});
    open_request& r = requests_[found->second];
    if (record.domain) {
      if (r.domain && *r.domain != *record.domain) {
        return text("expected domain ", shown(*r.domain), " as before for this request, got ", shown(*record.domain));
      }
      r.domain = record.domain;
    }
    const std::uint64_t token = token_in_request(found->second, record);
    if (token > routing_record::largest_token) return text("expected fewer than 2^32 tokens in a request");
    entry e{found->second,
            static_cast<std::uint32_t>(token),
            static_cast<std::uint16_t>(record.layer),
            static_cast<std::uint8_t>(record.in_prefill ? (*record.in_prefill ? 1 : 0) : unknown),
            ids_.size(),
            line};
    entries_.push_back(e);
    ids_.insert(ids_.end(), record.ids.begin(), record.ids.end());
    return {};
  }

  /// The trace of all lines, and the numbers that they give its layers. `experts` 0: the largest id + 1. Error texts
  /// begin with what follows the file's name.
  [[nodiscard]] result<trace> finish(std::size_t experts, std::vector<std::uint32_t>& numbers) {
    if (entries_.empty()) return error(errc::malformed_file, ": expected at least one line of routing, got none");
    const auto key = [](const entry& e) { return std::tuple(e.request, e.token, e.layer, e.line); };
    const auto before = [&](const entry& a, const entry& b) { return key(a) < key(b); };
    if (!std::is_sorted(entries_.begin(), entries_.end(), before)) std::sort(entries_.begin(), entries_.end(), before);

    std::vector<std::uint16_t> layers;
    for (const entry& e : entries_) {
      // most logs repeat the same few layers: look before growing
      const auto at = std::lower_bound(layers.begin(), layers.end(), e.layer);
      if (at == layers.end() || *at != e.layer) layers.insert(at, e.layer);
    }

    std::vector<std::uint16_t> ids;
    ids.reserve(ids_.size());
    std::vector<request> requests(requests_.size());
    std::uint64_t tokens = 0;
    for (std::size_t i = 0; i < entries_.size();) {
      const entry& first = entries_[i];
      request& r = requests[first.request];
      const bool is_new = i == 0 || entries_[i - 1].request != first.request;
      if (is_new) r.first_token = tokens;
      if (!is_new && first.token != entries_[i - 1].token + 1) {
        return at_line(first, text("expected token_idx ", entries_[i - 1].token + 1, " of request ", name_of(first),
                                   ", got ", first.token));
      }
      for (std::size_t l = 0; l < layers.size(); ++l, ++i) {
        if (i == entries_.size() || entries_[i].request != first.request || entries_[i].token != first.token ||
            entries_[i].layer > layers[l]) {
          return at_line(first, text("expected routing of token ", first.token, " of request ", name_of(first),
                                     " in layer ", layers[l], ", found none"));
        }
        if (entries_[i].layer < layers[l]) {
          return at_line(entries_[i], text("expected token ", first.token, " of request ", name_of(first),
                                           " once in layer ", entries_[i].layer, ", got it again"));
        }
        const auto begin = ids_.begin() + static_cast<std::ptrdiff_t>(entries_[i].first_id);
        ids.insert(ids.end(), begin, begin + static_cast<std::ptrdiff_t>(experts_per_token_));
      }
      if (i < entries_.size() && entries_[i].request == first.request && entries_[i].token == first.token) {
        return at_line(entries_[i], text("expected token ", first.token, " of request ", name_of(first),
                                         " once in layer ", entries_[i].layer, ", got it again"));
      }
      const bool prefill = first.in_prefill == 1;
      if (prefill && r.prefill_length != r.tokens) {
        return at_line(
            first, text("expected no prefill after decode in request ", name_of(first), ", got token ", first.token));
      }
      r.prefill_length += prefill ? 1U : 0U;
      ++r.tokens;
      ++tokens;
    }

    routing_shape shape{layers.size(), experts != 0 ? experts : largest_id(ids_) + 1, experts_per_token_};
    if (auto bad = check_ids(shape)) return *bad;
    numbers.assign(layers.begin(), layers.end());
    drop_layers_of_nobody(shape, ids, numbers);
    std::vector<std::string> names = name_domains(requests);
    return trace::try_make(shape, std::move(ids), std::move(requests), std::move(names));
  }

 private:
  static constexpr std::uint8_t unknown = 2;

  struct entry {
    std::uint32_t request;
    std::uint32_t token;
    std::uint16_t layer;
    std::uint8_t in_prefill;
    std::size_t first_id;
    std::uint64_t line;
  };
  struct pass {
    std::uint64_t first;        // token_idx with which each pass begins
    std::uint64_t begin, last;  // tokens of the request: where this pass began, the last one so far
  };
  struct open_request {
    std::string name;
    std::optional<std::string> domain;
  };

  // For messages: short, and without characters that would act on a terminal.
  [[nodiscard]] static std::string shown(const std::string& name) {
    std::string out = text('"', name.substr(0, 60), name.size() > 60 ? "…" : "", '"');
    for (char& c : out) {
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
    }
    return out;
  }
  [[nodiscard]] std::string name_of(const entry& e) const { return shown(requests_[e.request].name); }

  static error at_line(const entry& e, const std::string& what) {
    return error(errc::malformed_file, {", line ", e.line, ": ", what});
  }

  // Loggers that sit in a layer count the tokens of each forward pass from the same number again: where the first
  // token_idx of a request and layer comes once more, the next pass begins.
  [[nodiscard]] std::uint64_t token_in_request(std::uint32_t request, const routing_record& record) {
    const auto [found, is_new] = passes_.try_emplace(std::uint64_t{request} << 16 | record.layer,
                                                     pass{record.token, record.token, record.token});
    pass& p = found->second;
    if (!is_new && record.token == p.first) p.begin = p.last + 1;
    const std::uint64_t token = p.begin + record.token - p.first;
    p.last = std::max(p.last, token);
    return token;
  }

  [[nodiscard]] std::optional<error> check_ids(const routing_shape& shape) const {
    std::vector<std::uint16_t> sorted;
    for (const entry& e : entries_) {
      const auto begin = ids_.begin() + static_cast<std::ptrdiff_t>(e.first_id);
      sorted.assign(begin, begin + static_cast<std::ptrdiff_t>(experts_per_token_));
      std::sort(sorted.begin(), sorted.end());
      while (!sorted.empty() && sorted.back() == no_expert) sorted.pop_back();
      if (sorted.empty()) continue;
      if (sorted.back() >= shape.experts) {
        return at_line(e, text("expected expert ids below ", shape.experts, ", got ", sorted.back()));
      }
      if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
        return at_line(
            e, text("expected distinct experts, got ", *std::adjacent_find(sorted.begin(), sorted.end()), " twice"));
      }
    }
    return std::nullopt;
  }

  // Numbers the domains in order of first appearance; none at all if no line names one.
  [[nodiscard]] std::vector<std::string> name_domains(std::vector<request>& requests) const {
    std::vector<std::string> names;
    std::unordered_map<std::string, std::uint32_t> number_of_domain;
    const bool any =
        std::any_of(requests_.begin(), requests_.end(), [](const auto& r) { return r.domain.has_value(); });
    for (std::size_t r = 0; any && r < requests.size(); ++r) {
      const std::string name = requests_[r].domain.value_or("unnamed");
      const auto [found, is_new] = number_of_domain.try_emplace(name, static_cast<std::uint32_t>(names.size()));
      if (is_new) names.push_back(name);
      requests[r].domain = found->second;
    }
    return names;
  }

  std::size_t experts_per_token_ = 0;
  std::vector<entry> entries_;
  std::vector<std::uint16_t> ids_;  // [entries, experts per token]
  std::unordered_map<std::string, std::uint32_t> number_of_request_;
  std::vector<open_request> requests_;
  std::unordered_map<std::uint64_t, pass> passes_;  // by request and layer
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
