/// Linked to tests that run under MPI: starts MPI before the test cases and ends it after them.

#include <mpi.h>

namespace {

struct mpi_session {
  mpi_session() { MPI_Init(nullptr, nullptr); }
  mpi_session(const mpi_session&) = delete;
  mpi_session& operator=(const mpi_session&) = delete;
  ~mpi_session() { MPI_Finalize(); }
} session;

}  // namespace
