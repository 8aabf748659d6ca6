#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../version.hpp"  // TETROMINO_NAMESPACE

#include <algorithm>  // std::fill, std::max, std::sort
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// A copy of an expert and the load it carries.
struct pack_item {
  double weight;
  std::uint32_t expert;
};

/// Puts items into the slots of bins so that the heaviest bin is light and no bin holds an expert twice: heaviest item
/// first into the lightest bin that takes it, then exchanges with the heaviest bin while they help. Deterministic: the
/// lower number wins among equals. Keeps its buffers from call to call.
class bin_packer {
 public:
  static constexpr std::uint32_t nothing = 0xFFFF'FFFF;

  /// Bin b has slots first_slot[b] − first_slot[0] … first_slot[b + 1] − first_slot[0] − 1. Writes the item of each
  /// slot, or `nothing`. Returns the items that no bin could take without holding their expert twice (a caller with as
  /// many slots as items sees this only for experts with several copies).
  /// A bin of speed s counts as heavy as its load / s; without speeds all are alike.
  std::span<const std::uint32_t> pack(std::span<const pack_item> items, std::span<const std::uint32_t> first_slot,
                                      std::span<std::uint32_t> item_of_slot, std::size_t max_exchanges,
                                      std::span<const double> speeds = {}) {
    items_ = items;
    speeds_ = speeds;
    first_slot_ = first_slot;
    item_of_slot_ = item_of_slot;
    bins_ = first_slot.size() - 1;
    std::fill(item_of_slot.begin(), item_of_slot.end(), nothing);
    load_.assign(bins_, 0.0);
    held_.assign(bins_, 0);
    unplaced_.clear();
    order_.resize(items.size());
    for (std::size_t i = 0; i < items.size(); ++i) order_[i] = static_cast<std::uint32_t>(i);
    std::sort(order_.begin(), order_.end(), [&](std::uint32_t a, std::uint32_t b) {
      if (items[a].weight != items[b].weight) return items[a].weight > items[b].weight;
      return items[a].expert != items[b].expert ? items[a].expert < items[b].expert : a < b;
    });
    for (const std::uint32_t i : order_) place(i);
    for (std::size_t n = 0; n < max_exchanges && exchange_with_heaviest(); ++n) {
    }
    return unplaced_;
  }

  /// The load of each bin after `pack`.
  [[nodiscard]] std::span<const double> loads() const noexcept { return load_; }

 private:
  [[nodiscard]] std::size_t begin(std::size_t bin) const { return first_slot_[bin] - first_slot_[0]; }
  [[nodiscard]] std::size_t room(std::size_t bin) const { return first_slot_[bin + 1] - first_slot_[bin]; }

  // Slots of a bin are filled from the front, so the first held_[bin] of them hold items.
  [[nodiscard]] bool holds(std::size_t bin, std::uint32_t expert, std::uint32_t except = nothing) const {
    for (std::size_t s = begin(bin), end = s + held_[bin]; s < end; ++s) {
      if (item_of_slot_[s] != except && items_[item_of_slot_[s]].expert == expert) return true;
    }
    return false;
  }
  [[nodiscard]] double speed(std::size_t bin) const { return speeds_.empty() ? 1.0 : speeds_[bin]; }
  [[nodiscard]] double busy(std::size_t bin) const { return load_[bin] / speed(bin); }
  void put(std::uint32_t item, std::size_t bin) {
    item_of_slot_[begin(bin) + held_[bin]++] = item;
    load_[bin] += items_[item].weight;
  }

  // With the item in it, where bins are of different speeds.
  [[nodiscard]] bool lighter(std::size_t a, std::size_t b, double weight) const {
    if (speeds_.empty()) return load_[a] < load_[b];
    return (load_[a] + weight) / speed(a) < (load_[b] + weight) / speed(b);
  }
  void place(std::uint32_t item) {
    std::size_t best = bins_;
    for (std::size_t b = 0; b < bins_; ++b) {
      if (held_[b] < room(b) && (best == bins_ || lighter(b, best, items_[item].weight)) &&
          !holds(b, items_[item].expert))
        best = b;
    }
    if (best != bins_) {
      put(item, best);
    } else if (!make_room(item)) {
      unplaced_.push_back(item);
    }
  }

