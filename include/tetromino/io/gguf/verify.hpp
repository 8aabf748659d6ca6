#pragma once

#include "../../detail/macros_off.hpp"

/// Comparing a packed GGUF file with the one it was made from, by what llama.cpp reads. Opt-in: needs a POSIX system.

#include "pack.hpp"  // gguf_packer, gguf_planned

#include <algorithm>   // std::equal, std::min, std::ranges::equal
#include <cstddef>     // std::size_t
#include <functional>  // std::function
#include <map>         // std::map
#include <span>        // std::span
#include <string>      // std::string
#include <utility>     // std::move
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What to verify with.
struct gguf_verify_options {
  const imatrix* column_weights = nullptr;      ///< what the file was packed with, to pack it again
  std::function<bool(std::size_t)> progress{};  ///< called with bytes of the original as they are done; false stops
};

/// What a comparison found, when nothing was wrong.
struct gguf_verify_report {
  error_report errors;        ///< of all packed weights, as llama.cpp decodes them
  std::size_t packed = 0;     ///< tensors
  std::size_t kept = 0;       ///< tensors
  std::string recipes;        ///< as the file names them; empty if it does not
  bool packed_again = false;  ///< whether packing again gave the same bytes
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Takes the place of a gguf_writer: compares what it is given with a file.
class gguf_comparison {
 public:
  explicit gguf_comparison(const io::gguf_file& file) : file_(file) {}

  [[nodiscard]] result<void> try_append(const std::string& name, std::span<const std::uint8_t> bytes) {
    const auto& tensor = *file_.find(name);
    std::size_t& at = done_[name];
    const auto there = tensor.bytes().subspan(at, bytes.size());
    at += bytes.size();
    if (std::ranges::equal(bytes, there)) {
      return file_.done_with(there), result<void>();
    }
    return error(errc::malformed_file, {"it does not hold what its recipe makes of the original (before byte ", at,
                                        " of ", printable(name), ')'});
  }
  template <io::tensor_element T>
  [[nodiscard]] result<void> try_append_values(const std::string& name, std::span<const T> values) {
    return try_append(name, {reinterpret_cast<const std::uint8_t*>(values.data()), values.size_bytes()});
  }

 private:
  const io::gguf_file& file_;
  std::map<std::string, std::size_t> done_;
};

template <class Policy>
class gguf_verifier {
 public:
  gguf_verifier(const Policy& policy, const io::gguf_file& original, const io::gguf_file& packed,
                const io::gguf_verify_options& options)
      : policy_(policy), original_(original), packed_(packed), options_(options) {}

  [[nodiscard]] result<io::gguf_verify_report> run() {
    if (auto same = check_metadata(); !same) return same.error();
    for (const auto& tensor : original_) {
      if (auto done = check_tensor(tensor); !done) return done.error();
    }
    for (const auto& tensor : packed_) {
      if (original_.find(tensor.name()) != nullptr || scales_.contains(tensor.name())) continue;
      return wrong(tensor.name(), "expected no such tensor, since the original has none and no reader looks for it");
    }
    if (auto right = check_file_type(); !right) return right.error();
    if (auto again = pack_again(); !again) return again.error();
    return std::move(report_);
  }

 private:
  template <class... Pieces>
  [[nodiscard]] error wrong(const std::string& tensor, const Pieces&... what) const {
    return error(errc::malformed_file, {packed_.path(), ": tensor ", printable(tensor), ": ", what...});
  }

  static bool is_ours(std::string_view key) noexcept {
    return key == "general.file_type" || key == "general.quantization_version" || key == gguf_recipe_key ||
           key.starts_with("quantize.imatrix.");
  }

  [[nodiscard]] result<void> check_metadata() const {
    const auto differs = [&](const std::string& key, std::string_view what) {
      return error(errc::malformed_file, {packed_.path(), ": key ", printable(key), ": ", what});
    };
    for (const auto& [key, value] : original_.metadata()) {
      const auto* const same = packed_.metadata().find(key);
      if (same == nullptr) return differs(key, "expected it as in the original, found none");
      if (!is_ours(key) && !(*same == value)) return differs(key, "expected the value of the original, found another");
    }
    for (const auto& [key, value] : packed_.metadata()) {
      if (original_.metadata().find(key) == nullptr && !is_ours(key)) {
        return differs(key, "expected no such key, since the original has none");
      }
    }
    return {};
  }

