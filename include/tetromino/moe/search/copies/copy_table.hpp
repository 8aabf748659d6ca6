#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../placement.hpp"  // placement, replica_index
#include "../../topology.hpp"   // topology

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t, std::uint64_t
#include <span>     // std::span
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::moe::detail {

/// The GPUs that hold each expert, in the order of their slots.
class copy_table {
 public:
  TETROMINO_ABI copy_table(const placement& p, const topology& t) : layers_(p.layers()), experts_(p.experts()) {
    const replica_index where(p);
    first_.reserve(layers_ * experts_ + 1);
    for (std::size_t l = 0; l < layers_; ++l) {
      for (std::size_t e = 0; e < experts_; ++e) {
        first_.push_back(static_cast<std::uint32_t>(gpu_of_copy_.size()));
        for (const std::uint32_t s : where.slots_of(l, e)) {
          gpu_of_copy_.push_back(static_cast<std::uint32_t>(t.gpu_of_slot(s)));
        }
      }
    }
    first_.push_back(static_cast<std::uint32_t>(gpu_of_copy_.size()));
    for (std::size_t g = 0; g < t.gpus(); ++g) {
      node_of_gpu_.push_back(static_cast<std::uint32_t>(t.node_of_gpu(g)));
      time_of_pair_.push_back(static_cast<std::uint64_t>(1024 / t.speed(g)));
    }
  }

  [[nodiscard]] TETROMINO_ABI std::size_t layers() const noexcept { return layers_; }
  [[nodiscard]] TETROMINO_ABI std::size_t experts() const noexcept { return experts_; }
  [[nodiscard]] TETROMINO_ABI std::size_t gpus() const noexcept { return node_of_gpu_.size(); }
  [[nodiscard]] TETROMINO_ABI std::uint32_t node_of(std::size_t gpu) const { return node_of_gpu_[gpu]; }
  /// How long a GPU takes for a pair, in whole numbers: 1024 for the fastest.
  [[nodiscard]] TETROMINO_ABI std::uint64_t time_of_pair(std::size_t gpu) const { return time_of_pair_[gpu]; }

  /// Copies are numbered through all experts of all layers.
  [[nodiscard]] TETROMINO_ABI std::size_t first_copy(std::size_t layer, std::size_t expert) const {
    return first_[layer * experts_ + expert];
  }
  [[nodiscard]] TETROMINO_ABI std::size_t last_copy(std::size_t layer, std::size_t expert) const {
    return first_[layer * experts_ + expert + 1];
  }
  [[nodiscard]] TETROMINO_ABI std::size_t copies() const noexcept { return gpu_of_copy_.size(); }
  [[nodiscard]] TETROMINO_ABI std::uint32_t gpu_of_copy(std::size_t copy) const { return gpu_of_copy_[copy]; }

  /// GPUs of one expert's copies.
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint32_t> gpus_of(std::size_t layer, std::size_t expert) const {
    const std::size_t first = first_copy(layer, expert);
    return std::span(gpu_of_copy_).subspan(first, last_copy(layer, expert) - first);
  }

 private:
  std::size_t layers_, experts_;
  std::vector<std::uint32_t> first_;         // [layers × experts + 1] into gpu_of_copy_
  std::vector<std::uint32_t> gpu_of_copy_;   // [copies]
  std::vector<std::uint32_t> node_of_gpu_;   // [gpus]
  std::vector<std::uint64_t> time_of_pair_;  // [gpus]
};

}  // namespace TETROMINO_NAMESPACE::moe::detail

#include "../../../detail/macros_back.hpp"
