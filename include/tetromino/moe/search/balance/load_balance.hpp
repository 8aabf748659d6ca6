#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../topology.hpp"  // topology, node_speeds
#include "bin_packer.hpp"      // bin_packer
#include "copy_levels.hpp"     // copy_levels

#include <algorithm>  // std::find, std::make_heap, std::max, std::min, std::pop_heap, std::push_heap, std::sort, std::swap_ranges
#include <cstddef>  // std::ptrdiff_t, std::size_t
#include <cstdint>  // std::int32_t, std::uint32_t
#include <limits>   // std::numeric_limits
#include <span>     // std::span
#include <utility>  // std::swap
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Spreads experts with copies over neighbouring GPUs of any sizes, none twice on one GPU.
class load_balancer {
 public:
  /// first_slot[gpus + 1] and speeds[gpus] (none: all alike), of the whole topology.
  explicit load_balancer(std::span<const std::uint32_t> first_slot, std::span<const double> speeds = {})
      : first_slot_(first_slot), speeds_(speeds) {}

  /// Puts `experts`, loads load[expert], into the slots of GPUs first_gpu … last_gpu − 1, writing expert_of_slot (the
  /// layer's whole row), with at most `copies` slots for further copies. Precondition: at least as many slots as
  /// experts.
  void solve(std::span<const double> load, std::span<const std::uint32_t> experts, std::size_t first_gpu,
             std::size_t last_gpu, std::span<std::int32_t> expert_of_slot, std::size_t copies = ~std::size_t{0}) {
    const std::span<const std::uint32_t> bins = first_slot_.subspan(first_gpu, last_gpu - first_gpu + 1);
    const std::size_t slots = bins.back() - bins.front();
    std::uint32_t usable_gpus = 0;
    for (std::size_t b = 0; b + 1 < bins.size(); ++b) usable_gpus += bins[b + 1] > bins[b] ? 1U : 0U;

    copies_.assign(experts.size(), 1);
    limit_.assign(experts.size(), usable_gpus);
    const bool all_slots = copies >= slots - experts.size();
    add_copies(load, experts, all_slots ? slots - experts.size() : copies);
    item_of_slot_.resize(slots);
    for (;;) {
      items_.clear();
      for (std::size_t i = 0; i < experts.size(); ++i) {
        for (std::uint32_t c = 0; c < copies_[i]; ++c) {
          items_.push_back({load[experts[i]] / copies_[i], static_cast<std::uint32_t>(i)});
        }
      }
      const std::span<const std::uint32_t> unplaced =
          packer_.pack(items_, bins, item_of_slot_, bins.size() * 4,
                       speeds_.empty() ? speeds_ : speeds_.subspan(first_gpu, bins.size() - 1));
      if (unplaced.empty()) break;
      // no bin of unequal GPUs takes that many copies of this expert: fewer of it, more of the others
      for (const std::uint32_t item : unplaced) limit_[items_[item].expert] = --copies_[items_[item].expert];
      add_copies(load, experts, unplaced.size());
    }
    for (std::size_t s = 0; s < slots; ++s) {
      const std::uint32_t item = item_of_slot_[s];
      expert_of_slot[bins.front() + s] =
          item == bin_packer::nothing ? -1 : static_cast<std::int32_t>(experts[items_[item].expert]);
    }
    for (std::size_t b = 0; all_slots && b + 1 < bins.size(); ++b) {
      fill(load, experts, expert_of_slot.subspan(bins[b], bins[b + 1] - bins[b]));
    }
    gpu_load_.assign(packer_.loads().begin(), packer_.loads().end());
    if (!speeds_.empty() && slots > experts.size()) {
      relieve(load, experts, bins, speeds_.subspan(first_gpu, bins.size() - 1), copies, expert_of_slot);
    }
  }

  /// The load that each GPU given to `solve` carries now: [last_gpu − first_gpu].
  [[nodiscard]] std::span<const double> gpu_loads() const noexcept { return gpu_load_; }

 private:
  // The rounds after which shares hardly change: while copies are added one by one, and from equal shares.
  static constexpr std::size_t few_rounds = 4, enough_rounds = 64;

  struct weighed {
    double weight;
    std::uint32_t index;
  };
  static bool below_heaviest(const weighed& a, const weighed& b) {
    return a.weight < b.weight || (a.weight == b.weight && a.index > b.index);
  }

