#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"         // tetromino::result
#include "../moe/dispatch.hpp"  // dispatch_plan, expert_call

#include <concepts>  // std::convertible_to, std::same_as
#include <cstddef>   // std::size_t, std::byte
#include <cstdint>   // std::uint32_t
#include <cstring>   // std::memcpy
#include <span>      // std::span
#include <vector>    // std::vector

namespace TETROMINO_NAMESPACE::comm {

/// Moves the rows of a plan between ranks, in host memory: comm::mpi_exchange, or local_exchange for one rank. These
/// are hooks of `dispatcher`, which is what has a throwing form of each call.
template <class E>
concept exchange = requires(const E& e, moe::dispatch_plan& plan, std::span<const std::byte> from,
                            std::span<std::byte> to, std::size_t row_bytes) {
  { e.rank() } -> std::convertible_to<std::size_t>;
  { e.ranks() } -> std::convertible_to<std::size_t>;
  /// Tells each rank how many rows it gets, and the plan how many come.
  { e.try_exchange_counts(plan) } -> std::same_as<result<void>>;
  /// from[sent, row_bytes] of each rank to to[received, row_bytes].
  { e.try_send_rows(plan, from, to, row_bytes) } -> std::same_as<result<void>>;
  /// The way back: from[received, row_bytes] of each rank to to[sent, row_bytes].
  { e.try_return_rows(plan, from, to, row_bytes) } -> std::same_as<result<void>>;
};

/// A single rank, which sends to itself.
class local_exchange {
 public:
  [[nodiscard]] TETROMINO_ABI static std::size_t rank() noexcept { return 0; }
  [[nodiscard]] TETROMINO_ABI static std::size_t ranks() noexcept { return 1; }
  [[nodiscard]] TETROMINO_ABI static result<void> try_exchange_counts(moe::dispatch_plan& plan) {
    return plan.try_plan_receive(plan.send_counts());
  }
  [[nodiscard]] TETROMINO_ABI static result<void> try_send_rows(const moe::dispatch_plan&,
                                                                std::span<const std::byte> from,
                                                                std::span<std::byte> to, std::size_t) {
    if (!from.empty()) std::memcpy(to.data(), from.data(), from.size());
    return {};
  }
  [[nodiscard]] TETROMINO_ABI static result<void> try_return_rows(const moe::dispatch_plan& plan,
                                                                  std::span<const std::byte> from,
                                                                  std::span<std::byte> to, std::size_t row_bytes) {
    return try_send_rows(plan, from, to, row_bytes);
  }
};

/// How rows reach their experts.
enum class dispatch_route : std::uint8_t {
  per_node,    ///< one copy to each other node, entering at entry_ranks, and from there one to each rank that needs it
  per_rank,    ///< one copy to each rank
  per_expert,  ///< one copy for each call; answers are added in the order of calls, so sums never depend on the
               ///< placement
};

/// Dispatches rows to experts and combines the answers, in one hop or two, over an exchange that outlives it. All ranks
/// make the same calls in the same order, also those without rows. Buffers are kept from batch to batch.
template <exchange Exchange>
class dispatcher {
 public:
  /// Precondition: the topology has as many GPUs as the exchange has ranks, and stays the same.
  TETROMINO_ABI dispatcher(const Exchange& through, const moe::topology& t, std::size_t calls_per_row,
                           dispatch_route route = dispatch_route::per_node,
                           moe::entry_rule entry = moe::entry_rule::same_local_number)
      : exchange_(&through),
        copies_(route == dispatch_route::per_expert ? moe::row_copies::per_expert : moe::row_copies::per_rank),
        first_slot_(t.first_slot(through.rank())),
        slots_(t.slots_on_gpu(through.rank())) {
    TETROMINO_EXPECTS(t.gpus() == through.ranks(), "dispatcher: a GPU of the topology for each rank", t.gpus(),
                      through.ranks());
    hops_.resize(route == dispatch_route::per_node && t.nodes() > 1 ? 2 : 1);
    for (hop& h : hops_) {
      h.plan = moe::dispatch_plan(through.ranks(), calls_per_row);
      h.rank_of_slot.resize(t.slots());
      moe::ranks_of_slots(t, h.rank_of_slot);
    }
    if (hops_.size() == 2) moe::entry_ranks(t, through.rank(), entry, hops_[0].rank_of_slot);
  }

  /// Sends rows x[rows, width], a tag each, to the slots that calls[rows, calls_per_row] name; afterwards `plan` says
  /// how what came is grouped by expert. Errors: of the exchange; sizes that do not fit together; a call for a slot
  /// that does not exist.
  template <class T>
  [[nodiscard]] TETROMINO_ABI result<void> try_dispatch(std::span<const moe::expert_call> calls, std::span<const T> x,
                                                        std::span<const std::uint32_t> tags, std::size_t width) {
    const std::size_t k = hops_.front().plan.calls_per_row();
    if (calls.size() % k != 0 || tags.size() != calls.size() / k || x.size() != calls.size() / k * width) {
      return error(errc::shape_mismatch,
                   {"dispatch: expected ", k, " calls, ", width, " values and a tag for each row, got ", calls.size(),
                    ", ", x.size(), " and ", tags.size()});
    }
    std::span<const std::byte> rows = std::as_bytes(x);
    for (std::size_t i = 0; i < hops_.size(); ++i) {
      hop& h = hops_[i];
      if (auto done = h.plan.try_plan_send(calls, h.rank_of_slot, copies_); !done) return done;
      if (auto done = exchange_->try_exchange_counts(h.plan); !done) return done;
      if (auto done = send(h, rows, h.rows, width * sizeof(T)); !done) return done;
      if (auto done = send(h, std::as_bytes(tags), h.tags, sizeof(std::uint32_t)); !done) return done;
      if (auto done = exchange_->try_send_rows(h.plan, std::as_bytes(h.plan.send_calls()),
                                               std::as_writable_bytes(h.plan.receive_calls()), calls_bytes(h.plan));
          !done) {
        return done;
      }
      calls = h.plan.receive_calls();
      rows = h.rows;
      tags = received_tags(h);
    }
    return hops_.back().plan.try_group_by_expert(first_slot_, slots_);
  }
  template <class T>
  TETROMINO_ABI void dispatch(std::span<const moe::expert_call> calls, std::span<const T> x,
                              std::span<const std::uint32_t> tags, std::size_t width) {
    try_dispatch(calls, x, tags, width).value();
  }