  [[nodiscard]] result<void> check_tensor(const io::gguf_tensor& tensor) {
    const auto* const made = packed_.find(tensor.name());
    if (made == nullptr) return wrong(tensor.name(), "expected it as in the original, found none");
    if (made->shape() != tensor.shape()) {
      return wrong(tensor.name(), "expected shape ", shape_text(tensor.shape()), ", found ", shape_text(made->shape()));
    }
    io::gguf_planned planned{&tensor, made->type() != tensor.type()};
    if (!planned.is_packed) {
      if (!std::equal(made->bytes().begin(), made->bytes().end(), tensor.bytes().begin())) {
        return wrong(tensor.name(), "expected the bytes of the original, found others");
      }
      original_.done_with(tensor.bytes());
      packed_.done_with(made->bytes());
      ++report_.kept;
      plan_.tensors.push_back(std::move(planned));
      return progress(tensor.bytes().size());
    }
    if (made->type() != io::ggml_type::MXFP4 && made->type() != io::ggml_type::NVFP4) {
      return wrong(tensor.name(), "expected ", io::name(tensor.type()), ", MXFP4 or NVFP4, found ",
                   io::name(made->type()));
    }
    const std::string_view reason = gguf_kept_because(tensor.name(), tensor.shape());
    if (is_one_of(reason, {"a router", "a norm", "a convolution"})) {
      return wrong(tensor.name(), "expected ", io::name(tensor.type()), ", since it is ", reason, ", found ",
                   io::name(made->type()));
    }
    planned.how.format = made->type() == io::ggml_type::NVFP4 ? any_format(nvfp4{}) : any_format(mxfp4{});
    auto scales = tensor_scales(planned);
    if (!scales) return scales.error();
    ++report_.packed;
    values_[made->type() == io::ggml_type::NVFP4] += tensor.elements();
    auto compared = compare_values(planned, *made, *scales);
    plan_.tensors.push_back(std::move(planned));
    return compared;
  }

  [[nodiscard]] result<void> progress(std::size_t bytes) const {
    if (!options_.progress || options_.progress(bytes)) return {};
    return error(errc::io, {packed_.path(), ": stopped"});
  }

  /// One for each matrix, as llama.cpp multiplies by them.
  [[nodiscard]] result<std::vector<float>> tensor_scales(io::gguf_planned& planned) {
    if (planned.type() != io::ggml_type::NVFP4) return std::vector<float>{};
    std::vector<float> ones(planned.matrices(), 1.0f);
    const std::string& name = planned.source->name();
    const std::string module = name.substr(0, name.rfind('.'));
    const auto* const scale = packed_.find(module + ".scale");
    if (scale == nullptr || original_.find(scale->name()) != nullptr) return ones;
    std::string_view family;
    if (const auto known = packed_.metadata().try_get<std::string_view>("general.architecture")) family = *known;
    if (!gguf_scale_applies(family, name, original_.find(module + ".bias") != nullptr)) {
      return wrong(scale->name(), "expected none, since llama.cpp does not multiply by it here");
    }
    if (scale->shape() != std::vector<std::size_t>{planned.matrices()}) {
      return wrong(scale->name(), "expected a scale for each of ", planned.matrices(), " matrices, found shape ",
                   shape_text(scale->shape()));
    }
    auto values = scale->try_copy_as<float>();
    if (!values) return values.error();
    for (const float value : *values) {
      if (!(value > 0 && value <= largest<float>)) {
        return wrong(scale->name(), "expected positive, finite scales, found ", value);
      }
    }
    scales_[scale->name()] = true;
    planned.scale_name = scale->name();
    return values;
  }

  [[nodiscard]] result<void> compare_values(const io::gguf_planned& planned, const io::gguf_tensor& made,
                                            std::span<const float> scales) {
    switch (planned.source->type()) {
      case io::ggml_type::F32:
        return compare_as<float>(planned, made, scales);
      case io::ggml_type::F16:
        return compare_as<half>(planned, made, scales);
      case io::ggml_type::BF16:
        return compare_as<bfloat16>(planned, made, scales);
      default:
        return wrong(made.name(), "expected ", io::name(planned.source->type()), " as in the original, found ",
                     io::name(made.type()));
    }
  }

  template <class T>
  [[nodiscard]] result<void> compare_as(const io::gguf_planned& planned, const io::gguf_tensor& made,
                                        std::span<const float> scales) {
    constexpr double least = 6;  // dB; every recipe is above 12 on weights of any shape
    const auto values = planned.source->try_as<T>();
    if (!values) return values.error();
    const std::size_t rows = planned.rows(), cols = planned.cols();
    const std::size_t step = std::clamp<std::size_t>((std::size_t{4} << 20) / (cols * sizeof(T)), 1, rows);
    error_report report;
    for (std::size_t e = 0; e < planned.matrices(); ++e) {
      for (std::size_t row = 0; row < rows; row += step) {
        const std::size_t count = std::min(step, rows - row), first = e * rows + row;
        const packed_shape shape{planned.how.format, 1, count, cols};
        const std::size_t size = ggml_size(shape), row_size = size / count;
        const auto blocks = made.bytes().subspan(first * row_size, size);
        const auto decoded = layout::try_from_ggml(planned.how.format, blocks, 1, count, cols,
                                                   scales.empty() ? scales : scales.subspan(e, 1));
        if (!decoded) return wrong(made.name(), decoded.error().what());
        const auto slice = values->subspan(first * cols, count * cols);
        report.add(compare(batch_view<const T>(slice.data(), 1, count, cols), dequantize<float>(policy_, *decoded)));
        packed_.done_with(blocks);
        original_.done_with({reinterpret_cast<const std::uint8_t*>(slice.data()), slice.size_bytes()});
        if (auto go_on = progress(slice.size_bytes()); !go_on) return go_on;
      }
    }
    report_.errors.add(report);
    if (report.sum_squared_errors == 0 || report.qsnr() >= least) return {};
    return wrong(made.name(), "what readers decode is not the original: QSNR ", report.qsnr(), " dB");
  }