  // Where GPUs are so unequal that slots are left over: in each, whoever carries most per copy of those not there.
  void fill(std::span<const double> load, std::span<const std::uint32_t> experts, std::span<std::int32_t> gpu) {
    for (std::int32_t& slot : gpu) {
      if (slot >= 0) continue;
      std::size_t best = experts.size();
      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (std::find(gpu.begin(), gpu.end(), static_cast<std::int32_t>(experts[i])) != gpu.end()) continue;
        if (best == experts.size() || load[experts[i]] / copies_[i] > load[experts[best]] / copies_[best]) best = i;
      }
      if (best == experts.size()) return;
      slot = static_cast<std::int32_t>(experts[best]);
      ++copies_[best];
    }
  }

  // Where GPUs differ in speed, copies that serve equal shares, as those placed so far, keep slow GPUs busy for long.
  // The other way: each expert once, then copies that take from whichever GPU is busiest, as much as that makes even.
  // Taken where it gains more, squared, than equal shares would lose by it: tokens that stay near home share about so.
  void relieve(std::span<const double> load, std::span<const std::uint32_t> experts,
               std::span<const std::uint32_t> bins, std::span<const double> speeds, std::size_t copies,
               std::span<std::int32_t> expert_of_slot) {
    const std::size_t gpus = speeds.size();
    load_.clear();
    items_.clear();
    for (std::size_t i = 0; i < experts.size(); ++i) {
      load_.push_back(load[experts[i]]);
      items_.push_back({load_[i], static_cast<std::uint32_t>(i)});
    }
    levels_.begin(load_, speeds);
    for (std::size_t g = 0; g < gpus; ++g) {
      for (std::size_t s = bins[g]; s < bins[g + 1]; ++s) {
        const auto found = std::find(experts.begin(), experts.end(), static_cast<std::uint32_t>(expert_of_slot[s]));
        if (found != experts.end()) levels_.add(static_cast<std::size_t>(found - experts.begin()), g);
      }
    }
    levels_.level(enough_rounds);
    const double before = levels_.busiest(), even_before = levels_.busiest_if_even();

    packer_.pack(items_, bins, item_of_slot_, bins.size() * 4, speeds);
    levels_.begin(load_, speeds);
    room_.assign(gpus, 0);
    for (std::size_t g = 0; g < gpus; ++g) {
      for (std::size_t s = bins[g] - bins[0]; s < bins[g + 1] - bins[0]; ++s) {
        if (item_of_slot_[s] == bin_packer::nothing) {
          ++room_[g];
        } else {
          levels_.add(item_of_slot_[s], g);
        }
      }
    }
    for (; copies > 0 && add_relief(experts.size()); --copies) levels_.level(few_rounds);
    levels_.level(enough_rounds);
    const double gained = levels_.busiest() / before, even = levels_.busiest_if_even() / even_before;
    if (!(gained * gained * std::max(even, 1.0) < 0.96)) return;
    gpu_load_.assign(levels_.gpu_loads().begin(), levels_.gpu_loads().end());
    for (std::size_t g = 0; g < gpus; ++g) {
      std::size_t slot = bins[g];
      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (levels_.find(i, g) != nullptr) expert_of_slot[slot++] = static_cast<std::int32_t>(experts[i]);
      }
      while (slot < bins[g + 1]) expert_of_slot[slot++] = -1;
    }
  }
  // One more copy where it takes most from the busiest GPU that has anything to give; false if there is none.
  bool add_relief(std::size_t experts) {
    busiest_first_.resize(room_.size());
    for (std::size_t g = 0; g < room_.size(); ++g) busiest_first_[g] = {levels_.busy(g), static_cast<std::uint32_t>(g)};
    std::sort(busiest_first_.begin(), busiest_first_.end(),
              [](const weighed& a, const weighed& b) { return below_heaviest(b, a); });
    for (const weighed& from : busiest_first_) {
      double most = -std::numeric_limits<double>::infinity();
      std::size_t expert = experts, to = 0;
      for (std::size_t e = 0; e < experts; ++e) {
        const copy_levels::copy* const here = levels_.find(e, from.index);
        if (here == nullptr) continue;
        for (std::size_t g = 0; g < room_.size(); ++g) {
          if (room_[g] == 0) continue;
          const double taken = std::min(here->share, levels_.until_even(from.index, g));
          if (taken > most && levels_.find(e, g) == nullptr) {
            most = taken;
            expert = e;
            to = g;
          }
        }
      }
      if (expert == experts) continue;
      levels_.add(expert, to);
      --room_[to];
      return true;
    }
    return false;
  }

  // One copy after the other for whoever carries most per copy and may have more.
  void add_copies(std::span<const double> load, std::span<const std::uint32_t> experts, std::size_t more) {
    heap_.clear();
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (copies_[i] < limit_[i]) {
        heap_.push_back({load[experts[i]] / copies_[i], static_cast<std::uint32_t>(i)});
      }
    }
    std::make_heap(heap_.begin(), heap_.end(), below_heaviest);
    for (; more > 0 && !heap_.empty(); --more) {
      std::pop_heap(heap_.begin(), heap_.end(), below_heaviest);
      weighed& top = heap_.back();
      if (++copies_[top.index] == limit_[top.index]) {
        heap_.pop_back();
        continue;
      }
      top.weight = load[experts[top.index]] / copies_[top.index];
      std::push_heap(heap_.begin(), heap_.end(), below_heaviest);
    }
  }

  std::span<const std::uint32_t> first_slot_;
  std::span<const double> speeds_;
  bin_packer packer_;
  std::vector<std::uint32_t> copies_, limit_;  // [experts]
  std::vector<pack_item> items_;
  std::vector<std::uint32_t> item_of_slot_;
  std::vector<weighed> heap_;
  std::vector<double> gpu_load_;  // [last_gpu − first_gpu]

  copy_levels levels_;
  std::vector<double> load_;            // [experts]
  std::vector<std::size_t> room_;       // [gpus] slots
  std::vector<weighed> busiest_first_;  // [gpus]
};

