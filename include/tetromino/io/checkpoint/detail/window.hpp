#pragma once

#include "../../../detail/macros_off.hpp"

#include "slices.hpp"  // shared_failure

#include <algorithm>  // std::clamp, std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Rows of a parameter that is stored [.., K, outputs], as they are stored: threads that each read a few rows would
/// read few bytes at a time, so they share what they read.
class stored_window {
 public:
  /// Reads a range of rows, in pieces of about `piece_bytes` over the executor.
  [[nodiscard]] result<void> try_fill(executor_ref executor, const io::checkpoint& from, const io::parameter& p,
                                      const io::row_range& rows, std::size_t piece_bytes) {
    rows_ = rows;
    const std::size_t strip = rows.count * bits_per_element(p.values->dtype) / 8;
    const std::size_t at_once = std::clamp<std::size_t>(piece_bytes / strip, 1, p.cols);
    strips_.resize(p.cols * strip);
    shared_failure failure;
    executor((p.cols + at_once - 1) / at_once, [&](std::size_t t) {
      if (failure.is_set()) return;
      const std::size_t k = t * at_once, count = std::min(at_once, p.cols - k);
      const auto to = std::span(strips_).subspan(k * strip, count * strip);
      if (auto read = read_strips(from, p, rows_, k, count, to); !read) failure.set(read.error());
    });
    return failure.outcome();
  }

  /// Calls f with rows that lie within those that were read, turned into rows of K.
  template <class F>
  [[nodiscard]] result<void> visit(const io::parameter& p, const io::row_range& rows, io::row_buffers& buffers,
                                   const F& f) const {
    return with_plain_type(p, [&]<class T>(T) {
      const auto* const strips = reinterpret_cast<const T*>(strips_.data());
      const std::size_t column = rows.first - rows_.first;
      return f(turn_strips(strips + column, rows_.count, rows.count, p.cols, buffers));
    });
  }

 private:
  io::row_range rows_{};
  std::vector<std::uint8_t> strips_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
