#pragma once

/// What goes into a model's weights on calibration text: the second moments of each matrix's input, gathered by one
/// program and read by another. Weights that share an input (q, k and v of a layer, gate and up of an expert) share its
/// statistics.

#include <tetromino/gptq.hpp>
#include <tetromino/io/safetensors.hpp>

#include <fmt/format.h>

#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

/// The statistics of all inputs, such as "layers.0.moe.down": one calibration for each matrix, that is for each expert.
class input_statistics {
 public:
  /// What an expert that few tokens reach borrows: moments of its layer, as of so many more tokens.
  static double borrowed_rows(std::size_t cols) { return 2 * static_cast<double>(cols); }

  input_statistics() = default;

  /// Adds rows [.., cols] that met matrix `which` of `matrices`.
  void add(const std::string& input, std::size_t which, std::size_t matrices, std::span<const float> rows,
           std::size_t cols) {
    auto& seen = inputs_[input];
    if (seen.empty()) seen.assign(matrices, tetromino::calibration(cols));
    seen[which].add(tetromino::matrix_view<const float>(rows.data(), rows.size() / cols, cols));
  }

  /// Says which input a weight tensor has.
  void name(const std::string& tensor, const std::string& input) { input_of_[tensor] = input; }

  [[nodiscard]] bool knows(const std::string& tensor) const {
    const auto found = input_of_.find(tensor);
    return found != input_of_.end() && inputs_.contains(found->second);
  }

  /// For one matrix of a weight tensor [matrices, rows, cols]: what was seen, blended with that of all experts.
  [[nodiscard]] tetromino::calibration of(const std::string& tensor, std::size_t which, std::size_t matrices,
                                          std::size_t cols) const {
    if (!knows(tensor)) {
      throw tetromino::error(tetromino::errc::invalid_argument,
                             fmt::format("no calibration statistics for the weights {}", tensor));
    }
    const auto& seen = inputs_.at(input_of_.at(tensor));
    if (seen.size() != matrices || seen.front().cols() != cols) {
      throw tetromino::error(tetromino::errc::shape_mismatch,
                             fmt::format("the calibration statistics of {} are of {} matrices with K = {}, the weights "
                                         "are {} with K = {}",
                                         tensor, seen.size(), seen.front().cols(), matrices, cols));
    }
    if (matrices == 1) return seen.front();
    tetromino::calibration all(cols);
    for (const auto& one : seen) all.merge(one);
    return seen[which].blended(all, borrowed_rows(cols));
  }

  /// The mean squared activation of each column for one matrix, after the rotation of a recipe: column_weights.
  [[nodiscard]] std::vector<float> column_weights(const std::string& tensor, std::size_t which, std::size_t matrices,
                                                  std::size_t cols, std::size_t rotation) const {
    const tetromino::calibration seen = of(tensor, which, matrices, cols);
    return rotation == 0 ? seen.column_weights() : seen.rotated({rotation}).column_weights();
  }

  /// Writes INPUT.moments [matrices, cols, cols] and INPUT.rows [matrices]; the metadata name each tensor's input.
  void save(const std::string& path) const {
    namespace io = tetromino::io;
    std::vector<io::tensor_declaration> parts;
    for (const auto& [input, seen] : inputs_) {
      parts.push_back({input + ".moments", io::dtype::F64, {seen.size(), seen.front().cols(), seen.front().cols()}});
      parts.push_back({input + ".rows", io::dtype::F64, {seen.size()}});
    }
    auto writer = io::safetensors_writer::create(path, parts, {input_of_.begin(), input_of_.end()});
    for (const auto& [input, seen] : inputs_) {
      for (const auto& one : seen) {
        const Eigen::MatrixXd moments = one.moments().selfadjointView<Eigen::Lower>();
        writer.append_values<double>(input + ".moments", {moments.data(), static_cast<std::size_t>(moments.size())});
        const double rows = one.rows();
        writer.append_values<double>(input + ".rows", {&rows, 1});
      }
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
      const auto values = moments.copy_as<double>();
      const auto n = static_cast<Eigen::Index>(shape[1]);
      for (std::size_t e = 0; e < shape[0]; ++e) {
        const Eigen::Map<const Eigen::MatrixXd> one(values.data() + e * shape[1] * shape[1], n, n);
        if (!one.allFinite() || !(one.diagonal().array() >= 0).all() || !(rows[e] >= 0)) {
          throw tetromino::error(tetromino::errc::malformed_file,
                                 fmt::format("{}: {}: matrix {}: expected finite moments", path, input, e));
        }
        out.inputs_[input].emplace_back(one, rows[e]);
      }
    }
    if (out.inputs_.empty()) {
      throw tetromino::error(tetromino::errc::malformed_file,
                             fmt::format("{}: expected calibration statistics, found no statistics in it", path));
    }
    return out;
  }

 private:
  std::map<std::string, std::vector<tetromino::calibration>> inputs_;
  std::map<std::string, std::string> input_of_;  // by weight tensor
};
