#pragma once

#include "../detail/macros_off.hpp"

#include "../config.hpp"  // rounded
#include "../error.hpp"   // tetromino::result, tetromino::error
#include "placement.hpp"  // replica_index
#include "topology.hpp"   // topology
#include "ids.hpp"        // id_array, no_expert

#include <algorithm>  // std::copy, std::copy_n, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::uint16_t, std::uint32_t
#include <iterator>   // std::data, std::size
#include <limits>     // std::numeric_limits
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What an expert_call holds when it calls nobody.
inline constexpr std::uint32_t no_slot = 0xFFFF'FFFF;

/// A row calls the expert in a slot, whose output counts with a weight. Plain bytes, made to travel.
struct expert_call {
  std::uint32_t slot = no_slot;
  float weight = 0;

  friend TETROMINO_ABI bool operator==(const expert_call&, const expert_call&) = default;
};

/// How often a row travels to one rank.
enum class row_copies : std::uint8_t {
  per_rank,    ///< once, with all its calls there; the rank answers with their weighted sum
  per_expert,  ///< once for each call, so that answers are added in the order of the calls, wherever experts are
};

/// Through which rank of another node a row enters it, when it is sent once per node and fanned out there.
enum class entry_rule : std::uint8_t {
  same_local_number,  ///< the rank with the sender's number inside its node: all ranks carry traffic (rails)
  leader,             ///< the node's first rank
};

inline namespace TETROMINO_ISA {

/// The calls of tokens in one layer: for ids, weights and serving GPUs [tokens, k] (a replica_chooser picks the GPUs),
/// writes calls[tokens, k]; −1 (or the largest number of an unsigned type, such as no_expert) calls nobody.
/// Precondition: equal lengths, and each GPU holds a copy of its expert.
template <id_array Ids = std::span<const std::uint16_t>>
void make_calls(const replica_index& where, const topology& t, std::size_t layer, const Ids& ids,
                std::span<const float> weights, std::span<const std::uint32_t> gpus, std::span<expert_call> calls) {
  TETROMINO_EXPECTS(std::size(ids) == weights.size() && weights.size() == gpus.size() && gpus.size() == calls.size(),
                    "make_calls: an id, a weight and a GPU for each call", std::size(ids), weights.size(), gpus.size(),
                    calls.size());
  for (std::size_t i = 0; i < calls.size(); ++i) {
    calls[i] = {no_slot, weights[i]};
    const std::uint32_t expert = detail::to_id(std::data(ids)[i], where.experts());
    if (expert == no_expert) continue;
    TETROMINO_EXPECTS(expert != detail::no_id, "make_calls: expert number out of range", std::data(ids)[i],
                      where.experts());
    for (const std::uint32_t slot : where.slots_of(layer, expert)) {
      if (t.gpu_of_slot(slot) == gpus[i]) {
        calls[i].slot = slot;
        break;
      }
    }
    TETROMINO_EXPECTS(calls[i].slot != no_slot, "make_calls: the serving GPU holds a copy of the expert");
  }
}

/// slot → the rank that holds it: the last or only hop of a dispatch. Writes ranks[slots].
inline void ranks_of_slots(const topology& t, std::span<std::uint32_t> ranks) {
  TETROMINO_EXPECTS(ranks.size() == t.slots(), "ranks_of_slots: a rank for each slot", ranks.size(), t.slots());
  for (std::size_t s = 0; s < ranks.size(); ++s) ranks[s] = static_cast<std::uint32_t>(t.gpu_of_slot(s));
}

/// slot → the rank where a row of `from` enters the slot's node, which is `from` itself on its own node: the first of
/// two hops. Ranks without slots, which may be dead, are passed over. Writes ranks[slots].
inline void entry_ranks(const topology& t, std::size_t from, entry_rule rule, std::span<std::uint32_t> ranks) {
  TETROMINO_EXPECTS(ranks.size() == t.slots() && from < t.gpus(), "entry_ranks: a rank for each slot, `from` a GPU",
                    ranks.size(), t.slots(), from, t.gpus());
  const detail::live_gpus live(t);
  for (std::size_t s = 0; s < ranks.size(); ++s) {
    const std::size_t node = t.node_of_slot(s);
    const std::uint32_t entry = rule == entry_rule::leader ? live.of(node)[0] : live.counterpart(from, node);
    ranks[s] = node == t.node_of_gpu(from) ? static_cast<std::uint32_t>(from) : entry;
  }
}

}  // namespace TETROMINO_ISA

