#pragma once

/// Rows to the ranks of their experts and back, in device memory over NCCL. The host learns how many rows travel, once
/// for each batch, and nothing else: calls, copies and groups are planned on the GPU.

#include "device_array.hpp"

#include <tetromino/comm/nccl.hpp>
#include <tetromino/cuda/moe.hpp>
#include <tetromino/float16.hpp>
#include <tetromino/moe/placement.hpp>

#include <nccl.h>

#include <cstdint>
#include <span>
#include <vector>

/// Dispatches rows[rows, width] of bfloat16 and adds the answers up. By row_copies::per_rank a row travels once to each
/// rank that it calls, which answers with a weighted sum; by per_expert once for each call, and weights count only
/// where the row came from, so that sums are those of one GPU, bit by bit.
class nccl_dispatch {
 public:
  using T = tetromino::bfloat16;
  using expert_call = tetromino::moe::expert_call;
  using row_copies = tetromino::moe::row_copies;

  /// For at most `most_rows` rows of `k` calls on this rank, each to the first copy of its expert in
  /// placement.layer(layer). All ranks call it together.
  nccl_dispatch(ncclComm_t communicator, const tetromino::cuda::stream& s, const tetromino::moe::topology& t,
                const tetromino::moe::placement& p, std::size_t layer, std::size_t rank, std::size_t k,
                std::size_t width, row_copies copies, std::size_t most_rows)
      : s_(s),
        ranks_(t.gpus()),
        k_(k),
        calls_beside_(copies == row_copies::per_expert ? 1 : k),
        width_(width),
        slots_(t.slots_on_gpu(rank)),
        first_slot_(t.first_slot(rank)),
        copies_(copies),
        count_room_(ranks_ * (ranks_ + 1)),
        exchange_(tetromino::comm::nccl_exchange::try_make(communicator, s.handle, count_room_.span()).value()),
        plan_(ranks_, k),
        slot_of_expert_(std::span<const std::uint32_t>(slots_called(p, layer))),
        rank_of_slot_(std::span<const std::uint32_t>(ranks_held(t))),
        calls_(most_rows * k),
        rank_of_call_(most_rows * k),
        offsets_(ranks_ + 1),
        sent_rows_(most_rows * k),
        position_of_call_(most_rows * k),
        ones_(std::span<const float>(std::vector<float>(most_rows * k, 1.0f))),
        sent_(0),
        sent_calls_(0),
        came_(0),
        came_calls_(0),
        expert_offsets_(slots_ + 1),
        expert_rows_(0),
        pair_of_call_(0) {}

  /// x[rows, width] to the experts ids[rows, k], whose outputs will count with weights[rows, k]; all in device memory.
  void dispatch(std::span<const std::uint16_t> ids, std::span<const float> weights, std::span<const T> x) {
    plan(ids, weights);
    exchange_counts();
    pack(x);
    send();
    group();
  }

  /// How many (row, expert) pairs this rank computes; waits for the stream where the counts of rows do not say it.
  [[nodiscard]] std::size_t pairs() {
    if (copies_ == row_copies::per_expert) return plan_.received();
    std::uint32_t pairs = 0;
    check(cudaMemcpyAsync(&pairs, expert_offsets_.data + slots_, sizeof pairs, cudaMemcpyDeviceToHost, s_.handle),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(s_.handle), "the dispatch");
    return pairs;
  }
  /// [slots + 1]: which pairs belong to which of this rank's slots.
  [[nodiscard]] std::span<const std::uint32_t> expert_offsets() const { return expert_offsets_.span(); }
  /// The row of each pair: to[pairs, width].
  void expert_inputs(std::span<T> to) {
    tetromino::cuda::permute<T>(s_, came_.first(plan_.received() * width_), to, width_, here());
  }

  /// The outputs y[pairs, width] of the experts to out[rows, width], added up with their weights.
  void combine(std::span<const T> y, std::span<const float> weights, std::span<T> out) {
    answer(y);
    send_back();
    add_up(weights, out);
  }