  /// The plan of the last hop: expert_offsets, and expert_rows as numbers of received rows.
  [[nodiscard]] TETROMINO_ABI const moe::dispatch_plan& plan() const noexcept { return hops_.back().plan; }
  /// The plans of all hops, in order.
  [[nodiscard]] TETROMINO_ABI std::size_t hops() const noexcept { return hops_.size(); }
  [[nodiscard]] TETROMINO_ABI const moe::dispatch_plan& plan(std::size_t i) const noexcept { return hops_[i].plan; }

  /// What came: rows [received, width] and tags [received]. Precondition: T as dispatched.
  template <class T>
  [[nodiscard]] TETROMINO_ABI std::span<const T> received_rows() const noexcept {
    const auto& bytes = hops_.back().rows;
    return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
  }
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint32_t> received_tags() const noexcept {
    return received_tags(hops_.back());
  }

  /// Takes the experts' outputs y[pairs, width], adds them up with their weights on the way back, and writes one sum
  /// per row that this rank dispatched: out[rows, width]. Errors: of the exchange; sizes that do not fit together.
  [[nodiscard]] TETROMINO_ABI result<void> try_combine(std::span<const float> y, std::span<float> out,
                                                       std::size_t width) {
    hop& last = hops_.back();
    if (y.size() != last.plan.expert_rows().size() * width || out.size() != hops_.front().plan.rows() * width) {
      return error(errc::shape_mismatch, {"combine: expected ", last.plan.expert_rows().size(),
                                          " outputs of experts and room for ", hops_.front().plan.rows(), " rows, of ",
                                          width, " values each, got ", y.size(), " and ", out.size(), " values"});
    }
    last.answers.resize(last.plan.received() * width);
    last.plan.add_expert_outputs(y, last.answers, width);
    for (std::size_t i = hops_.size(); i-- > 0;) {
      hop& h = hops_[i];
      h.returned.resize(h.plan.sent() * width);
      if (auto done = exchange_->try_return_rows(h.plan, std::as_bytes(std::span(h.answers)),
                                                 std::as_writable_bytes(std::span(h.returned)), width * sizeof(float));
          !done) {
        return done;
      }
      if (i > 0) hops_[i - 1].answers.resize(h.plan.rows() * width);
      h.plan.add_copies(h.returned, i > 0 ? std::span<float>(hops_[i - 1].answers) : out, width);
    }
    return {};
  }
  TETROMINO_ABI void combine(std::span<const float> y, std::span<float> out, std::size_t width) {
    try_combine(y, out, width).value();
  }

  /// Bytes of one row's calls and tag, which travel beside it.
  [[nodiscard]] TETROMINO_ABI std::size_t envelope_bytes() const noexcept {
    return calls_bytes(hops_.back().plan) + sizeof(std::uint32_t);
  }

 private:
  struct hop {
    moe::dispatch_plan plan;
    std::vector<std::uint32_t> rank_of_slot;
    std::vector<std::byte> outgoing, rows, tags;
    std::vector<float> answers, returned;

    TETROMINO_ABI hop() = default;
    // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
    TETROMINO_ABI hop(const hop&) = default;
    TETROMINO_ABI hop(hop&&) noexcept = default;
    TETROMINO_ABI hop& operator=(const hop&) = default;
    TETROMINO_ABI hop& operator=(hop&&) noexcept = default;
  };

  [[nodiscard]] TETROMINO_ABI static std::size_t calls_bytes(const moe::dispatch_plan& plan) noexcept {
    return plan.calls_per_row() * sizeof(moe::expert_call);
  }
  [[nodiscard]] TETROMINO_ABI static std::span<const std::uint32_t> received_tags(const hop& h) noexcept {
    return {reinterpret_cast<const std::uint32_t*>(h.tags.data()), h.tags.size() / sizeof(std::uint32_t)};
  }

  [[nodiscard]] TETROMINO_ABI result<void> send(hop& h, std::span<const std::byte> from, std::vector<std::byte>& to,
                                                std::size_t row_bytes) {
    h.outgoing.resize(h.plan.sent() * row_bytes);
    moe::gather_rows(h.plan.send_rows(), from, std::span(h.outgoing), row_bytes);
    to.resize(h.plan.received() * row_bytes);
    return exchange_->try_send_rows(h.plan, h.outgoing, to, row_bytes);
  }

  const Exchange* exchange_;
  moe::row_copies copies_;
  std::size_t first_slot_, slots_;
  std::vector<hop> hops_;
};

}  // namespace TETROMINO_NAMESPACE::comm

#include "../detail/macros_back.hpp"