/// One hop of a dispatch as one rank sees it: which rows it sends where, what it receives, how received rows meet the
/// experts, and the way back. A plan moves nothing itself; anything that is row-wise (activations of any type, calls,
/// tags) travels with the same counts and offsets, which count rows and are what MPI_Alltoallv or a group of ncclSend
/// and ncclRecv need.
///
///   send side     plan_send(calls): send_rows [sent] permutes rows into the send buffer, grouped by rank;
///                 send_calls [sent, k]; send_counts and send_offsets [ranks]
///   receive side  plan_receive(counts): receive_offsets [ranks], receive_calls [received, k] for the exchange to fill
///   experts       group_by_expert(): expert_offsets [slots + 1], expert_rows [pairs] = the received row of each pair
///   back          add_expert_outputs: [pairs] → [received]; the exchange, reversed: → [sent]; add_copies: → [rows]
///
/// For one copy per node, two plans follow each other: what the first receives, rows and calls, the second sends on.
/// Memory is kept from batch to batch: none is allocated for a batch that is no larger than an earlier one.
class dispatch_plan {
 public:
  TETROMINO_ABI dispatch_plan() = default;
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI dispatch_plan(const dispatch_plan&) = default;
  TETROMINO_ABI dispatch_plan(dispatch_plan&&) noexcept = default;
  TETROMINO_ABI dispatch_plan& operator=(const dispatch_plan&) = default;
  TETROMINO_ABI dispatch_plan& operator=(dispatch_plan&&) noexcept = default;
  /// For rows of `calls_per_row` calls among `ranks` ranks.
  TETROMINO_ABI dispatch_plan(std::size_t ranks, std::size_t calls_per_row)
      : calls_per_row_(calls_per_row),
        send_counts_(ranks),
        send_offsets_(ranks),
        receive_counts_(ranks),
        receive_offsets_(ranks) {
    TETROMINO_EXPECTS(ranks > 0 && calls_per_row > 0, "dispatch_plan: at least one rank and one call per row", ranks,
                      calls_per_row);
  }

  /// Plans what this rank sends: calls[rows, calls_per_row] of its rows, each to rank_of_slot[slot] (calls of no_slot
  /// are skipped). Within a rank's part of the send buffer, rows ascend. Errors: a slot or a rank out of range, lengths
  /// that do not fit, 2^31 rows or more.
  [[nodiscard]] TETROMINO_ABI result<void> try_plan_send(std::span<const expert_call> calls,
                                                         std::span<const std::uint32_t> rank_of_slot,
                                                         row_copies copies = row_copies::per_rank) {
    const std::size_t k = calls_per_row_;
    if (calls.size() % k != 0 || calls.size() > std::numeric_limits<std::int32_t>::max()) {
      return error(errc::shape_mismatch,
                   {"dispatch: expected fewer than 2^31 calls, ", k, " for each row, got ", calls.size()});
    }
    position_of_call_.resize(calls.size());
    std::fill(send_counts_.begin(), send_counts_.end(), 0);
    for (std::size_t i = 0; i < calls.size(); ++i) {
      const std::uint32_t slot = calls[i].slot;
      position_of_call_[i] = nowhere;
      if (slot == no_slot) continue;
      if (slot >= rank_of_slot.size() || rank_of_slot[slot] >= ranks()) {
        return error(errc::invalid_argument, {"dispatch: expected slots below ", rank_of_slot.size(),
                                              " on ranks below ", ranks(), ", got slot ", slot, " for row ", i / k});
      }
      if (copies == row_copies::per_expert || earlier_call_to(calls, rank_of_slot, i) == i) {
        ++send_counts_[rank_of_slot[slot]];
      }
    }
    sent_ = offsets_of(send_counts_, send_offsets_);
    next_.assign(send_offsets_.begin(), send_offsets_.end());
    send_rows_.resize(sent_);
    send_calls_.assign(sent_ * k, expert_call{});
    for (std::size_t i = 0; i < calls.size(); ++i) {
      if (calls[i].slot == no_slot) continue;
      const std::size_t first = copies == row_copies::per_expert ? i : earlier_call_to(calls, rank_of_slot, i);
      if (first == i) {
        position_of_call_[i] = static_cast<std::uint32_t>(next_[rank_of_slot[calls[i].slot]]++);
        send_rows_[position_of_call_[i]] = static_cast<std::uint32_t>(i / k);
      }
      // later calls to the same rank fill the copy's calls, and are not counted as copies
      expert_call* const wanted = send_calls_.data() + position_of_call_[first] * k;
      std::size_t free = 0;
      while (wanted[free].slot != no_slot) ++free;
      wanted[free] = calls[i];
    }
    return {};
  }
  TETROMINO_ABI void plan_send(std::span<const expert_call> calls, std::span<const std::uint32_t> rank_of_slot,
                               row_copies copies = row_copies::per_rank) {
    try_plan_send(calls, rank_of_slot, copies).value();
  }

