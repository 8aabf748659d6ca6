#pragma once

/// What goes into a model's weights on calibration text: the second moments of each matrix's input, gathered by one
/// program and read by another. Weights that share an input (q, k and v of a layer, gate and up of an expert) share its
/// statistics.

#include <tetromino/gptq.hpp>
#include <tetromino/io/safetensors.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

/// What is known of one input: a calibration for each matrix, that is for each expert, and the largest magnitude that
/// was seen.
struct seen_input {
  std::vector<tetromino::calibration> moments;  // [matrices]
  std::vector<float> amax;                      // [matrices]; empty where a file does not say it

  /// Adds rows [.., cols] that met matrix `which`, and where two streams were run, as they met the packed one.
  /// Different matrices may be added to at once.
  void add(std::size_t which, std::span<const float> rows, std::span<const float> met = {}) {
    const std::size_t cols = moments[which].cols();
    const tetromino::matrix_view<const float> x(rows.data(), rows.size() / cols, cols);
    if (met.empty()) {
      moments[which].add(x);
    } else {
      moments[which].add(x, tetromino::matrix_view<const float>(met.data(), met.size() / cols, cols));
    }
    for (const float v : rows) amax[which] = std::max(amax[which], std::abs(v));
  }
};

/// The statistics of all inputs, such as "layers.0.moe.down". A weight is known by its own name; an expert of a list,
/// such as "mlp.experts.3.up_proj.weight", also by that of the stack, "mlp.experts.up_proj.weight".
class input_statistics {
 public:
  /// What an expert that few tokens reach borrows: moments of its layer, as of so many more tokens.
  static double borrowed_rows(std::size_t cols) { return 2 * static_cast<double>(cols); }

  input_statistics() = default;

  /// An input of so many matrices, to add rows to.
  seen_input& input(const std::string& name, std::size_t matrices, std::size_t cols) {
    const auto [at, is_new] = inputs_.try_emplace(name);
    if (is_new) {
      at->second = {std::vector(matrices, tetromino::calibration(cols)), std::vector<float>(matrices)};
    }
    return at->second;
  }

  /// Says which input a weight tensor has.
  void name(const std::string& tensor, const std::string& input) { input_of_[tensor] = input; }

  [[nodiscard]] bool knows(const std::string& tensor) const { return input_of(tensor) != nullptr; }

  /// The largest magnitude that one matrix of a weight has met; nothing where the file does not say it.
  [[nodiscard]] std::optional<float> amax(const std::string& tensor, std::size_t which) const {
    const std::string* input = input_of(tensor);
    if (input == nullptr) return std::nullopt;
    const auto& amax = inputs_.at(*input).amax;
    if (const auto expert = expert_of(tensor); expert && input_of_.find(tensor) == input_of_.end())
      which = expert->second;
    if (which >= amax.size()) return std::nullopt;
    return amax[which];
  }

  /// For one matrix of a weight tensor [matrices, rows, cols]: what was seen, blended with that of all experts.
  [[nodiscard]] tetromino::calibration of(const std::string& tensor, std::size_t which, std::size_t matrices,
                                          std::size_t cols) const {
    const auto [seen, place] = of_all(tensor, which, matrices, cols);
    if (seen.size() == 1) return seen.front();
    tetromino::calibration all(cols);
    for (const auto& one : seen) all.merge(one);
    return seen[place].blended(all, borrowed_rows(cols));
  }

  /// The mean squared activation of each column for one matrix, after the rotation of a recipe: column_weights.
  [[nodiscard]] std::vector<float> column_weights(const std::string& tensor, std::size_t which, std::size_t matrices,
                                                  std::size_t cols, std::size_t rotation) const {
    const tetromino::calibration seen = of(tensor, which, matrices, cols);
    auto weights = rotation == 0 ? seen.column_weights() : seen.rotated({rotation}).column_weights();
    const float largest = *std::max_element(weights.begin(), weights.end());
    for (float& weight : weights) {
      if (weight < 0 && weight > -1e-4f * largest) weight = 0;  // rounding, of columns that cancel
      if (!(weight >= 0 && std::isfinite(weight))) {
        throw tetromino::error(tetromino::errc::malformed_file,
                               fmt::format("the calibration statistics of {} are no moments of inputs: a column's mean "
                                           "square would be {}",
                                           tensor, weight));
      }
    }
    return weights;
  }

