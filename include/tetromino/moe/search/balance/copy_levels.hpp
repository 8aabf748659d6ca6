#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../version.hpp"  // TETROMINO_NAMESPACE

#include <algorithm>  // std::find_if, std::max, std::sort
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Copies of experts on GPUs of several speeds, and what each serves where a token goes to the copy whose GPU is busy
/// for the shortest time (replica_choice::least_loaded). Keeps its buffers.
class copy_levels {
 public:
  struct copy {
    std::uint32_t gpu;
    double share;  // of the expert's load
  };

  /// No copies yet, of experts of these loads; on GPUs of these speeds. Both have to stay.
  void begin(std::span<const double> load, std::span<const double> speeds) {
    load_ = load;
    speeds_ = speeds;
    copies_.resize(load.size());
    for (std::vector<copy>& of_expert : copies_) of_expert.clear();
    gpu_load_.assign(speeds.size(), 0.0);
  }
  /// A copy: the first of an expert serves all of it, others nothing before `level`.
  void add(std::size_t expert, std::size_t gpu) {
    std::vector<copy>& of_expert = copies_[expert];
    of_expert.push_back({static_cast<std::uint32_t>(gpu), of_expert.empty() ? load_[expert] : 0.0});
    gpu_load_[gpu] += of_expert.back().share;
  }
  [[nodiscard]] const copy* find(std::size_t expert, std::size_t gpu) const {
    const std::vector<copy>& of_expert = copies_[expert];
    const auto found = std::find_if(of_expert.begin(), of_expert.end(), [&](const copy& c) { return c.gpu == gpu; });
    return found == of_expert.end() ? nullptr : &*found;
  }

  /// Shares each expert out again so that its copies' GPUs are done at the same time, as far as they can be; so often.
  void level(std::size_t rounds) {
    for (std::size_t i = 0; i < rounds; ++i) {
      for (std::size_t e = 0; e < copies_.size(); ++e) {
        if (copies_[e].size() > 1) pour(load_[e], copies_[e]);
      }
    }
  }

  [[nodiscard]] double busy(std::size_t gpu) const { return gpu_load_[gpu] / speeds_[gpu]; }
  /// What has to go from one GPU to another so that both are done at the same time; below 0 the other way.
  [[nodiscard]] double until_even(std::size_t from, std::size_t to) const {
    return (busy(from) - busy(to)) * speeds_[from] * speeds_[to] / (speeds_[from] + speeds_[to]);
  }
  /// How long the GPU that takes longest is busy.
  [[nodiscard]] double busiest() const {
    double most = 0;
    for (std::size_t g = 0; g < speeds_.size(); ++g) most = std::max(most, busy(g));
    return most;
  }
  /// The same where each copy of an expert serves as much.
  [[nodiscard]] double busiest_if_even() {
    even_.assign(speeds_.size(), 0.0);
    for (std::size_t e = 0; e < copies_.size(); ++e) {
      for (const copy& c : copies_[e]) even_[c.gpu] += load_[e] / static_cast<double>(copies_[e].size());
    }
    double most = 0;
    for (std::size_t g = 0; g < speeds_.size(); ++g) most = std::max(most, even_[g] / speeds_[g]);
    return most;
  }
  /// [gpus]
  [[nodiscard]] std::span<const double> gpu_loads() const noexcept { return gpu_load_; }

 private:
  // Fills the GPUs up to one level, those that are done first before the others.
  void pour(double load, std::vector<copy>& of_expert) {
    for (const copy& c : of_expert) gpu_load_[c.gpu] -= c.share;
    std::sort(of_expert.begin(), of_expert.end(), [&](const copy& a, const copy& b) {
      return busy(a.gpu) != busy(b.gpu) ? busy(a.gpu) < busy(b.gpu) : a.gpu < b.gpu;
    });
    double level = 0, sum = load, speed = 0;
    std::size_t wet = 0;
    for (; wet < of_expert.size() && (wet == 0 || busy(of_expert[wet].gpu) < level); ++wet) {
      sum += gpu_load_[of_expert[wet].gpu];
      speed += speeds_[of_expert[wet].gpu];
      level = sum / speed;
    }
    for (std::size_t i = 0; i < of_expert.size(); ++i) {
      copy& c = of_expert[i];
      c.share = i < wet ? std::max(0.0, level * speeds_[c.gpu] - gpu_load_[c.gpu]) : 0.0;
      gpu_load_[c.gpu] += c.share;
    }
  }

  std::span<const double> load_, speeds_;
  std::vector<std::vector<copy>> copies_;  // [experts]
  std::vector<double> gpu_load_, even_;    // [gpus]
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
