#pragma once

/// What the distributed example needs of MPI besides the exchange itself: start and end, agreement on errors, sums.

#include "../ui.hpp"

#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mpi {

/// Thrown on all ranks after one of them has said what is wrong; carries the exit status.
struct reported : std::exception {
  explicit reported(int s) : status(s) {}
  [[nodiscard]] const char* what() const noexcept override { return "another rank failed"; }

  int status;
};

/// MPI from start to end of the program.
class session {
 public:
  session(int& argc, char**& argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks_);
  }
  session(const session&) = delete;
  session& operator=(const session&) = delete;
  ~session() { MPI_Finalize(); }

  [[nodiscard]] std::size_t rank() const { return static_cast<std::size_t>(rank_); }
  [[nodiscard]] std::size_t ranks() const { return static_cast<std::size_t>(ranks_); }
  [[nodiscard]] bool is_first() const { return rank_ == 0; }

  /// Runs `work` on every rank. If it throws anywhere, the first rank where it did prints why, and all ranks throw
  /// `reported`. For work without exchanges, which would wait for those who gave up.
  template <class Work>
  void together(const char* program, const Work& work) const {
    std::string problem;
    int status = 0;
    try {
      work();
    } catch (const ui::usage_error& e) {
      problem = e.what();
      status = 2;
    } catch (const std::exception& e) {
      problem = e.what();
      status = 1;
    }
    const std::size_t first = first_where(status != 0);
    if (first == ranks()) return;
    if (first == rank()) fmt::print(stderr, "{}: {}\n", program, problem);
    throw reported(value_of(first, status));
  }

  /// The first rank for which this is true; ranks() if it is so for none.
  [[nodiscard]] std::size_t first_where(bool mine) const {
    int first = mine ? rank_ : ranks_;
    reduce(std::span(&first, 1), MPI_INT, MPI_MIN);
    return static_cast<std::size_t>(first);
  }

  /// What `rank` has, on all ranks.
  [[nodiscard]] int value_of(std::size_t rank, int mine) const {
    check(MPI_Bcast(&mine, 1, MPI_INT, static_cast<int>(rank), MPI_COMM_WORLD));
    return mine;
  }

  /// Ends with one line unless every rank has the same values for these names, as many on each.
  void agree(const char* program, const std::vector<std::pair<std::string, std::string>>& settings) const {
    std::vector<std::uint64_t> first;
    for (const auto& [name, value] : settings) first.push_back(hash_of(value));
    const std::vector<std::uint64_t> mine = first;
    check(MPI_Bcast(first.data(), static_cast<int>(first.size()), MPI_UINT64_T, 0, MPI_COMM_WORLD));
    together(program, [&] {
      for (std::size_t i = 0; i < settings.size(); ++i) {
        if (mine[i] == first[i]) continue;
        throw std::runtime_error(
            fmt::format("{}: expected the same on every rank, got something else on rank {} than on rank 0",
                        settings[i].first, rank_));
      }
    });
  }

  void add_up(std::span<double> values) const { reduce(values, MPI_DOUBLE, MPI_SUM); }
  void add_up(std::span<std::uint64_t> values) const { reduce(values, MPI_UINT64_T, MPI_SUM); }
  void largest(std::span<float> values) const { reduce(values, MPI_FLOAT, MPI_MAX); }
  [[nodiscard]] std::uint64_t largest(std::uint64_t value) const {
    reduce(std::span(&value, 1), MPI_UINT64_T, MPI_MAX);
    return value;
  }

  /// The values of each rank, on all ranks.
  template <class T>
  [[nodiscard]] std::vector<std::vector<T>> gather(const std::vector<T>& mine) const {
    const int bytes = static_cast<int>(mine.size() * sizeof(T));
    std::vector<int> counts(ranks()), offsets(ranks());
    check(MPI_Allgather(&bytes, 1, MPI_INT, counts.data(), 1, MPI_INT, MPI_COMM_WORLD));
    std::exclusive_scan(counts.begin(), counts.end(), offsets.begin(), 0);
    std::vector<T> all(static_cast<std::size_t>(offsets.back() + counts.back()) / sizeof(T));
    check(MPI_Allgatherv(mine.data(), bytes, MPI_BYTE, all.data(), counts.data(), offsets.data(), MPI_BYTE,
                         MPI_COMM_WORLD));
    std::vector<std::vector<T>> out;
    for (auto from = all.cbegin(); const int count : counts) {
      const auto last = from + count / static_cast<int>(sizeof(T));
      out.emplace_back(from, last);
      from = last;
    }
    return out;
  }

  /// Sends bytes to rank `to` and receives as many as `in` has from rank `from`, at the same time; none where there is
  /// no such rank.
  void pass_on(std::span<const std::byte> out, std::optional<std::size_t> to, std::span<std::byte> in,
               std::optional<std::size_t> from) const {
    const auto rank_of = [](const auto& r) { return r ? static_cast<int>(*r) : MPI_PROC_NULL; };
    check(MPI_Sendrecv(out.data(), static_cast<int>(out.size()), MPI_BYTE, rank_of(to), 0, in.data(),
                       static_cast<int>(in.size()), MPI_BYTE, rank_of(from), 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE));
  }

  void wait_for_all() const { check(MPI_Barrier(MPI_COMM_WORLD)); }

 private:
  static std::uint64_t hash_of(std::string_view bytes) {  // FNV-1a, eight bytes at a time
    std::uint64_t hash = 0xCBF29CE484222325 ^ bytes.size();
    for (; !bytes.empty(); bytes.remove_prefix(std::min<std::size_t>(8, bytes.size()))) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes.data(), std::min<std::size_t>(8, bytes.size()));
      hash = (hash ^ word) * 0x100000001B3;
    }
    return hash;
  }
  static void check(int code) {
    if (code != MPI_SUCCESS) throw std::runtime_error("MPI: a collective operation failed");
  }
  template <class T>
  void reduce(std::span<T> values, MPI_Datatype type, MPI_Op operation) const {
    check(MPI_Allreduce(MPI_IN_PLACE, values.data(), static_cast<int>(values.size()), type, operation, MPI_COMM_WORLD));
  }

  int rank_ = 0, ranks_ = 1;
};

/// Bytes that MPI_Alltoallv and MPI_Sendrecv have been handed for each other rank. The library's exchange is not asked:
/// moe_engine.cpp puts itself between the two, as MPI lets any program do.
inline std::vector<std::uint64_t>& carried_to() {
  static std::vector<std::uint64_t> bytes;
  return bytes;
}

}  // namespace mpi
