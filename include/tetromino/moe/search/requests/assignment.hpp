#pragma once

#include "../../../detail/macros_off.hpp"

#include "../random.hpp"  // search_random

#include <algorithm>  // std::max, std::min, std::sort
#include <cmath>      // std::ceil
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int64_t, std::uint32_t, std::uint64_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span
#include <utility>    // std::swap
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Requests to be spread over nodes: scores[requests, nodes] (more is better), tokens[requests], and the tokens that
/// each node may take, below 0 for nodes that serve nobody. One node serves at least.
struct assignment_problem {
  std::span<const std::int64_t> scores;
  std::span<const std::uint64_t> tokens;
  std::span<const std::int64_t> room;

  [[nodiscard]] std::size_t nodes() const noexcept { return room.size(); }
  [[nodiscard]] bool serves(std::size_t node) const { return room[node] >= 0; }
  [[nodiscard]] bool fits(std::size_t node, std::uint64_t all_tokens) const {
    return serves(node) && all_tokens <= static_cast<std::uint64_t>(room[node]);
  }
  [[nodiscard]] std::int64_t score(std::size_t request, std::size_t node) const {
    return scores[request * nodes() + node];
  }
};

/// Room of each node when none may take more than `budget` × its share (by its speed, see node_speeds), and at least so
/// much that whole requests of the given size fit. −1 for nodes of speed 0.
[[nodiscard]] inline std::vector<std::int64_t> token_room(std::uint64_t tokens, std::uint64_t largest,
                                                          std::span<const double> speeds, double budget) {
  double all = 0;
  for (const double s : speeds) all += s;
  std::vector<std::int64_t> out, whole;
  std::uint64_t sum = 0;
  for (const double s : speeds) {
    const double share = static_cast<double>(tokens) * s / all;
    const double room = std::min(share * budget, 0x1p62);
    out.push_back(s > 0 ? static_cast<std::int64_t>(room) : -1);
    whole.push_back(out.back());
    if (largest == 0 || !(s > 0)) continue;
    sum +=
        static_cast<std::uint64_t>(out.back()) / largest * largest;  // what fits in whole requests of the largest size
    // from the share itself: one of half a token is rounded up too
    whole.back() =
        static_cast<std::int64_t>(std::ceil(room / static_cast<double>(largest))) * static_cast<std::int64_t>(largest);
  }
  return sum >= tokens ? out : whole;
}

/// Spreads requests: first those for which the node matters most, each to its best node with room; then exchanges while
/// they help. A request that fits nowhere goes where most room is left. Lower numbers win among equals.
class request_assigner {
 public:
  void assign(const assignment_problem& p, std::span<std::uint32_t> sources) {
    const std::size_t nodes = p.nodes(), requests = sources.size();
    used_.assign(nodes, 0);
    order_.resize(requests);
    regret_.resize(requests);
    for (std::size_t r = 0; r < requests; ++r) {
      std::int64_t best = std::numeric_limits<std::int64_t>::min(), second = best;
      for (std::size_t n = 0; n < nodes; ++n) {
        if (!p.serves(n)) continue;
        const std::int64_t s = p.score(r, n);
        second = s > best ? best : std::max(second, s);
        best = std::max(best, s);
      }
      regret_[r] = second > std::numeric_limits<std::int64_t>::min() ? best - second : 0;
      order_[r] = static_cast<std::uint32_t>(r);
    }
    std::sort(order_.begin(), order_.end(), [&](std::uint32_t a, std::uint32_t b) {
      return regret_[a] != regret_[b] ? regret_[a] > regret_[b] : a < b;
    });
    for (const std::uint32_t r : order_) {
      std::size_t best = nodes;
      for (std::size_t n = 0; n < nodes; ++n) {
        if (p.fits(n, used_[n] + p.tokens[r]) && (best == nodes || p.score(r, n) > p.score(r, best))) best = n;
      }
      if (best == nodes) best = roomiest(p);
      used_[best] += p.tokens[r];
      sources[r] = static_cast<std::uint32_t>(best);
    }
    improve(p, sources);
  }

  /// Moves and exchanges requests while that raises the score.
  void improve(const assignment_problem& p, std::span<std::uint32_t> sources) {
    count(p, sources);
    for (std::size_t pass = 0; pass < 60; ++pass) {
      bool better = false;
      for (std::size_t a = 0; a < p.nodes(); ++a) {
        for (std::size_t b = a + 1; b < p.nodes(); ++b) better = between(p, sources, a, b) || better;
      }
      if (!better) return;
    }
  }

