#include "check.hpp"

/// Dispatch and combine over NCCL, a thread for each GPU that there is.

#include <tetromino/comm/nccl.hpp>

#include "support/dispatch_world.hpp"

#include <cstdio>
#include <cstdlib>
#include <thread>

namespace {

using namespace tetromino_test;
using comm::dispatch_route;
using comm::nccl_exchange;
using tetromino::result;

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

/// Ends the program before any test where there is no GPU; 77 tells ctest that it was skipped.
__attribute__((constructor)) void end_without_a_gpu() {
  if (device_count() > 0) return;
  std::puts("skipped: no CUDA device");
  std::fflush(stdout);
  std::_Exit(77);
}

void require(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorName(code));
}

class device_bytes {
 public:
  explicit device_bytes(std::size_t n) : size_(n) { require(cudaMalloc(&data_, n == 0 ? 1 : n)); }
  device_bytes(const device_bytes&) = delete;
  device_bytes& operator=(const device_bytes&) = delete;
  ~device_bytes() { cudaFree(data_); }
  [[nodiscard]] std::span<std::byte> span() const { return {static_cast<std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  std::size_t size_;
};

/// Host memory in and out, NCCL in between.
class staged_exchange {
 public:
  staged_exchange(nccl_exchange& e, cudaStream_t stream) : e_(e), stream_(stream) {}
  [[nodiscard]] std::size_t rank() const { return e_.rank(); }
  [[nodiscard]] std::size_t ranks() const { return e_.ranks(); }
  [[nodiscard]] result<void> try_exchange_counts(moe::dispatch_plan& plan) const {
    return e_.try_exchange_counts(plan);
  }
  [[nodiscard]] result<void> try_send_rows(const moe::dispatch_plan& plan, std::span<const std::byte> from,
                                           std::span<std::byte> to, std::size_t row_bytes) const {
    return staged(from, to, [&](auto a, auto b) { return e_.try_send_rows(plan, a, b, row_bytes); });
  }
  [[nodiscard]] result<void> try_return_rows(const moe::dispatch_plan& plan, std::span<const std::byte> from,
                                             std::span<std::byte> to, std::size_t row_bytes) const {
    return staged(from, to, [&](auto a, auto b) { return e_.try_return_rows(plan, a, b, row_bytes); });
  }

 private:
  template <class Move>
  [[nodiscard]] result<void> staged(std::span<const std::byte> from, std::span<std::byte> to, const Move& move) const {
    const device_bytes a(from.size()), b(to.size());
    if (!from.empty()) require(cudaMemcpy(a.span().data(), from.data(), from.size(), cudaMemcpyHostToDevice));
    if (auto done = move(a.span(), b.span()); !done) return done;
    require(cudaStreamSynchronize(stream_));
    if (!to.empty()) require(cudaMemcpy(to.data(), b.span().data(), to.size(), cudaMemcpyDeviceToHost));
    return e_.try_check();
  }

  nccl_exchange& e_;
  cudaStream_t stream_;
};
static_assert(comm::exchange<staged_exchange>);

struct communicators {
  std::vector<ncclComm_t> all;
  explicit communicators(int count) : all(static_cast<std::size_t>(count)) {
    if (ncclCommInitAll(all.data(), count, nullptr) != ncclSuccess) throw std::runtime_error("ncclCommInitAll");
  }
  communicators(const communicators&) = delete;
  communicators& operator=(const communicators&) = delete;
  ~communicators() {
    for (const ncclComm_t c : all) ncclCommDestroy(c);
  }
};

TEST_CASE("nccl: rows meet their experts and come back added up, by every route") {
  const communicators comms(device_count());
  const std::size_t ranks = comms.all.size();
  std::printf("ranks, each with a GPU: %zu\n", ranks);
  reference::generator random(seed());
  for (int round = 0; round < 20; ++round) {
    const dispatch_world w(ranks, random.bits());
    for (const dispatch_route route :
         {dispatch_route::per_node, dispatch_route::per_rank, dispatch_route::per_expert}) {
      std::vector<dispatch_outcome> got(ranks);
      std::vector<std::thread> threads;
      for (std::size_t r = 0; r < ranks; ++r) {
        threads.emplace_back([&, r] {
          require(cudaSetDevice(static_cast<int>(r)));
          cudaStream_t stream;
          require(cudaStreamCreate(&stream));
          {
            const device_bytes counts(2 * ranks * sizeof(std::int32_t));
            auto through = nccl_exchange::try_make(comms.all[r], stream,
                                                   {reinterpret_cast<std::int32_t*>(counts.span().data()), 2 * ranks})
                               .value();
            const staged_exchange staged(through, stream);
            comm::dispatcher<staged_exchange> d(staged, w.cluster, w.k, route);
            got[r] = serve(w, d, r);
          }
          require(cudaStreamDestroy(stream));
        });
      }
      for (auto& t : threads) t.join();
      for (std::size_t r = 0; r < ranks; ++r) {
        CHECK(got[r].problem.empty());
        CHECK(worst_difference(w, r, got[r]) <= 1e-5);
      }
    }
  }
}

TEST_CASE("nccl: errors name the call and NCCL's result") {
  const auto r = comm::check_nccl(ncclInvalidUsage, "ncclSend");
  REQUIRE_FALSE(r);
  CHECK(r.error().code() == tetromino::errc::io);
  CHECK_THAT(r.error().what(), contains("ncclSend failed: ncclInvalidUsage ("));
  CHECK(comm::check_nccl(ncclSuccess, "ncclSend"));
  CHECK(comm::check_nccl(ncclInProgress, "ncclSend"));

  const communicators comms(1);
  const device_bytes counts(2 * sizeof(std::int32_t));
  const std::span<std::int32_t> room(reinterpret_cast<std::int32_t*>(counts.span().data()), 2);
  const auto small = nccl_exchange::try_make(comms.all[0], nullptr, room.first(1));
  REQUIRE_FALSE(small);
  CHECK_THAT(small.error().what(), contains("room for 2 counts in device memory, got 1"));
  CHECK_FALSE(nccl_exchange::try_make(nullptr, nullptr, room));

  auto through = nccl_exchange::try_make(comms.all[0], nullptr, room).value();
  moe::dispatch_plan other(3, 1);
  const auto mismatch = through.try_exchange_counts(other);
  REQUIRE_FALSE(mismatch);
  CHECK_THAT(mismatch.error().what(), contains("expected a plan for 1 ranks, got 3"));
  CHECK(through.try_check());
}

}  // namespace
