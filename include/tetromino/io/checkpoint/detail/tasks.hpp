#pragma once

#include "../../../detail/macros_off.hpp"

#include "../options.hpp"  // pack_options
#include "../plan.hpp"     // pack_plan
#include "../rows.hpp"     // row_range

#include <algorithm>  // std::clamp, std::max, std::min
#include <cstddef>    // std::size_t
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Rows of a planned parameter, or bytes of a kept one.
struct pack_task {
  std::size_t parameter = 0;
  io::row_range rows{};
  bool as_stored = false;  ///< of a parameter that is stored [.., K, outputs]: its rows are those that are stored
  std::size_t offset = 0;  ///< of kept bytes
  std::size_t bytes = 0;   ///< of the source
  bool is_sampled = false;
};

/// Cuts the work on a model into batches of parameters, and these into slices.
class pack_schedule {
 public:
  pack_schedule(const io::pack_plan& plan, const io::pack_options& options) : plan_(plan), options_(options) {
    constexpr std::size_t compared_whole = 1u << 27;  // small models are compared whole, others by a sample
    std::size_t elements = 0;
    for (const auto& p : plan_.parameters) elements += p.is_packed() ? p.source->elements() : 0;
    sampled_one_in_ = elements <= compared_whole ? 1 : 32;
  }

  [[nodiscard]] std::size_t sampled_one_in() const noexcept { return sampled_one_in_; }

  /// Whole sets of parameters, so much at a time that what is read twice should still be in the page cache.
  [[nodiscard]] std::vector<std::vector<std::size_t>> batches() const {
    constexpr std::size_t batch_bytes = 512u << 20;
    std::vector<std::vector<std::size_t>> out(1);
    std::size_t bytes = 0;
    for (const auto& members : sets_in_order()) {
      if (bytes >= batch_bytes) {
        out.emplace_back();
        bytes = 0;
      }
      for (const std::size_t i : members) {
        out.back().push_back(i);
        bytes += bytes_of(i);
      }
    }
    return out;
  }

  /// The slices of a parameter; whole matrices where it is packed with error feedback, or if that is asked for.
  void add_tasks(std::size_t i, std::vector<pack_task>& tasks, bool whole_matrices = false) const {
    constexpr std::size_t turned_at_once = 512u << 10;  // bytes of rows that a cache holds until they are packed
    const auto& planned = plan_.parameters[i];
    const io::parameter& p = *planned.source;
    std::size_t slice = std::max<std::size_t>(options_.slice_bytes, 4096);
    if (planned.action == io::pack_action::keep) {
      for (std::size_t offset = 0; offset < p.values->bytes; offset += slice) {
        tasks.push_back({i, {}, false, offset, std::min(slice, p.values->bytes - offset)});
      }
      return;
    }
    const std::size_t bytes_per_value =
        p.encoding == io::value_encoding::plain ? bits_per_element(p.values->dtype) / 8 : 4;
    const bool whole = planned.action == io::pack_action::pack && (planned.how.error_feedback || whole_matrices);
    if (is_turned(i)) slice = std::min(slice, turned_at_once);
    const std::size_t step = whole ? p.rows : std::clamp<std::size_t>(slice / (p.cols * bytes_per_value), 1, p.rows);
    std::size_t number = 0;
    for (std::size_t e = 0; e < p.matrices; ++e) {
      for (std::size_t r = 0; r < p.rows; r += step) {
        const std::size_t rows = std::min(step, p.rows - r);
        const bool is_sampled = number++ % sampled_one_in_ == 0;
        tasks.push_back({i, {e, r, rows}, false, 0, bytes_of(i) / (p.matrices * p.rows) * rows, is_sampled});
      }
    }
  }

  /// The slices of a parameter where only its largest magnitude is sought: in the order of the file, unless a rotation
  /// mixes what lies in a row.
  void add_measuring_tasks(std::size_t i, std::vector<pack_task>& tasks) const {
    if (!is_turned(i) || plan_.parameters[i].how.rotation != 0) return add_tasks(i, tasks);
    const io::parameter& p = *plan_.parameters[i].source;
    const std::size_t strip = p.rows * bits_per_element(p.values->dtype) / 8;
    const std::size_t step = std::clamp<std::size_t>(options_.slice_bytes / strip, 1, p.cols);
    for (std::size_t e = 0; e < p.matrices; ++e) {
      for (std::size_t k = 0; k < p.cols; k += step) tasks.push_back({i, {e, k, std::min(step, p.cols - k)}, true});
    }
  }

  /// Whether rows of K are to be made of columns, which lie too far apart to be read for one slice alone.
  [[nodiscard]] bool needs_window(const pack_task& task) const noexcept {
    return is_turned(task.parameter) && !task.as_stored;
  }

 private:
  [[nodiscard]] bool is_turned(std::size_t i) const noexcept {
    const io::parameter& p = *plan_.parameters[i].source;
    return plan_.parameters[i].action == io::pack_action::pack && p.kind.is_transposed &&
           p.encoding == io::value_encoding::plain;
  }

  [[nodiscard]] std::size_t bytes_of(std::size_t i) const noexcept {
    const io::parameter& p = *plan_.parameters[i].source;
    return p.values->bytes + (p.scales == nullptr ? 0 : p.scales->bytes);
  }

  /// Parameters by set, sets by their first member; what is kept stands alone.
  [[nodiscard]] std::vector<std::vector<std::size_t>> sets_in_order() const {
    std::vector<std::vector<std::size_t>> out;
    std::vector<std::size_t> place(plan_.sets, static_cast<std::size_t>(-1));
    for (std::size_t i = 0; i < plan_.parameters.size(); ++i) {
      const auto& planned = plan_.parameters[i];
      std::size_t& at = place[planned.source->set];
      if (!planned.is_packed() || at == static_cast<std::size_t>(-1)) {
        if (planned.is_packed()) at = out.size();
        out.push_back({i});
      } else {
        out[at].push_back(i);
      }
    }
    return out;
  }

  const io::pack_plan& plan_;
  const io::pack_options& options_;
  std::size_t sampled_one_in_ = 1;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