  /// The squares of the products of rows [.., cols] with the inputs that one matrix has met, summed over rows and
  /// inputs.
  [[nodiscard]] double squared_products(const std::string& tensor, std::size_t which, std::size_t matrices,
                                        const tetromino::matrix_view<const float>& rows) const {
    const auto [seen, place] = of_all(tensor, which, matrices, rows.cols);
    const Eigen::MatrixXf moments =
        Eigen::MatrixXd(seen[place].moments().selfadjointView<Eigen::Lower>()).cast<float>();
    constexpr std::size_t piece = 64;
    double sum = 0;
    for (std::size_t first = 0; first < rows.rows; first += piece) {
      const auto values = tetromino::eigen_map(rows).middleRows(
          static_cast<Eigen::Index>(first), static_cast<Eigen::Index>(std::min(piece, rows.rows - first)));
      sum += (values * moments).cwiseProduct(values).cast<double>().sum();
    }
    return std::max(0.0, sum);  // rounding, of products that cancel
  }

  /// Writes INPUT.moments [matrices, cols, cols], of two streams also INPUT.drift, and INPUT.rows and INPUT.amax
  /// [matrices]; the metadata name each tensor's input.
  void save(const std::string& path) const {
    namespace io = tetromino::io;
    std::vector<io::tensor_declaration> parts;
    for (const auto& [input, seen] : inputs_) {
      const std::size_t matrices = seen.moments.size(), cols = seen.moments.front().cols();
      parts.push_back({input + ".moments", io::dtype::F64, {matrices, cols, cols}});
      if (has_drifted(seen)) parts.push_back({input + ".drift", io::dtype::F64, {matrices, cols, cols}});
      parts.push_back({input + ".rows", io::dtype::F64, {matrices}});
      if (!seen.amax.empty()) parts.push_back({input + ".amax", io::dtype::F32, {matrices}});
    }
    auto writer = io::safetensors_writer::create(path, io::aligned_order(parts), {input_of_.begin(), input_of_.end()});
    const auto append = [&](const std::string& name, const Eigen::MatrixXd& m) {
      writer.append_values<double>(name, {m.data(), static_cast<std::size_t>(m.size())});
    };
    for (const auto& [input, seen] : inputs_) {
      for (const auto& one : seen.moments) {
        append(input + ".moments", one.moments().selfadjointView<Eigen::Lower>());
        const double rows = one.rows();
        writer.append_values<double>(input + ".rows", {&rows, 1});
      }
      for (const auto& one : seen.moments) {
        const auto n = one.moments().rows();
        if (has_drifted(seen))
          append(input + ".drift", one.drift().size() != 0 ? one.drift() : Eigen::MatrixXd::Zero(n, n));
      }
      if (!seen.amax.empty()) writer.append_values<float>(input + ".amax", seen.amax);
    }
    writer.finish();
  }

