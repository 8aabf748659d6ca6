#pragma once

#include "../detail/macros_off.hpp"

/// Opt-in: needs NCCL and the CUDA run-time library.

#include "../error.hpp"         // tetromino::result, tetromino::error
#include "../moe/dispatch.hpp"  // dispatch_plan

#include <nccl.h>

#include <algorithm>  // std::copy
#include <cstddef>    // std::size_t, std::byte
#include <cstdint>    // std::int32_t, std::uint32_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::comm {
inline namespace TETROMINO_ISA {

/// The name of a NCCL result, such as "ncclSystemError".
[[nodiscard]] constexpr const char* name_of(ncclResult_t code) noexcept {
  switch (code) {
    case ncclSuccess:
      return "ncclSuccess";
    case ncclUnhandledCudaError:
      return "ncclUnhandledCudaError";
    case ncclSystemError:
      return "ncclSystemError";
    case ncclInternalError:
      return "ncclInternalError";
    case ncclInvalidArgument:
      return "ncclInvalidArgument";
    case ncclInvalidUsage:
      return "ncclInvalidUsage";
    case ncclRemoteError:
      return "ncclRemoteError";
    case ncclInProgress:
      return "ncclInProgress";
    default:
      return "an unknown NCCL result";
  }
}

/// Success, or an error that names the call and NCCL's result. A communicator that does not block answers
/// ncclInProgress, which is no error.
[[nodiscard]] inline result<void> check_nccl(ncclResult_t code, const char* call) {
  if (code == ncclSuccess || code == ncclInProgress) return {};
  return error(errc::io, {call, " failed: ", name_of(code), " (", ncclGetErrorString(code), ")"});
}

}  // namespace TETROMINO_ISA

/// Exchanges the rows of dispatch plans, which lie in device memory, over the caller's communicator and stream; both
/// outlive it. Rows move by one group of ncclSend and ncclRecv, which is enqueued on the stream; nothing waits but
/// try_exchange_counts. The plan's counts are read at the call, on the host. Between ncclGroupStart and ncclGroupEnd of
/// the caller, several calls become one kernel: activations and what travels beside them.
///
/// What was run, with NCCL 2.28.9: one rank, and two on two H200s of one host, joined by NVLink, multicast off; there
/// the bytes sent were those of the plan, and the outputs of a layer those of one GPU. Four and eight GPUs, and several
/// hosts, have not been.
class nccl_exchange {
 public:
  /// `counts`: device memory of ranks × (ranks + 1) integers for try_exchange_counts, which the caller owns too.
  /// Errors: what NCCL says of the communicator; too little memory for the counts.
  [[nodiscard]] TETROMINO_ABI static result<nccl_exchange> try_make(ncclComm_t communicator, cudaStream_t stream,
                                                                    std::span<std::uint32_t> counts) {
    int rank = 0, ranks = 0;
    if (auto ok = check_nccl(ncclCommUserRank(communicator, &rank), "ncclCommUserRank"); !ok) return ok.error();
    if (auto ok = check_nccl(ncclCommCount(communicator, &ranks), "ncclCommCount"); !ok) return ok.error();
    const std::size_t room = static_cast<std::size_t>(ranks) * (static_cast<std::size_t>(ranks) + 1);
    if (counts.size() < room) {
      return error(errc::shape_mismatch,
                   {"NCCL exchange: expected room for ", room, " counts in device memory, got ", counts.size()});
    }
    return nccl_exchange(communicator, stream, counts.data(), static_cast<std::size_t>(rank),
                         static_cast<std::size_t>(ranks));
  }
  [[nodiscard]] TETROMINO_ABI static nccl_exchange make(ncclComm_t communicator, cudaStream_t stream,
                                                        std::span<std::uint32_t> counts) {
    return try_make(communicator, stream, counts).value();
  }

  [[nodiscard]] TETROMINO_ABI std::size_t rank() const noexcept { return rank_; }
  [[nodiscard]] TETROMINO_ABI std::size_t ranks() const noexcept { return ranks_; }

