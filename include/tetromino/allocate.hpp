#pragma once

#include "detail/macros_off.hpp"

#include "detail/float_state.hpp"  // default_float_state
#include "error.hpp"               // error, result

#include <algorithm>  // std::max, std::min, std::sort
#include <cmath>      // std::isfinite
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t, std::uint64_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE {

/// One way to store a matrix, or several matrices that must share a recipe: a recipe, or the matrix as it is.
struct allocation_candidate {
  std::uint64_t bits = 0;  ///< that it takes
  double error = 0;        ///< what it loses, such as tr(D H D^T) of errors D and input moments H; sums over matrices
};

/// A candidate for each matrix.
struct allocation {
  std::vector<std::size_t> chosen{};  ///< [matrices] number of its candidate
  std::uint64_t bits = 0;             ///< of all matrices
  double error = 0;                   ///< of all matrices
};

/// What a caller may choose about the search.
struct allocate_options {
  std::size_t max_states = std::size_t{1} << 27;  ///< partial choices held, 8 bytes each, before the search gives up
};

namespace detail::inline TETROMINO_ISA {

/// The multiple-choice knapsack, by dynamic programming over partial choices that nothing dominates, matrix after
/// matrix, without those that cannot be part of a best choice: Lagrange's bound, with the multiplier of the problem's
/// linear relaxation, says so. (Nemhauser and Ullmann 1969; the relaxation as in Sinha and Zoltners 1979; Pisinger
/// 1995)
class knapsack_search {
 public:
  knapsack_search(std::span<const std::vector<allocation_candidate>> matrices, std::uint64_t budget,
                  std::size_t max_states)
      : room_(budget), max_states_(max_states) {
    for (const auto& candidates : matrices) {
      ways_.push_back(undominated(candidates));
      room_ -= candidates[ways_.back().front().number].bits;
    }
    relax();
  }

  /// False if the states ran out.
  [[nodiscard]] bool run() {
    // Most of what the first bound leaves cannot win: a small share of the gap is tried first.
    for (double share = gap_ / 256;; share = std::min(4 * share, gap_)) {
      if (!descend(std::min(share, gap_))) return false;
      if (best_error_ <= least_ + share + slack_ || share >= gap_) return true;
      gap_ = std::min(gap_, std::max(0.0, best_error_ - least_));
    }
  }

  [[nodiscard]] const std::vector<std::size_t>& chosen() const noexcept { return chosen_; }

 private:
  struct way {
    std::uint64_t extra = 0;  // bits beyond those of the smallest way
    double error = 0;
    std::uint32_t number = 0;  // of the candidate
    double penalty = 0;        // error + multiplier * extra, beyond the least of this matrix
  };
  struct state {
    std::uint64_t extra = 0;
    double error = 0, penalty = 0;
  };
  struct origin {
    std::uint32_t state = 0, way = 0;  // of the matrix after this one; of this one
  };

  /// In the order of bits, each with less error than those before; of equals, the first candidate.
  static std::vector<way> undominated(const std::vector<allocation_candidate>& candidates) {
    std::vector<std::uint32_t> order;
    for (std::uint32_t c = 0; c < candidates.size(); ++c) order.push_back(c);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      const auto &x = candidates[a], &y = candidates[b];
      return x.bits != y.bits ? x.bits < y.bits : x.error != y.error ? x.error < y.error : a < b;
    });
    std::vector<way> out;
    for (const std::uint32_t c : order) {
      const auto& one = candidates[c];
      if (out.empty() || one.error < out.back().error)
        out.push_back({one.bits - candidates[order[0]].bits, one.error, c});
    }
    return out;
  }

  struct step {
    std::size_t matrix = 0, from = 0, to = 0;
    double gain = 0;  // error less for each bit more
  };
  static double gain_of(const way& a, const way& b) {
    return (a.error - b.error) / static_cast<double>(b.extra - a.extra);
  }

  /// The linear relaxation, whose ways lie on each matrix's convex hull: the multiplier, the least error and the gap to
  /// that of a choice which keeps the budget.
  void relax() {
    std::vector<step> steps;
    for (std::size_t m = 0; m < ways_.size(); ++m) {
      const auto& ways = ways_[m];
      std::vector<std::size_t> hull;
      for (std::size_t w = 0; w < ways.size(); ++w) {
        while (hull.size() > 1 &&
               gain_of(ways[hull[hull.size() - 2]], ways[hull.back()]) <= gain_of(ways[hull.back()], ways[w])) {
          hull.pop_back();
        }
        hull.push_back(w);
      }
      for (std::size_t i = 1; i < hull.size(); ++i) {
        steps.push_back({m, hull[i - 1], hull[i], gain_of(ways[hull[i - 1]], ways[hull[i]])});
      }
    }
    std::sort(steps.begin(), steps.end(), [](const step& a, const step& b) {
      return a.gain != b.gain ? a.gain > b.gain : a.matrix != b.matrix ? a.matrix < b.matrix : a.from < b.from;
    });
    std::vector<std::size_t> at(ways_.size(), 0);
    std::uint64_t room = room_;
    double multiplier = 0;  // of the first step without room
    for (const step& s : steps) {
      if (at[s.matrix] != s.from) continue;
      const std::uint64_t more = ways_[s.matrix][s.to].extra - ways_[s.matrix][s.from].extra;
      if (more <= room) {
        room -= more;
        at[s.matrix] = s.to;
      } else if (multiplier == 0) {
        multiplier = s.gain;
      }
    }
    double found = 0, least = 0;
    for (std::size_t m = 0; m < ways_.size(); ++m) {
      const auto with_penalty = [&](const way& w) { return w.error + multiplier * static_cast<double>(w.extra); };
      double smallest = std::numeric_limits<double>::infinity();
      for (const way& w : ways_[m]) smallest = std::min(smallest, with_penalty(w));
      for (way& w : ways_[m]) w.penalty = with_penalty(w) - smallest;
      least += smallest;
      found += ways_[m][at[m]].error;
    }
    const double price = multiplier * static_cast<double>(room_);
    least_ = least - price;
    gap_ = std::max(0.0, found - least_);
    // what sums in double may be off by
    slack_ = 0x1p-50 * static_cast<double>(ways_.size() + 4) * (least + price);
  }

  /// Looks for the best of the choices whose penalties sum to `limit` at most. False if the states ran out.
  [[nodiscard]] bool descend(double limit) {
    std::vector<state> states(1), next;
    std::vector<std::vector<origin>> origins(ways_.size());
    std::size_t held = 0;
    for (std::size_t m = ways_.size(); m-- > 0;) {  // the last first: so ties are decided by the first matrix
      const auto& ways = ways_[m];
      std::vector<std::size_t> cursor(ways.size(), 0);
      next.clear();
      for (;;) {
        const std::size_t w = smallest(ways, states, cursor);
        if (w == ways.size()) break;
        const std::size_t s = cursor[w]++;
        const state made = joined(states[s], ways[w]);
        if (made.extra > room_ || made.penalty > limit + slack_) continue;
        if (!next.empty() && made.error >= next.back().error) continue;
        if (++held > max_states_ || s > std::numeric_limits<std::uint32_t>::max()) return false;
        next.push_back(made);
        origins[m].push_back({static_cast<std::uint32_t>(s), static_cast<std::uint32_t>(w)});
      }
      if (next.empty()) return true;  // nothing within the limit
      states.swap(next);
    }
    best_error_ = states.back().error;
    chosen_.clear();
    std::size_t s = states.size() - 1;
    for (std::size_t m = 0; m < ways_.size(); ++m) {
      const origin from = origins[m][s];
      chosen_.push_back(ways_[m][from.way].number);
      s = from.state;
    }
    return true;
  }

  static state joined(const state& s, const way& w) {
    return {s.extra + w.extra, s.error + w.error, s.penalty + w.penalty};
  }

  /// The way whose next state has the fewest bits, then the least error, then the first candidate.
  static std::size_t smallest(const std::vector<way>& ways, const std::vector<state>& states,
                              const std::vector<std::size_t>& cursor) {
    std::size_t best = ways.size();
    state best_state;
    for (std::size_t w = 0; w < ways.size(); ++w) {
      if (cursor[w] == states.size()) continue;
      const state one = joined(states[cursor[w]], ways[w]);
      const bool is_first =
          best == ways.size() || one.extra < best_state.extra ||
          (one.extra == best_state.extra &&
           (one.error < best_state.error || (one.error == best_state.error && ways[w].number < ways[best].number)));
      if (!is_first) continue;
      best = w;
      best_state = one;
    }
    return best;
  }

  std::vector<std::vector<way>> ways_;
  std::uint64_t room_;  // bits beyond those of the smallest ways
  std::size_t max_states_;
  double least_ = 0;  // no choice has less error
  double gap_ = 0;    // from there to the least error that was found
  double slack_ = 0;
  double best_error_ = std::numeric_limits<double>::infinity();
  std::vector<std::size_t> chosen_;
};

