#pragma once

#include "../../../detail/macros_off.hpp"

#include "../layers/node_mask.hpp"    // wide_mask, node_bit
#include "../layers/node_visits.hpp"  // visits_of, cover_lanes
#include "../layers/token_lanes.hpp"  // token_lanes

#include <algorithm>    // std::min
#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::int64_t, std::uint8_t, std::uint16_t
#include <span>         // std::span
#include <type_traits>  // std::is_same_v
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// What it is worth to run requests on each node, given who holds the experts of one layer.
template <class Mask>
class source_scorer {
 public:
  source_scorer(std::size_t nodes, std::size_t experts_per_token, std::int64_t visit_price, std::int64_t pair_price)
      : nodes_(nodes),
        k_(experts_per_token),
        visit_price_(visit_price),
        pair_price_(pair_price),
        lanes_(nodes, experts_per_token),
        held_(experts_per_token * cover_lanes) {
    lanes_.clear(1);
  }

  /// For tokens 0 … count − 1: ids_of(i) are their experts, and add(i, node, score) takes what each node scores:
  /// −visits × visit price + pairs at home × pair price. Ids beyond the holders are those of nobody.
  template <class Ids, class Add>
  void score(std::span<const Mask> holders, bool copies, std::size_t count, const Ids& ids_of, const Add& add) {
    if constexpr (std::is_same_v<Mask, wide_mask>) {
      for (std::size_t i = 0; i < count; ++i)
        score_one(holders, ids_of(i), [&](std::size_t n, std::int64_t s) { add(i, n, s); });
      return;
    }
    for (std::size_t first = 0; first < count; first += cover_lanes) {
      const std::size_t here = std::min(cover_lanes, count - first);
      for (std::size_t i = 0; i < cover_lanes; ++i) {
        const std::uint16_t* const e = i < here ? ids_of(first + i) : nullptr;
        for (std::size_t j = 0; j < k_; ++j) {
          held_[j * cover_lanes + i] = e == nullptr || e[j] >= holders.size() ? Mask{0} : holders[e[j]];
          lanes_.set((j + 1) * cover_lanes + i, held_[j * cover_lanes + i]);
        }
      }
      for (std::size_t n = 0; n < nodes_; ++n) {
        std::array<std::int64_t, cover_lanes> sum{};
        if (visit_price_ != 0) {
          std::uint8_t visits[cover_lanes];
          lanes_.set_homes(0, node_bit<Mask>(n));
          lanes_.count(0, Mask{0}, copies, visits);
          for (std::size_t i = 0; i < here; ++i) sum[i] -= visit_price_ * std::int64_t{visits[i]};
        }
        if (pair_price_ != 0) {
          for (std::size_t j = 0; j < k_; ++j) {
            const Mask* const row = held_.data() + j * cover_lanes;
            const Mask here_too = node_bit<Mask>(n);
            for (std::size_t i = 0; i < here; ++i) sum[i] += (row[i] & here_too) != 0 ? pair_price_ : 0;
          }
        }
        for (std::size_t i = 0; i < here; ++i) add(first + i, n, sum[i]);
      }
    }
  }

 private:
  // One token by itself: of many nodes, most hold none of its experts, and all of those score the same.
  template <class Add>
  void score_one(std::span<const Mask> holders, const std::uint16_t* ids, const Add& add) {
    Mask any{};
    for (std::size_t j = 0; j < k_; ++j) {
      held_[j] = ids[j] >= holders.size() ? Mask{0} : holders[ids[j]];
      any = any | held_[j];
    }
    const auto visits_from = [&](Mask home) {
      return visit_price_ == 0 ? 0 : visit_price_ * visits_of(held_.data(), k_, home);
    };
    const std::int64_t away = visits_from(Mask{0});
    for (std::size_t n = 0; n < nodes_; ++n) {
      const Mask home = node_bit<Mask>(n);
      if ((any & home) == 0) {
        add(n, -away);
        continue;
      }
      std::int64_t at_home = 0;
      for (std::size_t j = 0; j < k_; ++j) at_home += (held_[j] & home) != 0 ? 1 : 0;
      add(n, pair_price_ * at_home - visits_from(home));
    }
  }

  std::size_t nodes_, k_;
  std::int64_t visit_price_, pair_price_;
  token_lanes<Mask> lanes_;
  std::vector<Mask> held_;  // [experts per token, lanes]
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