  [[nodiscard]] result<void> check_file_type() const {
    if (report_.packed == 0) return {};
    const std::uint32_t expected = gguf_file_type(values_[0], values_[1]);
    const auto found = packed_.metadata().try_get<std::uint32_t>("general.file_type");
    if (!found) return error(errc::malformed_file, {packed_.path(), ": ", found.error().what()});
    if (*found == expected) return {};
    return error(errc::malformed_file,
                 {packed_.path(), ": key 'general.file_type': expected ", expected, ", found ", *found});
  }

  /// Where the file says how it was packed: once more, to the same bytes.
  [[nodiscard]] result<void> pack_again() {
    const auto recipes = packed_.metadata().try_get<std::string_view>(gguf_recipe_key);
    if (!recipes) return {};
    report_.recipes = *recipes;
    const bool was_weighted = packed_.metadata().find("quantize.imatrix.entries_count") != nullptr;
    if (was_weighted && options_.column_weights == nullptr) return {};
    plan_.options.column_weights = was_weighted ? options_.column_weights : nullptr;
    if (auto read = read_rules(*recipes); !read) return read;
    for (auto& planned : plan_.tensors) {
      if (!planned.is_packed) continue;
      const auto format = planned.how.format;
      for (const auto& rule : plan_.options.rules) {
        if (rule_matches(rule, *planned.source)) planned.how = rule.how;
      }
      if (planned.how.format != format) {
        return wrong(planned.source->name(), "expected what ", planned.how.name(), " makes, found ",
                     io::name(packed_.find(planned.source->name())->type()));
      }
      planned.is_weighted = was_weighted && options_.column_weights->contains(planned.source->name());
    }
    plan_.options.progress = [&](std::size_t) { return !options_.progress || options_.progress(0); };
    gguf_comparison comparison(packed_);
    if (auto same = gguf_packer(policy_, original_, plan_, comparison).run(); !same) return same.error();
    report_.packed_again = true;
    return {};
  }

  /// "RECIPE" or "WEIGHTS=RECIPE", with spaces between them.
  [[nodiscard]] result<void> read_rules(std::string_view rest) {
    while (!rest.empty()) {
      const std::string_view word = rest.substr(0, rest.find(' '));
      rest.remove_prefix(std::min(rest.size(), word.size() + 1));
      const std::size_t sign = word.rfind('=');
      const std::string pattern(sign == std::string_view::npos ? std::string_view() : word.substr(0, sign));
      auto how = recipe::try_parse(sign == std::string_view::npos ? word : word.substr(sign + 1));
      if (!how) return error(errc::malformed_file, {packed_.path(), ": ", gguf_recipe_key, ": ", how.error().what()});
      plan_.options.rules.push_back({pattern, *how});
    }
    return {};
  }

  const Policy& policy_;
  const io::gguf_file& original_;
  const io::gguf_file& packed_;
  const io::gguf_verify_options& options_;
  io::gguf_plan plan_;
  std::map<std::string, bool> scales_;
  std::size_t values_[2] = {};  // of MXFP4, of NVFP4
  io::gguf_verify_report report_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

/// Compares a packed GGUF file with the one it was made from, by what llama.cpp reads: every packed weight decoded,
/// with the tensor scales that its graphs apply; every other tensor and key as it was, and none besides. Where the file
/// names its recipe, the weights are packed again, to the same bytes. Errors: malformed_file names what is wrong.
template <class Policy>
[[nodiscard]] result<gguf_verify_report> try_verify_gguf(const Policy& policy, const gguf_file& original,
                                                         const gguf_file& packed,
                                                         const gguf_verify_options& options = {}) {
  const detail::default_float_state usual;
  return detail::gguf_verifier(policy, original, packed, options).run();
}

/// try_verify_gguf, throwing its error.
template <class Policy>
gguf_verify_report verify_gguf(const Policy& policy, const gguf_file& original, const gguf_file& packed,
                               const gguf_verify_options& options = {}) {
  return try_verify_gguf(policy, original, packed, options).value();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