  /// Random moves and exchanges, accepted as at a temperature.
  void shake(const assignment_problem& p, std::span<std::uint32_t> sources, search_random& random,
             std::int64_t temperature, std::size_t proposals) {
    count(p, sources);
    const std::size_t requests = sources.size(), nodes = p.nodes();
    for (std::size_t i = 0; i < proposals; ++i) {
      const std::size_t r = random.below(requests), other = random.below(requests + nodes);
      const std::uint32_t a = sources[r];
      const std::uint32_t b = other < requests ? sources[other] : static_cast<std::uint32_t>(other - requests);
      if (a == b) continue;
      std::int64_t loss = p.score(r, a) - p.score(r, b);
      std::uint64_t back = 0;
      if (other < requests) {
        loss += p.score(other, b) - p.score(other, a);
        back = p.tokens[other];
      }
      if (loss > random.exponential(temperature)) continue;
      if (!fits(p, a, b, p.tokens[r], back)) continue;
      used_[a] += back - p.tokens[r];
      used_[b] += p.tokens[r] - back;
      sources[r] = b;
      if (other < requests) sources[other] = a;
    }
  }

 private:
  struct mover {
    std::int64_t gain;
    std::uint32_t request;
  };

  void count(const assignment_problem& p, std::span<const std::uint32_t> sources) {
    used_.assign(p.nodes(), 0);
    for (std::size_t r = 0; r < sources.size(); ++r) used_[sources[r]] += p.tokens[r];
  }
  [[nodiscard]] std::size_t roomiest(const assignment_problem& p) const {
    std::size_t best = p.nodes();
    const auto left = [&](std::size_t n) { return p.room[n] - static_cast<std::int64_t>(used_[n]); };
    for (std::size_t n = 0; n < p.nodes(); ++n) {
      if (p.serves(n) && (best == p.nodes() || left(n) > left(best))) best = n;
    }
    return best;
  }
  // Whether `there` tokens may go from a to b and `back` return: within room, or no worse than it is.
  [[nodiscard]] bool fits(const assignment_problem& p, std::size_t a, std::size_t b, std::uint64_t there,
                          std::uint64_t back) const {
    return p.serves(b) && (there <= back || p.fits(b, used_[b] + there - back)) &&
           (back <= there || p.fits(a, used_[a] + back - there));
  }

  void list_movers(const assignment_problem& p, std::span<const std::uint32_t> sources, std::size_t from,
                   std::size_t to, std::vector<mover>& out) const {
    out.clear();
    for (std::size_t r = 0; r < sources.size(); ++r) {
      if (sources[r] == from) out.push_back({p.score(r, to) - p.score(r, from), static_cast<std::uint32_t>(r)});
    }
    std::sort(out.begin(), out.end(), [](const mover& x, const mover& y) {
      return x.gain != y.gain ? x.gain > y.gain : x.request < y.request;
    });
  }

  bool between(const assignment_problem& p, std::span<std::uint32_t> sources, std::size_t a, std::size_t b) {
    list_movers(p, sources, a, b, there_);
    list_movers(p, sources, b, a, back_);
    bool better = false;
    const auto move = [&](std::vector<mover>& from_list, std::size_t from, std::size_t to) {
      for (mover& m : from_list) {
        if (m.gain <= 0) break;
        if (!fits(p, from, to, p.tokens[m.request], 0)) continue;
        used_[from] -= p.tokens[m.request];
        used_[to] += p.tokens[m.request];
        sources[m.request] = static_cast<std::uint32_t>(to);
        m.gain = std::numeric_limits<std::int64_t>::min() / 4;
        better = true;
      }
    };
    move(there_, a, b);
    move(back_, b, a);
    for (const mover& x : there_) {
      if (sources[x.request] != a) continue;
      for (mover& y : back_) {
        if (sources[y.request] != b) continue;
        if (x.gain + y.gain <= 0) break;
        if (!fits(p, a, b, p.tokens[x.request], p.tokens[y.request])) continue;
        used_[a] += p.tokens[y.request] - p.tokens[x.request];
        used_[b] += p.tokens[x.request] - p.tokens[y.request];
        std::swap(sources[x.request], sources[y.request]);
        better = true;
        break;
      }
    }
    return better;
  }

  std::vector<std::uint64_t> used_;
  std::vector<std::uint32_t> order_;
  std::vector<std::int64_t> regret_;
  std::vector<mover> there_, back_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
