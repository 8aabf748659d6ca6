#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../scaling.hpp"  // tensor_scale_for
#include "../plan.hpp"           // pack_plan
#include "../rows.hpp"           // read_floats

#include <atomic>    // std::atomic_ref
#include <cmath>     // std::ldexp
#include <cstddef>   // std::size_t
#include <optional>  // std::nullopt
#include <utility>   // std::exchange
#include <vector>    // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// NVFP4's tensor scales, one for each set of matrices that readers run as one: the largest magnitude of its values, or
/// of casts the largest E8M0 code, is gathered first.
class set_scales {
 public:
  set_scales(const io::checkpoint& from, const io::pack_plan& plan)
      : from_(from), plan_(plan), separate_(plan.options.separate_scales) {
    first_.assign(separate_ ? plan.parameters.size() : plan.sets, 0);
    for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
      const auto& planned = plan.parameters[i];
      if (planned.is_packed()) first_[key(i)] = planned.source->matrices;
    }
    std::size_t total = 0;
    for (auto& first : first_) total += std::exchange(first, total);
    largest_.assign(total, 0.0f);
  }

  /// Whether the i-th parameter of the plan becomes NVFP4.
  [[nodiscard]] bool has(std::size_t i) const noexcept {
    return plan_.parameters[i].is_packed() && plan_.parameters[i].how.format.scale == scale_type::e4m3;
  }
  /// Whether its values are to be seen before any is packed.
  [[nodiscard]] bool needs_measure(std::size_t i) const noexcept {
    return has(i) && plan_.parameters[i].action != io::pack_action::copy;
  }

  /// From any thread.
  void add(std::size_t i, std::size_t matrix, float value) noexcept {
    const std::atomic_ref<float> largest(largest_[first_[key(i)] + matrix]);
    for (float seen = largest.load(); value > seen && !largest.compare_exchange_weak(seen, value);) {
    }
  }
  [[nodiscard]] float largest_of(std::size_t i, std::size_t matrix) const noexcept {
    return largest_[first_[key(i)] + matrix];
  }

  /// The decode scale of one matrix, as readers of the layout will have it.
  [[nodiscard]] result<float> try_scale(std::size_t i, std::size_t matrix) const {
    const auto& planned = plan_.parameters[i];
    const io::parameter& p = *planned.source;
    float scale = 1.0f;
    if (planned.action == io::pack_action::copy) {
      const auto all = read_floats(from_, *p.tensor_scales);
      if (!all) return all.error();
      scale = (*all)[all->size() == 1 ? 0 : matrix];
      if (p.tensor_scales_divide) scale = 1.0f / scale;
    } else {
      const float largest = largest_of(i, matrix);
      if (largest == 0) return 1.0f;
      scale = planned.action == io::pack_action::cast ? std::ldexp(1.0f, static_cast<int>(largest) - 127 - 8)
                                                      : tensor_scale_for(largest, planned.how.rule);
    }
    return storable_scale(plan_.options.layout, scale);
  }

  /// The scale of the activations that one matrix meets, from statistics or else as the source has it.
  [[nodiscard]] result<float> try_input_scale(std::size_t i, std::size_t matrix) const {
    const io::parameter& p = *plan_.parameters[i].source;
    float scale = 1.0f;
    const auto amax = plan_.options.inputs != nullptr ? plan_.options.inputs->input_amax(p, matrix) : std::nullopt;
    if (amax) {
      if (*amax > 0) scale = *amax / (6.0f * 448.0f);
    } else {
      const auto all = read_floats(from_, *p.input_scale);
      if (!all) return all.error();
      scale = (*all)[all->size() == 1 ? 0 : matrix];
      if (p.tensor_scales_divide) scale = 1.0f / scale;
    }
    return storable_scale(plan_.options.layout, scale);
  }

 private:
  [[nodiscard]] std::size_t key(std::size_t i) const noexcept {
    return separate_ ? i : plan_.parameters[i].source->set;
  }

  const io::checkpoint& from_;
  const io::pack_plan& plan_;
  bool separate_;
  std::vector<std::size_t> first_;
  std::vector<float> largest_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