  /// Says how many rows come from each rank: counts[ranks], the send_counts of the others for this rank.
  /// Errors: a wrong number of counts, a negative one, 2^31 rows or more.
  [[nodiscard]] TETROMINO_ABI result<void> try_plan_receive(std::span<const std::int32_t> counts) {
    if (auto ok = check_counts(counts, "from"); !ok) return ok;
    std::copy(counts.begin(), counts.end(), receive_counts_.begin());
    receive_calls_.resize(offsets_of(receive_counts_, receive_offsets_) * calls_per_row_);
    return {};
  }
  TETROMINO_ABI void plan_receive(std::span<const std::int32_t> counts) { try_plan_receive(counts).value(); }

  /// In place of plan_send where rows are grouped elsewhere, as on a GPU: counts[ranks] says how many rows this rank
  /// sends to each. The plan then has counts and offsets alone: no rows and no calls. Errors: as try_plan_receive.
  [[nodiscard]] TETROMINO_ABI result<void> try_plan_send_counts(std::span<const std::int32_t> counts) {
    if (auto ok = check_counts(counts, "to"); !ok) return ok;
    std::copy(counts.begin(), counts.end(), send_counts_.begin());
    sent_ = offsets_of(send_counts_, send_offsets_);
    position_of_call_.clear();
    send_rows_.clear();
    send_calls_.clear();
    return {};
  }
  TETROMINO_ABI void plan_send_counts(std::span<const std::int32_t> counts) { try_plan_send_counts(counts).value(); }

  /// Groups the received rows by expert, for slots first_slot … first_slot + slots − 1, from receive_calls, which the
  /// exchange has filled. Within an expert, rows come in the order in which they were received: by sending rank, and as
  /// the sender had them. Errors: a call for another slot.
  [[nodiscard]] TETROMINO_ABI result<void> try_group_by_expert(std::size_t first_slot, std::size_t slots) {
    expert_offsets_.assign(slots + 1, 0);
    for (std::size_t i = 0; i < receive_calls_.size(); ++i) {
      const std::uint32_t slot = receive_calls_[i].slot;
      if (slot == no_slot) continue;
      if (slot < first_slot || slot - first_slot >= slots) {
        return error(errc::invalid_argument,
                     {"dispatch: expected calls for slots ", first_slot, " to ", first_slot + slots,
                      " (excluded), got slot ", slot, " in received row ", i / calls_per_row_});
      }
      ++expert_offsets_[slot - first_slot + 1];
    }
    for (std::size_t s = 0; s < slots; ++s) expert_offsets_[s + 1] += expert_offsets_[s];
    next_.assign(expert_offsets_.begin(), expert_offsets_.end() - 1);
    expert_rows_.resize(expert_offsets_.back());
    pair_of_call_.resize(receive_calls_.size());
    for (std::size_t i = 0; i < receive_calls_.size(); ++i) {
      pair_of_call_[i] = nowhere;
      if (receive_calls_[i].slot == no_slot) continue;
      pair_of_call_[i] = static_cast<std::uint32_t>(next_[receive_calls_[i].slot - first_slot]++);
      expert_rows_[pair_of_call_[i]] = static_cast<std::uint32_t>(i / calls_per_row_);
    }
    return {};
  }
  TETROMINO_ABI void group_by_expert(std::size_t first_slot, std::size_t slots) {
    try_group_by_expert(first_slot, slots).value();
  }

