#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"     // result, error
#include "../loads.hpp"        // load_table
#include "../trace.hpp"        // trace
#include "base64.hpp"          // from_base64
#include "counts.hpp"          // count_table, add_counts
#include "json.hpp"            // parse_json, whole_number
#include "npy.hpp"             // try_read_npy
#include "request_arrays.hpp"  // request_arrays
#include "trace_builder.hpp"   // trace_builder, routing_record

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint16_t, std::uint64_t
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <variant>      // std::variant
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// What the lines of a log hold.
enum class line_kind : std::uint8_t {
  unknown,
  records,  ///< one token in one layer each
  vllm,     ///< a completion each, with routed_experts in base64 of an .npy
  sglang,   ///< a response each, with routed_experts in base64 of int32
  counts,   ///< a forward pass each, with logical_count
};

[[nodiscard]] inline std::string_view name_of(line_kind kind) {
  constexpr std::string_view names[] = {"nothing known", "JSON lines of token and layer", "vLLM routed_experts",
                                        "SGLang routed_experts", "JSON lines of logical_count"};
  return names[static_cast<std::size_t>(kind)];
}

/// One JSON object of a routing log into `out`; says what is wrong, or nothing.
[[nodiscard]] inline std::string read_record(const nlohmann::json& j, routing_record& out) {
  const auto number = [&](const char* key, std::uint64_t most, std::uint64_t& value) -> std::string {
    const auto found = j.find(key);
    if (found == j.end()) return text("expected the key ", key);
    return whole_number(*found, most, value) ? "" : text("expected ", key, " to be a whole number from 0 to ", most);
  };
  const auto id = j.find("req_id");
  if (id == j.end()) return "expected the key req_id";
  if (!id->is_string() && !id->is_number_integer()) {
    return text("expected req_id to be a string or a whole number, got ", id->type_name());
  }
  out.request_name = id->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);  // 1 is not "1"
  if (std::string bad = number("token_idx", routing_record::largest_token, out.token); !bad.empty()) return bad;
  if (std::string bad = number("layer", routing_record::largest_layer, out.layer); !bad.empty()) return bad;

  const auto ids = j.find("topk_ids");
  if (ids == j.end()) return "expected the key topk_ids";
  if (!ids->is_array() || ids->empty()) return "expected topk_ids to be a list of expert ids";
  out.ids.clear();
  for (const nlohmann::json& e : *ids) {
    std::uint64_t n = no_expert;
    const bool nobody = e.is_number_integer() && !e.is_number_unsigned() && e.get<std::int64_t>() == -1;
    if (!nobody && !whole_number(e, no_expert - 1, n)) {
      return "expected topk_ids to hold whole numbers from 0 to 65534, or -1 for nobody";
    }
    out.ids.push_back(static_cast<std::uint16_t>(n));
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

/// What nobody but the user can know about a file.
struct shape_hints {
  std::size_t layers = 0, experts = 0, experts_per_token = 0;  ///< 0: as the file says
};

/// A log of JSON lines, taken up line by line. Lines without routing before the first one with it (meta lines) are
/// passed over; later, and for other kinds of lines, they are errors, except objects whose `type` is "meta".
class routing_lines {
 public:
  explicit routing_lines(const shape_hints& hints) : hints_(hints) {}

  /// Takes the next line; says what is wrong with it, or nothing.
  [[nodiscard]] std::string add(std::string_view line) {
    ++number_;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) return {};
    json_document<nlohmann::json> document;
    nlohmann::json& j = *document;
    if (std::string bad = parse_json(line, j); !bad.empty()) return bad;
    if (!j.is_object()) return text("expected a JSON object, got ", j.type_name());
    const line_kind kind = kind_of(j);
    const auto type = j.find("type");
    const bool meta = type != j.end() && *type == "meta";
    if (meta || (kind == line_kind::unknown && kind_ == line_kind::unknown && number_ <= most_meta_lines)) {
      take_meta(j);
      return {};
    }
    if (kind_ == line_kind::unknown) kind_ = kind;
    if (kind_ == line_kind::records) {  // a broken record is told what it lacks
      if (std::string bad = read_record(j, record_); !bad.empty()) return bad;
      return builder_.add(record_, number_);
    }
    if (kind != kind_) return text("expected ", name_of(kind_), " as before, got ", name_of(kind));
    switch (kind) {
      case line_kind::vllm:
        return add_vllm(j);
      case line_kind::sglang:
        return add_sglang(j);
      case line_kind::counts:
        return add_counts(j["logical_count"], counts_);
      default:
        return "expected routing: topk_ids of a token and layer, routed_experts of a completion, or the logical_count "
               "of a pass";
    }
  }

  [[nodiscard]] line_kind kind() const noexcept { return kind_; }
  [[nodiscard]] std::uint64_t line() const noexcept { return number_; }

  /// All that the lines hold, and the numbers of its layers. Error texts begin with what follows the file's name.
  [[nodiscard]] result<std::variant<trace, load_table>> finish(std::vector<std::uint32_t>& layers) {
    using content = std::variant<trace, load_table>;
    if (kind_ == line_kind::counts) {
      auto loads = counts_.finish(hints_.experts, layers);
      if (!loads) return error(loads.error().code(), {": ", loads.error().what()});
      return content(std::move(*loads));
    }
    const std::size_t experts = hints_.experts != 0 ? hints_.experts : experts_in_meta_;
    if (kind_ == line_kind::records || kind_ == line_kind::unknown) {
      auto made = builder_.finish(experts, layers);
      if (!made) return made.error();
      return content(std::move(*made));
    }
    auto made = arrays_.finish(experts, layers);
    if (!made) return error(made.error().code(), {": ", made.error().what()});
    return content(std::move(*made));
  }

 private:
  static constexpr std::uint64_t most_meta_lines = 100;

  [[nodiscard]] static line_kind kind_of(const nlohmann::json& j) {
    if (j.contains("topk_ids") || j.contains("token_idx")) return line_kind::records;
    if (j.contains("choices") || j.contains("routed_experts")) return line_kind::vllm;
    if (j.contains("meta_info")) return line_kind::sglang;
    if (j.contains("logical_count")) return line_kind::counts;
    return line_kind::unknown;
  }
  void take_meta(const nlohmann::json& j) {
    std::uint64_t n = 0;
    const auto found = j.find("num_experts");
    if (found != j.end() && whole_number(*found, 65'535, n)) experts_in_meta_ = n;
  }

  /// prompt_tokens of an object, or 0.
  [[nodiscard]] static std::uint64_t prompt_tokens(const nlohmann::json& j) {
    std::uint64_t n = 0;
    const auto found = j.find("prompt_tokens");
    return found != j.end() && whole_number(*found, 0xFFFF'FFFF, n) ? n : 0;
  }
  [[nodiscard]] static std::string read_base64(const nlohmann::json& j, std::vector<std::uint8_t>& out) {
    const auto found = j.find("routed_experts");
    const auto* written = found == j.end() ? nullptr : found->get_ptr<const std::string*>();
    if (written == nullptr) return "expected routed_experts, a string";
    auto bytes = from_base64(*written);
    if (!bytes) return "expected routed_experts in base64";
    out = std::move(*bytes);
    return {};
  }

  [[nodiscard]] std::string add_vllm(const nlohmann::json& j) {
    const auto usage = j.find("usage");
    const std::uint64_t prompt = usage != j.end() && usage->is_object() ? prompt_tokens(*usage) : prompt_tokens(j);
    const auto choices = j.find("choices");
    if (choices == j.end()) return add_completion(j, prompt);
    if (!choices->is_array()) return "expected choices, a list";
    for (const nlohmann::json& choice : *choices) {
      if (!choice.is_object()) return "expected choices, a list of objects";
      if (std::string bad = add_completion(choice, prompt); !bad.empty()) return bad;
    }
    return {};
  }
  [[nodiscard]] std::string add_completion(const nlohmann::json& j, std::uint64_t prompt) {
    std::vector<std::uint8_t> bytes;
    if (std::string bad = read_base64(j, bytes); !bad.empty()) return bad;
    const auto array = try_read_npy(bytes, "routed_experts");
    return array ? arrays_.add(*array, prompt) : array.error().what();
  }

  [[nodiscard]] std::string add_sglang(const nlohmann::json& j) {
    const nlohmann::json& meta = j["meta_info"];
    if (!meta.is_object()) return "expected meta_info, an object";
    if (hints_.layers == 0 || hints_.experts_per_token == 0) {
      return "expected to be told how many layers and experts per token there are: SGLang's routed_experts are bare "
             "ids";
    }
    std::vector<std::uint8_t> bytes;
    if (std::string bad = read_base64(meta, bytes); !bad.empty()) return bad;
    const std::size_t of_token = 4 * hints_.layers * hints_.experts_per_token;
    if (bytes.size() % of_token != 0) {
      return text("expected a multiple of ", hints_.layers, " × ", hints_.experts_per_token, " ids, got ",
                  bytes.size() / 4);
    }
    return arrays_.add({number_type::i32, {bytes.size() / of_token, hints_.layers, hints_.experts_per_token}, bytes},
                       prompt_tokens(meta));
  }

  shape_hints hints_;
  std::uint64_t number_ = 0;
  std::size_t experts_in_meta_ = 0;
  line_kind kind_ = line_kind::unknown;
  routing_record record_;
  trace_builder builder_;
  request_arrays arrays_;
  count_table counts_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
