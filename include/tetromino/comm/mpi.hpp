#pragma once

#include "../detail/macros_off.hpp"

/// Opt-in: needs MPI.

#include "../error.hpp"         // tetromino::result, tetromino::error
#include "../moe/dispatch.hpp"  // dispatch_plan

#include <mpi.h>

#include <cstddef>  // std::size_t, std::byte
#include <cstdint>  // std::int32_t
#include <limits>   // std::numeric_limits
#include <span>     // std::span
#include <string>   // std::string
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::comm {
inline namespace TETROMINO_ISA {

/// Success, or an error that names the call and says what MPI says.
[[nodiscard]] inline result<void> check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return {};
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) length = 0;
  return error(errc::io,
               {call, " failed: ",
                length > 0 ? std::string(text, static_cast<std::size_t>(length)) : detail::text("MPI error ", code)});
}

}  // namespace TETROMINO_ISA

/// Exchanges the rows of dispatch plans over the caller's communicator, which outlives it. Calls are collective: all
/// ranks make them in the same order. MPI's default is to end the program on an error; with
/// MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN) errors come back from here. An exchange does not know the other
/// ranks' troubles: whoever gives up in the middle must end the others too (MPI_Abort), or they wait.
class mpi_exchange {
 public:
  /// Precondition: MPI is initialised.
  TETROMINO_ABI explicit mpi_exchange(MPI_Comm communicator) : communicator_(communicator) {
    int rank = 0, ranks = 1;
    MPI_Comm_rank(communicator, &rank);
    MPI_Comm_size(communicator, &ranks);
    rank_ = static_cast<std::size_t>(rank);
    ranks_ = static_cast<std::size_t>(ranks);
  }

  [[nodiscard]] TETROMINO_ABI std::size_t rank() const noexcept { return rank_; }
  [[nodiscard]] TETROMINO_ABI std::size_t ranks() const noexcept { return ranks_; }

  /// Tells each rank how many rows it gets (MPI_Alltoall of one integer), and the plan how many come.
  /// Errors: a plan for another number of ranks; MPI's.
  [[nodiscard]] TETROMINO_ABI result<void> try_exchange_counts(moe::dispatch_plan& plan) const {
    if (plan.ranks() != ranks_) {
      return error(errc::shape_mismatch, {"MPI exchange: expected a plan for ", ranks_, " ranks, got ", plan.ranks()});
    }
    counts_.resize(ranks_);
    if (auto ok = check_mpi(
            MPI_Alltoall(plan.send_counts().data(), 1, MPI_INT32_T, counts_.data(), 1, MPI_INT32_T, communicator_),
            "MPI_Alltoall");
        !ok) {
      return ok;
    }
    return plan.try_plan_receive(counts_);
  }

  /// from[sent, row_bytes] of each rank to to[received, row_bytes]: one MPI_Alltoallv that counts rows.
  [[nodiscard]] TETROMINO_ABI result<void> try_send_rows(const moe::dispatch_plan& plan,
                                                         std::span<const std::byte> from, std::span<std::byte> to,
                                                         std::size_t row_bytes) const {
    TETROMINO_EXPECTS(from.size() == plan.sent() * row_bytes && to.size() == plan.received() * row_bytes,
                      "try_send_rows: from[sent, row_bytes] and to[received, row_bytes]", from.size(),
                      plan.sent() * row_bytes, to.size(), plan.received() * row_bytes);
    return all_to_all(from, plan.send_counts(), plan.send_offsets(), to, plan.receive_counts(), plan.receive_offsets(),
                      row_bytes);
  }

  /// The way back: from[received, row_bytes] of each rank to to[sent, row_bytes].
  [[nodiscard]] TETROMINO_ABI result<void> try_return_rows(const moe::dispatch_plan& plan,
                                                           std::span<const std::byte> from, std::span<std::byte> to,
                                                           std::size_t row_bytes) const {
    TETROMINO_EXPECTS(from.size() == plan.received() * row_bytes && to.size() == plan.sent() * row_bytes,
                      "try_return_rows: from[received, row_bytes] and to[sent, row_bytes]", from.size(),
                      plan.received() * row_bytes, to.size(), plan.sent() * row_bytes);
    return all_to_all(from, plan.receive_counts(), plan.receive_offsets(), to, plan.send_counts(), plan.send_offsets(),
                      row_bytes);
  }

 private:
  /// A row as one MPI element, so that counts stay small whatever a row weighs.
  class row_type {
   public:
    TETROMINO_ABI explicit row_type(std::size_t bytes) {
      code = MPI_Type_contiguous(static_cast<int>(bytes), MPI_BYTE, &type);
      if (code == MPI_SUCCESS) code = MPI_Type_commit(&type);
    }
    row_type(const row_type&) = delete;
    row_type& operator=(const row_type&) = delete;
    TETROMINO_ABI ~row_type() {
      if (type != MPI_DATATYPE_NULL) MPI_Type_free(&type);
    }
    MPI_Datatype type = MPI_DATATYPE_NULL;
    int code;
  };

  [[nodiscard]] TETROMINO_ABI result<void> all_to_all(
      std::span<const std::byte> from, std::span<const std::int32_t> send_counts,
      std::span<const std::int32_t> send_offsets, std::span<std::byte> to, std::span<const std::int32_t> receive_counts,
      std::span<const std::int32_t> receive_offsets, std::size_t row_bytes) const {
    static_assert(sizeof(int) == sizeof(std::int32_t), "MPI counts are 32-bit integers");
    if (row_bytes > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
      return error(errc::invalid_argument, {"MPI exchange: expected rows below 2 GiB, got ", row_bytes});
    }
    const row_type row(row_bytes);
    if (auto ok = check_mpi(row.code, "MPI_Type_contiguous"); !ok) return ok;
    return check_mpi(MPI_Alltoallv(from.data(), send_counts.data(), send_offsets.data(), row.type, to.data(),
                                   receive_counts.data(), receive_offsets.data(), row.type, communicator_),
                     "MPI_Alltoallv");
  }

  MPI_Comm communicator_;
  std::size_t rank_ = 0, ranks_ = 1;
  mutable std::vector<std::int32_t> counts_;  // [ranks], kept from call to call
};

}  // namespace TETROMINO_NAMESPACE::comm

#include "../detail/macros_back.hpp"