  /// Adds the outputs of experts up to one answer per received row: out[received, width] = Σ weight · y[pairs, width],
  /// in the order of the row's calls. Products are rounded before they are added, so that for two calls per row the
  /// sum is the same whether this rank adds them or the one that gets the answers.
  TETROMINO_ABI void add_expert_outputs(std::span<const float> y, std::span<float> out, std::size_t width) const {
    TETROMINO_EXPECTS(y.size() == expert_rows_.size() * width && out.size() == received() * width,
                      "add_expert_outputs: y[pairs, width] and out[received, width]", y.size(),
                      expert_rows_.size() * width, out.size(), received() * width);
    for (std::size_t row = 0; row < received(); ++row) {
      float* const sum = out.data() + row * width;
      std::fill(sum, sum + width, 0.0f);
      for (std::size_t i = row * calls_per_row_; i < (row + 1) * calls_per_row_; ++i) {
        if (pair_of_call_[i] == nowhere) continue;
        const float* const from = y.data() + pair_of_call_[i] * width;
        const float weight = receive_calls_[i].weight;
        for (std::size_t c = 0; c < width; ++c) sum[c] += tetromino::detail::rounded(weight * from[c]);
      }
    }
  }

  /// Adds the answers up, one per copy sent, back to the rows that this rank started from: out[rows, width] = Σ
  /// answers[sent, width], in the order of the row's calls.
  TETROMINO_ABI void add_copies(std::span<const float> answers, std::span<float> out, std::size_t width) const {
    TETROMINO_EXPECTS(answers.size() == sent() * width && out.size() == rows() * width,
                      "add_copies: answers[sent, width] and out[rows, width]", answers.size(), sent() * width,
                      out.size(), rows() * width);
    for (std::size_t row = 0; row < rows(); ++row) {
      float* const sum = out.data() + row * width;
      std::fill(sum, sum + width, 0.0f);
      for (std::size_t i = row * calls_per_row_; i < (row + 1) * calls_per_row_; ++i) {
        if (position_of_call_[i] == nowhere) continue;
        const float* const from = answers.data() + position_of_call_[i] * width;
        for (std::size_t c = 0; c < width; ++c) sum[c] += from[c];
      }
    }
  }

  [[nodiscard]] TETROMINO_ABI std::size_t ranks() const noexcept { return send_counts_.size(); }
  [[nodiscard]] TETROMINO_ABI std::size_t calls_per_row() const noexcept { return calls_per_row_; }
  /// Rows that this rank started from.
  [[nodiscard]] TETROMINO_ABI std::size_t rows() const noexcept { return position_of_call_.size() / calls_per_row_; }
  /// Copies of rows in the send buffer, and in the receive buffer.
  [[nodiscard]] TETROMINO_ABI std::size_t sent() const noexcept { return sent_; }
  [[nodiscard]] TETROMINO_ABI std::size_t received() const noexcept { return receive_calls_.size() / calls_per_row_; }

  [[nodiscard]] TETROMINO_ABI std::span<const std::uint32_t> send_rows() const noexcept { return send_rows_; }
  [[nodiscard]] TETROMINO_ABI std::span<const expert_call> send_calls() const noexcept { return send_calls_; }
  [[nodiscard]] TETROMINO_ABI std::span<const std::int32_t> send_counts() const noexcept { return send_counts_; }
  [[nodiscard]] TETROMINO_ABI std::span<const std::int32_t> send_offsets() const noexcept { return send_offsets_; }
  [[nodiscard]] TETROMINO_ABI std::span<const std::int32_t> receive_counts() const noexcept { return receive_counts_; }
  [[nodiscard]] TETROMINO_ABI std::span<const std::int32_t> receive_offsets() const noexcept {
    return receive_offsets_;
  }
  [[nodiscard]] TETROMINO_ABI std::span<expert_call> receive_calls() noexcept { return receive_calls_; }
  [[nodiscard]] TETROMINO_ABI std::span<const expert_call> receive_calls() const noexcept { return receive_calls_; }
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint32_t> expert_offsets() const noexcept { return expert_offsets_; }
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint32_t> expert_rows() const noexcept { return expert_rows_; }

 private:
  static constexpr std::uint32_t nowhere = 0xFFFF'FFFF;

