#pragma once

#include "../detail/macros_off.hpp"

/// Importance matrices of llama.cpp as column weights. Opt-in: needs a POSIX system.

#include "../config.hpp"              // TETROMINO_EXPECTS
#include "../detail/float_state.hpp"  // default_float_state
#include "../error.hpp"               // error, result
#include "../float16.hpp"             // largest
#include "detail/legacy_imatrix.hpp"  // legacy_imatrix_parser
#include "gguf.hpp"                   // gguf_file

#include <algorithm>    // std::equal, std::lower_bound, std::min, std::sort
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint32_t
#include <filesystem>   // std::filesystem::path
#include <optional>     // std::optional
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <variant>      // std::variant
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::io {

/// An importance matrix as llama-imatrix writes it, in its GGUF form or in the one before: for each column of a weight
/// tensor the mean of its squared activations, by the tensor's name in GGUF. Opening it checks the file's structure and
/// trusts none of it; values are checked where they are asked for.
class imatrix {
 public:
  [[nodiscard]] TETROMINO_ABI static imatrix open(const std::filesystem::path& path) { return try_open(path).value(); }
  [[nodiscard]] TETROMINO_ABI static result<imatrix> try_open(const std::filesystem::path& path) {
    auto mapping = detail::file_mapping::try_open(path);
    if (!mapping) return mapping.error();
    const auto start = mapping->bytes().first(std::min(mapping->bytes().size(), detail::gguf_magic.size()));
    if (std::equal(start.begin(), start.end(), detail::gguf_magic.begin(), detail::gguf_magic.end())) {
      auto file = gguf_file::try_open(path);
      if (!file) return file.error();
      return from_gguf(std::move(*file));
    }
    detail::legacy_imatrix_parser parser(mapping->bytes());
    if (!parser.run()) return error(errc::malformed_file, {path.string(), ": ", parser.problem});
    imatrix out(path.string());
    for (auto& found : parser.found.entries) {
      out.entries_.push_back({std::move(found.name), found.sums, {}, static_cast<float>(found.calls)});
    }
    if (!parser.found.dataset.empty()) out.datasets_.push_back(std::move(parser.found.dataset));
    out.chunks_ = static_cast<std::size_t>(parser.found.chunks);
    out.storage_.emplace(std::move(*mapping));
    return out;
  }

  [[nodiscard]] TETROMINO_ABI const std::string& path() const noexcept { return path_; }
  /// How many tensors it knows.
  [[nodiscard]] TETROMINO_ABI std::size_t size() const noexcept { return entries_.size(); }
  /// The texts that the activations are of, as the file names them.
  [[nodiscard]] TETROMINO_ABI const std::vector<std::string>& datasets() const noexcept { return datasets_; }
  /// How many chunks of text there were; 0 where the file does not say.
  [[nodiscard]] TETROMINO_ABI std::size_t chunks() const noexcept { return chunks_; }

  /// Their names, in order.
  [[nodiscard]] TETROMINO_ABI std::vector<std::string_view> tensors() const {
    std::vector<std::string_view> out;
    for (const entry& one : entries_) out.push_back(one.name);
    return out;
  }
  [[nodiscard]] TETROMINO_ABI bool contains(std::string_view tensor) const noexcept { return find(tensor) != nullptr; }

  /// The mean squared activations of matrix `matrix` of a weight tensor [matrices, rows, cols]: column_weights of
  /// quantize_options. An expert that the text never reached weighs all columns alike, as in llama-quantize.
  /// Errors: unknown_name; shape_mismatch; malformed_file where a value is no weight. Pre: matrix < matrices, and cols
  /// > 0.
  [[nodiscard]] TETROMINO_ABI std::vector<float> column_weights(std::string_view tensor, std::size_t matrix,
                                                                std::size_t matrices, std::size_t cols) const {
    return try_column_weights(tensor, matrix, matrices, cols).value();
  }
  [[nodiscard]] TETROMINO_ABI result<std::vector<float>> try_column_weights(std::string_view tensor, std::size_t matrix,
                                                                            std::size_t matrices,
                                                                            std::size_t cols) const {
    TETROMINO_EXPECTS(matrix < matrices && cols > 0, "column_weights needs a matrix of the tensor, and columns", matrix,
                      matrices, cols);
    const std::string subject = detail::text(path_, ": tensor ", detail::printable(tensor));
    const entry* const found = find(tensor);
    if (found == nullptr) {
      const auto name_of = [](const entry& e) -> std::string_view { return e.name; };
      return error(errc::unknown_name,
                   {subject, ": expected activations of it; ", detail::nearest_names(tensor, entries_, name_of)});
    }
    const std::size_t sums = found->sums.size() / sizeof(float), counts = found->counts.size() / sizeof(float);
    const bool is_shared = sums == cols && counts <= 1;
    if (!is_shared && (sums / cols != matrices || sums % cols != 0 || (counts > 1 && counts != matrices))) {
      return error(errc::shape_mismatch, {subject, ": expected activations of ", matrices, " x ", cols,
                                          " columns, found ", sums, " of them and ", counts, " counts"});
    }
    const std::size_t which = is_shared ? 0 : matrix;
    const float count = counts == 0 ? found->calls : number(found->counts, counts == 1 ? 0 : which);
    if (!(count >= 0.0f && count <= detail::largest<float>)) {
      return error(errc::malformed_file, {subject, ": expected a count of at least 0, found ", count});
    }
    const detail::default_float_state usual;
    std::vector<float> out(cols, 1.0f);
    for (std::size_t k = 0; k < cols && (count > 0.0f || counts == 0); ++k) {
      out[k] = number(found->sums, which * cols + k) / (count > 0.0f ? count : 1.0f);
      if (!(out[k] >= 0.0f && out[k] <= detail::largest<float>)) {
        return error(errc::malformed_file,
                     {subject, ": expected finite means of at least 0, found ", out[k], " in column ", k});
      }
    }
    return out;
  }

 private:
  /// Values are floats at any address; without counts, all sums are divided by `calls`.
  struct entry {
    std::string name;
    std::span<const std::uint8_t> sums;
    std::span<const std::uint8_t> counts;
    float calls = 0;
  };
  using storage = std::variant<gguf_file, detail::file_mapping>;

  TETROMINO_ABI explicit imatrix(std::string path) : path_(std::move(path)) {}

  [[nodiscard]] TETROMINO_ABI static result<imatrix> from_gguf(gguf_file&& file) {
    constexpr std::string_view sums = ".in_sum2", counts = ".counts";
    imatrix out(file.path());
    const auto bad = [&](const auto&... what) { return error(errc::malformed_file, {file.path(), ": ", what...}); };
    for (const gguf_tensor& tensor : file) {
      if (!tensor.name().ends_with(sums)) continue;
      const std::string name = tensor.name().substr(0, tensor.name().size() - sums.size());
      const gguf_tensor* const counted = file.find(name + std::string(counts));
      if (counted == nullptr) return bad("tensor ", detail::printable(name), ": expected counts beside its sums");
      for (const gguf_tensor* one : {&tensor, counted}) {
        if (one->type() == ggml_type::F32 && one->elements() > 0) continue;
        return bad("tensor ", detail::printable(one->name()), ": expected F32 values, found ", one->elements(), " of ",
                   io::name(one->type()));
      }
      out.entries_.push_back({name, tensor.bytes(), counted->bytes()});
    }
    if (out.entries_.empty()) return bad("expected an imatrix, found no tensor *", sums);
    std::sort(out.entries_.begin(), out.entries_.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    if (const auto* const texts = file.metadata().find("imatrix.datasets")) {
      if (const auto names = texts->try_as_array<std::string_view>()) {
        out.datasets_.assign(names->begin(), names->end());
      }
    }
    if (const auto chunks = file.metadata().try_get<std::uint32_t>("imatrix.chunk_count")) out.chunks_ = *chunks;
    out.storage_.emplace(std::move(file));
    return out;
  }

  [[nodiscard]] TETROMINO_ABI const entry* find(std::string_view name) const noexcept {
    const auto found = std::lower_bound(entries_.begin(), entries_.end(), name,
                                        [](const entry& e, std::string_view n) { return e.name < n; });
    return found != entries_.end() && found->name == name ? &*found : nullptr;
  }

  [[nodiscard]] TETROMINO_ABI static float number(std::span<const std::uint8_t> floats, std::size_t i) noexcept {
    return detail::load_number<float>(floats.data() + i * sizeof(float));
  }

  std::string path_;
  std::optional<storage> storage_;  // what the entries refer to
  std::vector<entry> entries_;      // by name
  std::vector<std::string> datasets_;
  std::size_t chunks_ = 0;
};

}  // namespace TETROMINO_NAMESPACE::io

#include "../detail/macros_back.hpp"