/// Exchanges whole GPUs, of equally many slots and one speed, between nodes while that makes the busiest node less so.
/// What GPUs carry stays as it was. gpu_load[gpus] is permuted with them; expert_of_slot is the layer's row.
inline void level_nodes(const topology& t, std::vector<double>& gpu_load, std::span<std::int32_t> expert_of_slot) {
  const std::vector<double> speed = node_speeds(t);
  std::vector<double> node_load(t.nodes(), 0.0);
  for (std::size_t g = 0; g < t.gpus(); ++g) node_load[t.node_of_gpu(g)] += gpu_load[g];
  const auto busy = [&](std::size_t n, double load) { return speed[n] > 0 ? load / speed[n] : 0.0; };
  for (std::size_t n = 0; n < 2 * t.gpus(); ++n) {
    std::size_t heavy = 0;
    for (std::size_t m = 1; m < t.nodes(); ++m) {
      if (busy(m, node_load[m]) > busy(heavy, node_load[heavy])) heavy = m;
    }
    double best = busy(heavy, node_load[heavy]);
    best -= 1e-4 * best;
    std::size_t mine = t.gpus(), theirs = t.gpus();
    for (std::size_t a = t.first_gpu(heavy); a < t.first_gpu(heavy) + t.gpus_on_node(heavy); ++a) {
      for (std::size_t b = 0; b < t.gpus(); ++b) {
        const std::size_t other = t.node_of_gpu(b);
        if (other == heavy || t.slots_on_gpu(a) != t.slots_on_gpu(b) || t.speed(a) != t.speed(b)) continue;
        const double shift = gpu_load[a] - gpu_load[b];
        const double then = std::max(busy(heavy, node_load[heavy] - shift), busy(other, node_load[other] + shift));
        if (then < best) {
          best = then;
          mine = a;
          theirs = b;
        }
      }
    }
    if (mine == t.gpus()) return;
    const double shift = gpu_load[mine] - gpu_load[theirs];
    node_load[heavy] -= shift;
    node_load[t.node_of_gpu(theirs)] += shift;
    std::swap(gpu_load[mine], gpu_load[theirs]);
    const auto first = expert_of_slot.begin();
    std::swap_ranges(first + static_cast<std::ptrdiff_t>(t.first_slot(mine)),
                     first + static_cast<std::ptrdiff_t>(t.first_slot(mine) + t.slots_on_gpu(mine)),
                     first + static_cast<std::ptrdiff_t>(t.first_slot(theirs)));
  }
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