  /// The first call of the same row that goes to the same rank; i itself if there is none before it.
  [[nodiscard]] TETROMINO_ABI std::size_t earlier_call_to(std::span<const expert_call> calls,
                                                          std::span<const std::uint32_t> rank_of_slot,
                                                          std::size_t i) const {
    std::size_t j = i - i % calls_per_row_;
    while (j < i && (calls[j].slot == no_slot || rank_of_slot[calls[j].slot] != rank_of_slot[calls[i].slot])) ++j;
    return j;
  }

  /// `way` says in errors where rows go: "from" a rank, or "to" it.
  [[nodiscard]] TETROMINO_ABI result<void> check_counts(std::span<const std::int32_t> counts, const char* way) const {
    if (counts.size() != ranks()) {
      return error(errc::shape_mismatch,
                   {"dispatch: expected a count for each of ", ranks(), " ranks, got ", counts.size()});
    }
    std::int64_t sum = 0;
    for (std::size_t r = 0; r < counts.size(); ++r) {
      if (counts[r] < 0 || (sum += counts[r]) > std::numeric_limits<std::int32_t>::max()) {
        return error(errc::invalid_argument, {"dispatch: expected 0 to 2^31 − 1 rows in all, got ", counts[r], " ", way,
                                              " rank ", r, ", ", sum, " so far"});
      }
    }
    return {};
  }

  TETROMINO_ABI static std::size_t offsets_of(std::span<const std::int32_t> counts, std::span<std::int32_t> offsets) {
    std::int32_t sum = 0;
    for (std::size_t r = 0; r < counts.size(); ++r) {
      offsets[r] = sum;
      sum += counts[r];
    }
    return static_cast<std::size_t>(sum);
  }

  std::size_t calls_per_row_ = 1;
  std::size_t sent_ = 0;
  std::vector<std::int32_t> send_counts_, send_offsets_;        // [ranks]
  std::vector<std::int32_t> receive_counts_, receive_offsets_;  // [ranks]
  std::vector<std::uint32_t> position_of_call_;  // [rows, k] where in the send buffer the copy lies; nowhere if shared
  std::vector<std::uint32_t> send_rows_;         // [sent]
  std::vector<expert_call> send_calls_;          // [sent, k]
  std::vector<expert_call> receive_calls_;       // [received, k]
  std::vector<std::uint32_t> expert_offsets_;    // [slots + 1]
  std::vector<std::uint32_t> expert_rows_;       // [pairs]
  std::vector<std::uint32_t> pair_of_call_;      // [received, k]
  std::vector<std::size_t> next_;                // where the next row of a rank, or pair of an expert, goes
};

inline namespace TETROMINO_ISA {

/// Copies rows into a buffer: to[i, width] = from[rows[i], width]. This fills a send buffer (rows = send_rows) and the
/// input of a grouped matrix product (rows = expert_rows). Precondition: row numbers inside `from`.
template <class T>
void gather_rows(std::span<const std::uint32_t> rows, std::span<const T> from, std::span<T> to, std::size_t width) {
  TETROMINO_EXPECTS(to.size() == rows.size() * width, "gather_rows: to[rows, width]", to.size(), rows.size() * width);
  for (std::size_t i = 0; i < rows.size(); ++i)
    std::copy_n(from.data() + rows[i] * width, width, to.data() + i * width);
}

}  // namespace TETROMINO_ISA

/// Rows that a hop carries over each kind of link; those that stay on their rank use none.
struct carried_rows {
  std::uint64_t between_nodes = 0;
  std::uint64_t inside_nodes = 0;
};

inline namespace TETROMINO_ISA {

/// What `rank` sends in a hop. Precondition: as many ranks as the topology has GPUs.
[[nodiscard]] inline carried_rows rows_carried(const dispatch_plan& plan, const topology& t, std::size_t rank) {
  TETROMINO_EXPECTS(plan.ranks() == t.gpus() && rank < t.gpus(), "rows_carried: a rank for each GPU", plan.ranks(),
                    t.gpus(), rank);
  carried_rows out;
  for (std::size_t r = 0; r < plan.ranks(); ++r) {
    if (r == rank) continue;
    const auto rows = static_cast<std::uint64_t>(plan.send_counts()[r]);
    (t.node_of_gpu(r) == t.node_of_gpu(rank) ? out.inside_nodes : out.between_nodes) += rows;
  }
  return out;
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