  // Every bin with room holds the expert already: move something from a full bin that does not into one that does.
  bool make_room(std::uint32_t item) {
    const std::uint32_t expert = items_[item].expert;
    double best_load = std::numeric_limits<double>::infinity();
    std::size_t from = bins_, to = bins_, moved = 0;
    for (std::size_t full = 0; full < bins_; ++full) {
      if (held_[full] == 0 || holds(full, expert)) continue;
      for (std::size_t open = 0; open < bins_; ++open) {
        if (held_[open] == room(open)) continue;
        for (std::size_t s = begin(full), end = s + held_[full]; s < end; ++s) {
          const pack_item& other = items_[item_of_slot_[s]];
          const double load = std::max((load_[full] - other.weight + items_[item].weight) / speed(full),
                                       (load_[open] + other.weight) / speed(open));
          if (load < best_load && !holds(open, other.expert)) {
            best_load = load;
            from = full;
            to = open;
            moved = s;
          }
        }
      }
    }
    if (from == bins_) return false;
    load_[from] += items_[item].weight - items_[item_of_slot_[moved]].weight;
    put(item_of_slot_[moved], to);
    item_of_slot_[moved] = item;
    return true;
  }

  // One exchange, or move into a free slot, between the heaviest bin and another; false if none makes it lighter.
  bool exchange_with_heaviest() {
    std::size_t heavy = 0;
    for (std::size_t b = 1; b < bins_; ++b) {
      if (busy(b) > busy(heavy)) heavy = b;
    }
    // smaller gains are not worth their time, and below rounding noise they could go back and forth
    double best_load = busy(heavy) - 1e-4 * busy(heavy);
    std::size_t other_bin = bins_, mine = 0, theirs = 0;
    for (std::size_t b = 0; b < bins_; ++b) {
      // at best, both end up in the middle
      if (b == heavy || !((load_[heavy] + load_[b]) / (speed(heavy) + speed(b)) < best_load)) continue;
      const std::size_t candidates = held_[b] + (held_[b] < room(b) ? 1 : 0);
      for (std::size_t s = begin(heavy), end = s + held_[heavy]; s < end; ++s) {
        const pack_item& out = items_[item_of_slot_[s]];
        for (std::size_t c = 0; c < candidates; ++c) {
          const std::size_t t = begin(b) + c;
          const double back = c < held_[b] ? items_[item_of_slot_[t]].weight : 0.0;
          const double load =
              std::max((load_[heavy] - out.weight + back) / speed(heavy), (load_[b] + out.weight - back) / speed(b));
          if (!(load < best_load)) continue;
          const std::uint32_t in = c < held_[b] ? item_of_slot_[t] : nothing;
          if (holds(b, out.expert, in) || (in != nothing && holds(heavy, items_[in].expert, item_of_slot_[s])))
            continue;
          best_load = load;
          other_bin = b;
          mine = s;
          theirs = t;
        }
      }
    }
    if (other_bin == bins_) return false;
    const std::uint32_t out = item_of_slot_[mine], in = item_of_slot_[theirs];
    load_[heavy] -= items_[out].weight;
    load_[other_bin] += items_[out].weight;
    if (in == nothing) {
      ++held_[other_bin];
      const std::size_t last = begin(heavy) + --held_[heavy];
      item_of_slot_[mine] = item_of_slot_[last];
      item_of_slot_[last] = nothing;
    } else {
      load_[heavy] += items_[in].weight;
      load_[other_bin] -= items_[in].weight;
      item_of_slot_[mine] = in;
    }
    item_of_slot_[theirs] = out;
    return true;
  }

  std::span<const pack_item> items_;
  std::span<const double> speeds_;
  std::span<const std::uint32_t> first_slot_;
  std::span<std::uint32_t> item_of_slot_;
  std::size_t bins_ = 0;
  std::vector<double> load_;
  std::vector<std::uint32_t> held_;
  std::vector<std::uint32_t> order_;
  std::vector<std::uint32_t> unplaced_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