  /// Reads what save() wrote.
  static input_statistics load(const std::string& path) {
    namespace io = tetromino::io;
    const auto file = io::safetensors_file::open(path);
    input_statistics out;
    for (const auto& [tensor, input] : file.metadata()) {
      out.input_of_[tensor] = input;
      if (out.inputs_.contains(input)) continue;
      const auto& moments = file[input + ".moments"];
      const auto rows = file[input + ".rows"].copy_as<double>();
      const auto& shape = moments.shape();
      if (shape.size() != 3 || shape[0] == 0 || shape[1] == 0 || shape[1] != shape[2] || rows.size() != shape[0]) {
        throw tetromino::error(
            tetromino::errc::malformed_file,
            fmt::format("{}: {}: expected moments [matrices, K, K] and rows [matrices]", path, input));
      }
      seen_input& seen = out.inputs_[input];
      if (const auto* largest = file.find(input + ".amax"); largest != nullptr) {
        seen.amax = largest->copy_as<float>();
        if (seen.amax.size() != shape[0] ||
            !std::all_of(seen.amax.begin(), seen.amax.end(), [](float x) { return std::isfinite(x); })) {
          throw tetromino::error(tetromino::errc::malformed_file,
                                 fmt::format("{}: {}: expected finite amax [matrices]", path, input));
        }
      }
      std::vector<double> drifts;
      if (const auto* drift = file.find(input + ".drift"); drift != nullptr) {
        drifts = drift->copy_as<double>();
        if (drift->shape() != shape ||
            !std::all_of(drifts.begin(), drifts.end(), [](double x) { return std::isfinite(x); })) {
          throw tetromino::error(tetromino::errc::malformed_file,
                                 fmt::format("{}: {}: expected finite drift [matrices, K, K]", path, input));
        }
      }
      const auto values = moments.copy_as<double>();
      const auto n = static_cast<Eigen::Index>(shape[1]);
      const auto matrix = [&](const std::vector<double>& all, std::size_t e) {
        return Eigen::Map<const Eigen::MatrixXd>(all.data() + e * shape[1] * shape[1], n, n);
      };
      for (std::size_t e = 0; e < shape[0]; ++e) {
        const auto one = matrix(values, e);
        if (!one.allFinite() || !(one.diagonal().array() >= 0).all() || !(rows[e] >= 0)) {
          throw tetromino::error(tetromino::errc::malformed_file,
                                 fmt::format("{}: {}: matrix {}: expected finite moments", path, input, e));
        }
        seen.moments.emplace_back(one, rows[e],
                                  drifts.empty() ? Eigen::MatrixXd() : Eigen::MatrixXd(matrix(drifts, e)));
      }
    }
    if (out.inputs_.empty()) {
      throw tetromino::error(tetromino::errc::malformed_file,
                             fmt::format("{}: expected calibration statistics, found no statistics in it", path));
    }
    return out;
  }

 private:
  /// "a.experts.3.b" as "a.experts.b" and 3.
  static std::optional<std::pair<std::string, std::size_t>> expert_of(const std::string& tensor) {
    constexpr std::string_view list = "experts.";
    const std::size_t at = tensor.find(list);
    if (at == std::string::npos) return std::nullopt;
    const std::size_t digits = at + list.size(), end = tensor.find_first_not_of("0123456789", digits);
    if (end == digits || end == std::string::npos || tensor[end] != '.' || end - digits > 6) return std::nullopt;
    return std::pair(tensor.substr(0, digits) + tensor.substr(end + 1),
                     std::stoul(tensor.substr(digits, end - digits)));
  }

  /// The statistics of all matrices that share an input with one matrix of a tensor, and which of them is its own.
  [[nodiscard]] std::pair<std::span<const tetromino::calibration>, std::size_t> of_all(const std::string& tensor,
                                                                                       std::size_t which,
                                                                                       std::size_t matrices,
                                                                                       std::size_t cols) const {
    const std::string* const input = input_of(tensor);
    if (input == nullptr) {
      throw tetromino::error(tetromino::errc::invalid_argument,
                             fmt::format("no calibration statistics for the weights {}", tensor));
    }
    const auto& seen = inputs_.at(*input).moments;
    if (const auto expert = expert_of(tensor); matrices == 1 && expert && expert->second < seen.size()) {
      which = expert->second;
      matrices = seen.size();
    }
    if (seen.size() != matrices || seen.front().cols() != cols) {
      throw tetromino::error(tetromino::errc::shape_mismatch,
                             fmt::format("the calibration statistics of {} are of {} matrices with K = {}, the weights "
                                         "are {} with K = {}",
                                         tensor, seen.size(), seen.front().cols(), matrices, cols));
    }
    return {seen, which};
  }

  static bool has_drifted(const seen_input& seen) {
    return std::any_of(seen.moments.begin(), seen.moments.end(),
                       [](const auto& one) { return one.drift().size() != 0; });
  }

  [[nodiscard]] const std::string* input_of(const std::string& tensor) const {
    auto found = input_of_.find(tensor);
    if (found == input_of_.end()) {
      if (const auto expert = expert_of(tensor)) found = input_of_.find(expert->first);
    }
    return found != input_of_.end() && inputs_.contains(found->second) ? &found->second : nullptr;
  }

  std::map<std::string, seen_input> inputs_;
  std::map<std::string, std::string> input_of_;  // by weight tensor
};
