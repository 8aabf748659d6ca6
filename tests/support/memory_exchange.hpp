#pragma once

/// Dispatch and combine between ranks that are threads of one process.

#include "dispatch_world.hpp"

#include <barrier>  // std::barrier
#include <cstring>  // std::memcpy
#include <span>     // std::span
#include <thread>   // std::thread
#include <vector>   // std::vector

namespace tetromino_test {

/// Where the threads lay out what they send.
struct mailboxes {
  explicit mailboxes(std::size_t ranks) : plans(ranks), bytes(ranks), together(static_cast<std::ptrdiff_t>(ranks)) {}
  std::vector<const moe::dispatch_plan*> plans;
  std::vector<const std::byte*> bytes;
  std::barrier<> together;
};

class memory_exchange {
 public:
  memory_exchange(mailboxes& m, std::size_t rank) : m_(m), rank_(rank) {}
  [[nodiscard]] std::size_t rank() const { return rank_; }
  [[nodiscard]] std::size_t ranks() const { return m_.plans.size(); }

  [[nodiscard]] tetromino::result<void> try_exchange_counts(moe::dispatch_plan& plan) const {
    m_.plans[rank_] = &plan;
    m_.together.arrive_and_wait();
    std::vector<std::int32_t> counts;
    for (const auto* other : m_.plans) counts.push_back(other->send_counts()[rank_]);
    auto done = plan.try_plan_receive(counts);
    m_.together.arrive_and_wait();
    return done;
  }
  [[nodiscard]] tetromino::result<void> try_send_rows(const moe::dispatch_plan& plan, std::span<const std::byte> from,
                                                      std::span<std::byte> to, std::size_t row_bytes) const {
    return move(plan, from, to, [&](std::size_t r) {
      const auto& other = *m_.plans[r];
      return piece{static_cast<std::size_t>(other.send_offsets()[rank_]) * row_bytes,
                   static_cast<std::size_t>(plan.receive_offsets()[r]) * row_bytes,
                   static_cast<std::size_t>(plan.receive_counts()[r]) * row_bytes};
    });
  }
  [[nodiscard]] tetromino::result<void> try_return_rows(const moe::dispatch_plan& plan, std::span<const std::byte> from,
                                                        std::span<std::byte> to, std::size_t row_bytes) const {
    return move(plan, from, to, [&](std::size_t r) {
      const auto& other = *m_.plans[r];
      return piece{static_cast<std::size_t>(other.receive_offsets()[rank_]) * row_bytes,
                   static_cast<std::size_t>(plan.send_offsets()[r]) * row_bytes,
                   static_cast<std::size_t>(plan.send_counts()[r]) * row_bytes};
    });
  }

 private:
  struct piece {
    std::size_t from, to, bytes;
  };
  template <class PieceOf>
  [[nodiscard]] tetromino::result<void> move(const moe::dispatch_plan& plan, std::span<const std::byte> from,
                                             std::span<std::byte> to, const PieceOf& piece_of) const {
    m_.plans[rank_] = &plan;
    m_.bytes[rank_] = from.data();
    m_.together.arrive_and_wait();
    for (std::size_t r = 0; r < ranks(); ++r) {
      const piece p = piece_of(r);
      if (p.bytes > 0) std::memcpy(to.data() + p.to, m_.bytes[r] + p.from, p.bytes);
    }
    m_.together.arrive_and_wait();
    return {};
  }

  mailboxes& m_;
  std::size_t rank_;
};

/// Serves the tokens of all ranks, twice over the same buffers.
inline std::vector<dispatch_outcome> serve_all(const dispatch_world& w, comm::dispatch_route route,
                                               moe::entry_rule entry) {
  const std::size_t ranks = w.cluster.gpus();
  mailboxes boxes(ranks);
  std::vector<dispatch_outcome> out(ranks);
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      const memory_exchange through(boxes, r);
      comm::dispatcher<memory_exchange> d(through, w.cluster, w.k, route, entry);
      out[r] = serve(w, d, r);
      out[r] = serve(w, d, r);  // again, over the buffers of the first time
    });
  }
  for (auto& t : threads) t.join();
  return out;
}

}  // namespace tetromino_test