  /// Tells each rank how many rows it gets, and the plan how many come. Waits for the stream.
  /// Errors: a plan for another number of ranks; NCCL's; CUDA's.
  [[nodiscard]] TETROMINO_ABI result<void> try_exchange_counts(moe::dispatch_plan& plan) {
    if (auto ok = check_plan(plan); !ok) return ok;
    all_offsets_.resize(ranks_ * (ranks_ + 1));
    std::uint32_t* const mine = all_offsets_.data() + rank_ * (ranks_ + 1);
    std::copy(plan.send_offsets().begin(), plan.send_offsets().end(), mine);
    mine[ranks_] = static_cast<std::uint32_t>(plan.sent());
    std::uint32_t* const mine_there = counts_ + rank_ * (ranks_ + 1);
    if (auto ok = check_cuda(
            cudaMemcpyAsync(mine_there, mine, (ranks_ + 1) * sizeof(std::uint32_t), cudaMemcpyHostToDevice, stream_));
        !ok) {
      return ok;
    }
    if (auto ok = gather_offsets(mine_there); !ok) return ok;
    return plan.try_plan_receive(counts_for_me());
  }

  /// The same where rows were grouped by rank on the GPU: offsets[ranks + 1] are device memory, as
  /// cuda::group_by_expert writes them with ranks for slots. The plan also learns from them what this rank sends.
  /// Errors: likewise; another number of offsets.
  [[nodiscard]] TETROMINO_ABI result<void> try_exchange_counts(moe::dispatch_plan& plan,
                                                               std::span<const std::uint32_t> offsets) {
    if (auto ok = check_plan(plan); !ok) return ok;
    if (offsets.size() != ranks_ + 1) {
      return error(errc::shape_mismatch, {"NCCL exchange: expected ", ranks_ + 1, " offsets, got ", offsets.size()});
    }
    all_offsets_.resize(ranks_ * (ranks_ + 1));
    if (auto ok = gather_offsets(offsets.data()); !ok) return ok;
    counts_of_ranks_.resize(ranks_);
    for (std::size_t r = 0; r < ranks_; ++r) counts_of_ranks_[r] = rows_from_to(rank_, r);
    if (auto ok = plan.try_plan_send_counts(counts_of_ranks_); !ok) return ok;
    return plan.try_plan_receive(counts_for_me());
  }

  /// from[sent, row_bytes] of each rank to to[received, row_bytes], both in device memory.
  [[nodiscard]] TETROMINO_ABI result<void> try_send_rows(const moe::dispatch_plan& plan,
                                                         std::span<const std::byte> from, std::span<std::byte> to,
                                                         std::size_t row_bytes) {
    TETROMINO_EXPECTS(from.size() == plan.sent() * row_bytes && to.size() == plan.received() * row_bytes,
                      "try_send_rows: from[sent, row_bytes] and to[received, row_bytes]", from.size(),
                      plan.sent() * row_bytes, to.size(), plan.received() * row_bytes);
    return all_to_all(from, plan.send_counts(), plan.send_offsets(), to, plan.receive_counts(), plan.receive_offsets(),
                      row_bytes);
  }

  /// The way back: from[received, row_bytes] of each rank to to[sent, row_bytes], both in device memory.
  [[nodiscard]] TETROMINO_ABI result<void> try_return_rows(const moe::dispatch_plan& plan,
                                                           std::span<const std::byte> from, std::span<std::byte> to,
                                                           std::size_t row_bytes) {
    TETROMINO_EXPECTS(from.size() == plan.received() * row_bytes && to.size() == plan.sent() * row_bytes,
                      "try_return_rows: from[received, row_bytes] and to[sent, row_bytes]", from.size(),
                      plan.received() * row_bytes, to.size(), plan.sent() * row_bytes);
    return all_to_all(from, plan.receive_counts(), plan.receive_offsets(), to, plan.send_counts(), plan.send_offsets(),
                      row_bytes);
  }

  /// What has gone wrong since, on the device or with another rank. Errors: NCCL's.
  [[nodiscard]] TETROMINO_ABI result<void> try_check() const {
    ncclResult_t state = ncclSuccess;
    if (auto ok = check_nccl(ncclCommGetAsyncError(communicator_, &state), "ncclCommGetAsyncError"); !ok) return ok;
    return check_nccl(state, "an earlier NCCL operation");
  }
  TETROMINO_ABI void check() const { try_check().value(); }

 private:
  TETROMINO_ABI nccl_exchange(ncclComm_t communicator, cudaStream_t stream, std::uint32_t* counts, std::size_t rank,
                              std::size_t ranks)
      : communicator_(communicator), stream_(stream), counts_(counts), rank_(rank), ranks_(ranks) {}