  // The steps of dispatch ...
  void plan(std::span<const std::uint16_t> ids, std::span<const float> weights) {
    rows_ = ids.size() / k_;
    const bool weigh_there = copies_ == row_copies::per_rank;
    tetromino::cuda::plan_copies(s_, ids, weigh_there ? weights : std::span<const float>{},
                                 {slot_of_expert_.span(), rank_of_slot_.span()}, copies_, k_, calls_.first(ids.size()),
                                 rank_of_call_.first(ids.size()));
    tetromino::cuda::group_by_expert(s_, std::span<const std::uint16_t>(rank_of_call_.first(ids.size())), 0, there());
  }
  void exchange_counts() { exchange_.try_exchange_counts(plan_, offsets_.span()).value(); }
  void pack(std::span<const T> x) {
    sent_.reserve(plan_.sent() * width_), sent_calls_.reserve(plan_.sent() * calls_beside_);
    tetromino::cuda::permute<T>(s_, x, sent_.first(plan_.sent() * width_), width_, there());
    // by per_rank all calls of a row travel with it, and who gets them answers those for its own slots
    tetromino::cuda::expert_groups calls = there();
    calls.calls_per_row = calls_beside_;
    tetromino::cuda::permute<float>(s_, floats(calls_.first(rows_ * k_)),
                                    floats(sent_calls_.first(plan_.sent() * calls_beside_)), 2 * calls_beside_, calls);
  }
  void send() {
    const std::size_t received = plan_.received();
    came_.reserve(received * width_), came_calls_.reserve(received * calls_beside_);
    tetromino::comm::check_nccl(ncclGroupStart(), "ncclGroupStart").value();
    exchange_
        .try_send_rows(plan_, std::as_bytes(sent_.first(plan_.sent() * width_)),
                       std::as_writable_bytes(came_.first(received * width_)), width_ * sizeof(T))
        .value();
    exchange_
        .try_send_rows(plan_, std::as_bytes(sent_calls_.first(plan_.sent() * calls_beside_)),
                       std::as_writable_bytes(came_calls_.first(received * calls_beside_)),
                       calls_beside_ * sizeof(expert_call))
        .value();
    tetromino::comm::check_nccl(ncclGroupEnd(), "ncclGroupEnd").value();
  }
  void group() {
    const std::size_t calls = plan_.received() * calls_beside_;
    expert_rows_.reserve(calls), pair_of_call_.reserve(calls);
    tetromino::cuda::group_by_expert(s_, std::span<const expert_call>(came_calls_.first(calls)), first_slot_, here());
  }
  // ... and of combine.
  void answer(std::span<const T> y) {  // over the rows that came, which are done with
    tetromino::cuda::combine<T>(s_, y,
                                std::span<const expert_call>(came_calls_.first(plan_.received() * calls_beside_)),
                                came_.first(plan_.received() * width_), width_, here());
  }
  void send_back() {
    exchange_
        .try_return_rows(plan_, std::as_bytes(came_.first(plan_.received() * width_)),
                         std::as_writable_bytes(sent_.first(plan_.sent() * width_)), width_ * sizeof(T))
        .value();
  }
  void add_up(std::span<const float> weights, std::span<T> out) {
    const bool weighed_there = copies_ == row_copies::per_rank;
    tetromino::cuda::combine<T>(s_, sent_.first(plan_.sent() * width_),
                                weighed_there ? std::span<const float>(ones_.first(rows_ * k_)) : weights, out, width_,
                                there());
  }

  /// What is sent to whom, as counts.
  [[nodiscard]] const tetromino::moe::dispatch_plan& counts() const { return plan_; }
  /// Bytes that travel with a row there, and back.
  [[nodiscard]] std::size_t bytes_there() const { return width_ * sizeof(T) + calls_beside_ * sizeof(expert_call); }
  [[nodiscard]] std::size_t bytes_back() const { return width_ * sizeof(T); }

 private:
  static std::span<float> floats(std::span<expert_call> calls) {
    static_assert(sizeof(expert_call) == 2 * sizeof(float));
    return {reinterpret_cast<float*>(calls.data()), 2 * calls.size()};
  }
  static std::vector<std::uint32_t> slots_called(const tetromino::moe::placement& p, std::size_t layer) {
    const tetromino::moe::replica_index index(p);
    std::vector<std::uint32_t> out;
    for (std::size_t e = 0; e < p.experts(); ++e) out.push_back(index.slots_of(layer, e)[0]);
    return out;
  }
  static std::vector<std::uint32_t> ranks_held(const tetromino::moe::topology& t) {
    std::vector<std::uint32_t> out(t.slots());
    tetromino::moe::ranks_of_slots(t, out);
    return out;
  }
  /// Calls of this rank's rows, grouped by rank; calls of the rows that came, grouped by slot.
  [[nodiscard]] tetromino::cuda::expert_groups there() const {
    return {offsets_.span(), sent_rows_.first(rows_ * k_), position_of_call_.first(rows_ * k_), k_};
  }
  [[nodiscard]] tetromino::cuda::expert_groups here() const {
    const std::size_t calls = plan_.received() * calls_beside_;
    return {expert_offsets_.span(), expert_rows_.first(calls), pair_of_call_.first(calls), calls_beside_};
  }

  tetromino::cuda::stream s_;
  std::size_t ranks_, k_, calls_beside_, width_, slots_, first_slot_, rows_ = 0;
  row_copies copies_;
  device_array<std::uint32_t> count_room_;
  tetromino::comm::nccl_exchange exchange_;
  tetromino::moe::dispatch_plan plan_;
  device_array<std::uint32_t> slot_of_expert_, rank_of_slot_;
  device_array<expert_call> calls_;
  device_array<std::uint16_t> rank_of_call_;
  device_array<std::uint32_t> offsets_, sent_rows_, position_of_call_;
  device_array<float> ones_;
  device_array<T> sent_;
  device_array<expert_call> sent_calls_;
  device_array<T> came_;
  device_array<expert_call> came_calls_;
  device_array<std::uint32_t> expert_offsets_, expert_rows_, pair_of_call_;
};