/// The fewest bits that candidates can take. Fails where one is no candidate.
inline result<std::uint64_t> least_bits(std::span<const std::vector<allocation_candidate>> matrices) {
  constexpr std::uint64_t most = std::uint64_t{1} << 63;
  std::uint64_t least = 0, largest = 0;
  for (std::size_t m = 0; m < matrices.size(); ++m) {
    if (matrices[m].empty()) {
      return error(errc::invalid_argument, {"allocate: expected a candidate for each matrix, got none for matrix ", m});
    }
    std::uint64_t smallest = most, highest = 0;
    for (std::size_t c = 0; c < matrices[m].size(); ++c) {
      const auto& [bits, lost] = matrices[m][c];
      if (!std::isfinite(lost) || lost < 0) {
        return error(errc::invalid_argument, {"allocate: expected finite errors of at least 0, got ", lost,
                                              " for candidate ", c, " of matrix ", m});
      }
      smallest = std::min(smallest, bits);
      highest = std::max(highest, bits);
    }
    if (highest >= most - largest) {
      return error(errc::invalid_argument,
                   {"allocate: expected fewer than 2^63 bits in all, got more with matrix ", m});
    }
    largest += highest;
    least += smallest;
  }
  return least;
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Chooses a candidate for each matrix so that the sum of errors is least and the sum of bits at most `budget`: the
/// exact optimum (multiple-choice knapsack), the same on every machine. `matrices` [matrices][candidates] need not have
/// the same number of candidates; those that must share a recipe are one entry, with the sums of their bits and errors.
/// Of choices with the same error the one of fewest bits is taken, of those the first in the order of candidates,
/// matrix by matrix; errors are summed in double, from the last matrix to the first. Time is candidates x states, with
/// at most matrices x (1 + (budget - least bits) / g) states where all differences of bits are multiples of g, and far
/// fewer in practice: 12,000 matrices with four candidates take seconds. Errors: infeasible for a budget below the
/// least possible, which the message names; invalid_argument for a matrix without candidates, for errors that are
/// negative or not finite, for 2^63 bits or more in all, and for more states than `max_states`.
[[nodiscard]] inline result<allocation> try_allocate(std::span<const std::vector<allocation_candidate>> matrices,
                                                     std::uint64_t budget, const allocate_options& options = {}) {
  const detail::default_float_state usual;
  const auto least = detail::least_bits(matrices);
  if (!least) return least.error();
  if (budget < *least) {
    return error(errc::infeasible,
                 {"allocate: expected a budget of at least ", *least, " bits, the least possible, got ", budget});
  }
  detail::knapsack_search search(matrices, budget, options.max_states);
  if (!search.run()) {
    return error(errc::invalid_argument,
                 {"allocate: expected to end within ", options.max_states, " states, and did not"});
  }
  allocation out{search.chosen()};
  for (std::size_t m = matrices.size(); m-- > 0;) {
    out.bits += matrices[m][out.chosen[m]].bits;
    out.error += matrices[m][out.chosen[m]].error;
  }
  return out;
}

/// try_allocate, throwing its error.
[[nodiscard]] inline allocation allocate(std::span<const std::vector<allocation_candidate>> matrices,
                                         std::uint64_t budget, const allocate_options& options = {}) {
  return try_allocate(matrices, budget, options).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
