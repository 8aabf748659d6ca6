#include "check.hpp"

/// Dispatch and combine over MPI: run with 1, 2 and 4 ranks. What MPI is handed is counted where it is handed over.

#include <tetromino/comm/mpi.hpp>

#include "support/dispatch_world.hpp"

namespace {

std::vector<std::uint64_t> bytes_to;  // what MPI_Alltoallv was handed for each rank

}  // namespace

extern "C" int MPI_Alltoallv(const void* from, const int* send_counts, const int* send_offsets, MPI_Datatype send_type,
                             void* to, const int* receive_counts, const int* receive_offsets, MPI_Datatype receive_type,
                             MPI_Comm communicator) {
  int size = 0, ranks = 0;
  PMPI_Type_size(send_type, &size);
  PMPI_Comm_size(communicator, &ranks);
  bytes_to.resize(static_cast<std::size_t>(ranks));
  for (std::size_t r = 0; r < bytes_to.size(); ++r) {
    bytes_to[r] += static_cast<std::uint64_t>(send_counts[r]) * static_cast<std::uint64_t>(size);
  }
  return PMPI_Alltoallv(from, send_counts, send_offsets, send_type, to, receive_counts, receive_offsets, receive_type,
                        communicator);
}

namespace {

using namespace tetromino_test;
using comm::dispatch_route;
using comm::mpi_exchange;
using moe::entry_rule;
static_assert(comm::exchange<mpi_exchange>);

std::uint64_t sum_over_ranks(std::uint64_t mine) {
  MPI_Allreduce(MPI_IN_PLACE, &mine, 1, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
  return mine;
}

TEST_CASE("mpi: rows meet their experts and come back added up, by every route") {
  const mpi_exchange through(MPI_COMM_WORLD);
  const std::size_t rank = through.rank(), ranks = through.ranks();
  reference::generator random(seed());  // the same on all ranks
  for (int round = 0; round < 40; ++round) {
    const dispatch_world w(ranks, random.bits());
    for (const dispatch_route route :
         {dispatch_route::per_node, dispatch_route::per_rank, dispatch_route::per_expert}) {
      const entry_rule entry = random.below(2) == 0 ? entry_rule::same_local_number : entry_rule::leader;
      comm::dispatcher<mpi_exchange> d(through, w.cluster, w.k, route, entry);
      bytes_to.assign(ranks, 0);
      const dispatch_outcome got = serve(w, d, rank);
      INFO("round " << round << ", route " << static_cast<int>(route) << ", rank " << rank << " of " << ranks);
      CHECK(got.problem.empty());
      CHECK(worst_difference(w, rank, got) <= 1e-5);

      // bytes between nodes: as the plans say, and as the cost model says
      std::uint64_t measured = 0;
      for (std::size_t r = 0; r < ranks; ++r) {
        if (w.cluster.node_of_gpu(r) != w.cluster.node_of_gpu(rank)) measured += bytes_to[r];
      }
      const std::uint64_t dispatch_bytes = w.width * sizeof(float) + d.envelope_bytes();
      const std::uint64_t combine_bytes = w.width * sizeof(float);
      const std::uint64_t all = sum_over_ranks(measured);
      const std::uint64_t planned = sum_over_ranks(total(got).between_nodes);
      CHECK(all == planned * (dispatch_bytes + combine_bytes));
      if (route != dispatch_route::per_rank) {
        CHECK(planned == sum_over_ranks(w.predicted(rank, route).between_nodes));
      }
    }
  }
}

TEST_CASE("mpi: works over any communicator of the caller") {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm part;
  MPI_Comm_split(MPI_COMM_WORLD, rank % 2, -rank, &part);
  {
    const mpi_exchange through(part);
    const dispatch_world w(through.ranks(), seed() + static_cast<std::uint64_t>(rank % 2));
    comm::dispatcher<mpi_exchange> d(through, w.cluster, w.k);
    const dispatch_outcome got = serve(w, d, through.rank());
    CHECK(got.problem.empty());
    CHECK(worst_difference(w, through.rank(), got) <= 1e-5);
  }
  MPI_Comm_free(&part);
}

TEST_CASE("mpi: errors name the call and what MPI says of it") {
  const auto r = comm::check_mpi(MPI_ERR_COUNT, "MPI_Alltoallv");
  REQUIRE_FALSE(r);
  CHECK(r.error().code() == tetromino::errc::io);
  CHECK_THAT(r.error().what(), contains("MPI_Alltoallv failed: "));
  CHECK(std::string(r.error().what()).size() > std::string("MPI_Alltoallv failed: ").size());
  CHECK(comm::check_mpi(MPI_SUCCESS, "MPI_Alltoallv"));

  const mpi_exchange through(MPI_COMM_WORLD);
  moe::dispatch_plan plan(through.ranks() + 1, 1);
  const auto mismatch = through.try_exchange_counts(plan);
  REQUIRE_FALSE(mismatch);
  CHECK_THAT(mismatch.error().what(), contains("expected a plan for " + std::to_string(through.ranks()) + " ranks"));
}

TEST_CASE("mpi: an error inside MPI comes back where the communicator returns errors") {
  MPI_Comm own;
  MPI_Comm_dup(MPI_COMM_WORLD, &own);
  MPI_Comm_set_errhandler(own, MPI_ERRORS_RETURN);
  const mpi_exchange through(own);
  moe::dispatch_plan plan(through.ranks(), 1);
  plan.plan_send({}, {});
  plan.plan_receive(plan.send_counts());
  const auto r = through.try_send_rows(plan, {}, {}, std::size_t{1} << 40);
  REQUIRE_FALSE(r);
  CHECK_THAT(r.error().what(), contains("expected rows below 2 GiB"));
  CHECK(through.try_send_rows(plan, {}, {}, 4));
  MPI_Comm_free(&own);
}

TEST_CASE("mpi: buffers of another size than the plan's are the caller's fault") {
  const mpi_exchange through(MPI_COMM_WORLD);
  const moe::dispatch_plan nothing(through.ranks(), 1);
  std::byte one{};
  CHECK_THROWS_AS(through.try_send_rows(nothing, {&one, 1}, {}, 1), precondition_failed);
  CHECK_THROWS_AS(through.try_return_rows(nothing, {}, {&one, 1}, 1), precondition_failed);
}

}  // namespace