  [[nodiscard]] TETROMINO_ABI static result<void> check_cuda(cudaError_t code) {
    if (code == cudaSuccess) return {};
    return error(errc::io, {"NCCL exchange: ", cudaGetErrorName(code), " (", cudaGetErrorString(code), ")"});
  }

  [[nodiscard]] TETROMINO_ABI result<void> check_plan(const moe::dispatch_plan& plan) const {
    if (plan.ranks() == ranks_) return {};
    return error(errc::shape_mismatch, {"NCCL exchange: expected a plan for ", ranks_, " ranks, got ", plan.ranks()});
  }

  /// The offsets [ranks + 1] of each rank, which lie in device memory, to all ranks. Waits for the stream.
  [[nodiscard]] TETROMINO_ABI result<void> gather_offsets(const std::uint32_t* mine) {
    if (auto ok =
            check_nccl(ncclAllGather(mine, counts_, ranks_ + 1, ncclUint32, communicator_, stream_), "ncclAllGather");
        !ok) {
      return ok;
    }
    if (auto ok = check_cuda(cudaMemcpyAsync(all_offsets_.data(), counts_, all_offsets_.size() * sizeof(std::uint32_t),
                                             cudaMemcpyDeviceToHost, stream_));
        !ok) {
      return ok;
    }
    return check_cuda(cudaStreamSynchronize(stream_));
  }
  [[nodiscard]] TETROMINO_ABI std::int32_t rows_from_to(std::size_t from, std::size_t to) const {
    const std::uint32_t* const offsets = all_offsets_.data() + from * (ranks_ + 1);
    return static_cast<std::int32_t>(offsets[to + 1] - offsets[to]);
  }
  [[nodiscard]] TETROMINO_ABI std::span<const std::int32_t> counts_for_me() {
    counts_of_ranks_.resize(ranks_);
    for (std::size_t r = 0; r < ranks_; ++r) counts_of_ranks_[r] = rows_from_to(r, rank_);
    return counts_of_ranks_;
  }

  /// call(rank) for all ranks, as one group; the group is closed also after an error.
  template <class Call>
  [[nodiscard]] TETROMINO_ABI result<void> in_group(const Call& call) const {
    if (auto ok = check_nccl(ncclGroupStart(), "ncclGroupStart"); !ok) return ok;
    result<void> first;
    for (std::size_t r = 0; r < ranks_ && first; ++r) static_cast<void>(first = call(static_cast<int>(r)));
    auto closed = check_nccl(ncclGroupEnd(), "ncclGroupEnd");
    return first ? closed : first;
  }

  [[nodiscard]] TETROMINO_ABI result<void> all_to_all(
      std::span<const std::byte> from, std::span<const std::int32_t> send_counts,
      std::span<const std::int32_t> send_offsets, std::span<std::byte> to, std::span<const std::int32_t> receive_counts,
      std::span<const std::int32_t> receive_offsets, std::size_t row_bytes) const {
    return in_group([&](int peer) -> result<void> {
      const auto r = static_cast<std::size_t>(peer);
      if (send_counts[r] > 0) {
        const std::byte* const rows = from.data() + static_cast<std::size_t>(send_offsets[r]) * row_bytes;
        const std::size_t bytes = static_cast<std::size_t>(send_counts[r]) * row_bytes;
        auto sent = check_nccl(ncclSend(rows, bytes, ncclUint8, peer, communicator_, stream_), "ncclSend");
        if (!sent) return sent;
      }
      if (receive_counts[r] == 0) return {};
      std::byte* const rows = to.data() + static_cast<std::size_t>(receive_offsets[r]) * row_bytes;
      const std::size_t bytes = static_cast<std::size_t>(receive_counts[r]) * row_bytes;
      return check_nccl(ncclRecv(rows, bytes, ncclUint8, peer, communicator_, stream_), "ncclRecv");
    });
  }

  ncclComm_t communicator_;
  cudaStream_t stream_;
  std::uint32_t* counts_;
  std::size_t rank_, ranks_;
  std::vector<std::uint32_t> all_offsets_;     // [ranks, ranks + 1], kept from call to call
  std::vector<std::int32_t> counts_of_ranks_;  // [ranks], likewise
};

}  // namespace TETROMINO_NAMESPACE::comm

#include "../detail/macros_back.hpp"
