#include "check.hpp"

/// Dispatch and combine over NCCL, with a process for each GPU: 1, 2, 3, 4 and 8 of them, as far as there are so many.
/// What NCCL is handed is counted where it is handed over.

#include <tetromino/comm/nccl.hpp>

#include "../../examples/tools/gpu/gpu_ranks.hpp"
#include "support/memory_exchange.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

std::vector<std::uint64_t> bytes_to;  // what ncclSend was handed for each rank

}  // namespace

extern "C" ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t type, int peer,
                                 ncclComm_t communicator, cudaStream_t stream) {
  if (bytes_to.size() <= static_cast<std::size_t>(peer)) bytes_to.resize(static_cast<std::size_t>(peer) + 1);
  bytes_to[static_cast<std::size_t>(peer)] += type == ncclUint8 ? count : 0;
  return pncclSend(from, count, type, peer, communicator, stream);
}

namespace {

using namespace tetromino_test;
using comm::dispatch_route;
using comm::nccl_exchange;
using moe::entry_rule;
using tetromino::result;

/// Ends the program before any test where there is no GPU; 77 tells ctest that it was skipped.
__attribute__((constructor)) void end_without_a_gpu() {
  if (gpu_ranks::count() > 0) return;
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

/// What is wrong on this rank, in words: its checks are not Catch2's, which runs in another process.
class findings {
 public:
  explicit findings(const gpu_ranks::team& team) : rank_(team.rank()) {}
  template <class... Where>
  void expect(bool condition, const char* what, const Where&... where) {
    if (condition) return;
    if (++count_ <= 10) {
      std::fprintf(stderr, "rank %zu: %s%s\n", rank_, what, tetromino::detail::text(where...).c_str());
    }
  }
  [[nodiscard]] int status() const { return count_ == 0 ? 0 : 1; }

 private:
  std::size_t rank_;
  int count_ = 0;
};

/// One rank on its GPU, and what its exchange needs.
class rank_on_gpu {
 public:
  explicit rank_on_gpu(const gpu_ranks::team& team) : counts_(set_device(team)) {
    require(cudaStreamCreate(&stream));
    ncclUniqueId id{};
    if (team.is_first()) comm::check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId").value();
    comm::check_nccl(ncclCommInitRank(&communicator, static_cast<int>(team.ranks()), team.of_first(id),
                                      static_cast<int>(team.rank())),
                     "ncclCommInitRank")
        .value();
  }
  rank_on_gpu(const rank_on_gpu&) = delete;
  rank_on_gpu& operator=(const rank_on_gpu&) = delete;
  ~rank_on_gpu() {
    ncclCommDestroy(communicator);
    cudaStreamDestroy(stream);
  }
  [[nodiscard]] std::span<std::uint32_t> counts() const {
    return {reinterpret_cast<std::uint32_t*>(counts_.span().data()), counts_.span().size() / sizeof(std::uint32_t)};
  }

  ncclComm_t communicator = nullptr;
  cudaStream_t stream = nullptr;

 private:
  static std::size_t set_device(const gpu_ranks::team& team) {
    require(cudaSetDevice(static_cast<int>(team.rank())));
    return team.ranks() * (team.ranks() + 1) * sizeof(std::uint32_t);
  }
  device_bytes counts_;
};

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// Serves a world by one route; what comes out must be, bit by bit, what ranks that are threads get, and the bytes
/// those of the plans and of the cost model.
void serve_and_compare(const gpu_ranks::team& team, const staged_exchange& staged, const dispatch_world& w,
                       dispatch_route route, entry_rule entry, findings& found) {
  const std::size_t rank = team.rank(), ranks = team.ranks();
  comm::dispatcher<staged_exchange> d(staged, w.cluster, w.k, route, entry);
  bytes_to.assign(ranks, 0);
  const dispatch_outcome got = serve(w, d, rank);
  const std::string where = tetromino::detail::text(": route ", static_cast<int>(route), ", ", ranks, " ranks on ",
                                                    w.cluster.nodes(), " nodes");
  found.expect(got.problem.empty(), got.problem.c_str(), where);
  found.expect(worst_difference(w, rank, got) <= 1e-5, "sums are wrong", where);
  const std::vector<dispatch_outcome> on_cpu = serve_all(w, route, entry);
  found.expect(same_bytes(got.out, on_cpu[rank].out), "sums are not those of ranks that are threads", where);
  if (route == dispatch_route::per_expert) {
    const comm::local_exchange here;
    comm::dispatcher<comm::local_exchange> one(here, w.alone(rank).cluster, w.k, route);
    found.expect(same_bytes(got.out, serve(w.alone(rank), one, 0).out), "sums are not those of one rank", where);
  }

  const std::uint64_t back = w.width * sizeof(float), there = back + d.envelope_bytes();
  for (std::size_t r = 0; r < ranks; ++r) {
    std::uint64_t planned = 0;
    for (std::size_t i = 0; i < d.hops(); ++i) {
      planned += static_cast<std::uint64_t>(d.plan(i).send_counts()[r]) * there +
                 static_cast<std::uint64_t>(d.plan(i).receive_counts()[r]) * back;
    }
    found.expect(r == rank || bytes_to[r] == planned, "expected ", planned, " bytes to rank ", r, ", got ", bytes_to[r],
                 where);
  }
  if (route == dispatch_route::per_rank) return;
  const moe::carried_rows mine = total(got), predicted = w.predicted(rank, route);
  found.expect(team.sum(mine.between_nodes) == team.sum(predicted.between_nodes), "rows between nodes", where);
}

/// Counts that lie in device memory reach the plan as those on the host do.
void exchange_device_offsets(const gpu_ranks::team& team, nccl_exchange& through, findings& found) {
  std::array<std::uint32_t, gpu_ranks::shared_memory::most_ranks + 1> offsets{};
  for (std::size_t r = 0; r < team.ranks(); ++r) {
    offsets[r + 1] = offsets[r] + static_cast<std::uint32_t>((team.rank() * 5 + r * 3) % 7);
  }
  const device_bytes there((team.ranks() + 1) * sizeof(std::uint32_t));
  require(cudaMemcpy(there.span().data(), offsets.data(), there.span().size(), cudaMemcpyHostToDevice));
  const std::span<const std::uint32_t> on_device(reinterpret_cast<const std::uint32_t*>(there.span().data()),
                                                 team.ranks() + 1);
  moe::dispatch_plan plan(team.ranks(), 2);
  through.try_exchange_counts(plan, on_device).value();
  const auto all = team.gather(offsets);
  for (std::size_t r = 0; r < team.ranks(); ++r) {
    const std::uint32_t to_me = all[r][team.rank() + 1] - all[r][team.rank()];
    found.expect(static_cast<std::uint32_t>(plan.send_counts()[r]) == offsets[r + 1] - offsets[r], "rows to rank ", r);
    found.expect(static_cast<std::uint32_t>(plan.receive_counts()[r]) == to_me, "rows from rank ", r);
  }
  found.expect(plan.sent() == offsets[team.ranks()], "rows sent");
  const auto refused = through.try_exchange_counts(plan, on_device.first(team.ranks()));
  found.expect(!refused && std::string(refused.error().what()).find("offsets, got") != std::string::npos,
               "too few offsets");
}

int dispatch_and_combine(const gpu_ranks::team& team) {
  findings found(team);
  const rank_on_gpu gpu(team);
  auto through = nccl_exchange::try_make(gpu.communicator, gpu.stream, gpu.counts()).value();
  const staged_exchange staged(through, gpu.stream);
  reference::generator random(seed());  // the same on all ranks
  for (const std::size_t nodes : {0U, 1U, 2U, 4U}) {
    if (nodes > team.ranks()) continue;
    for (int round = 0; round < 8; ++round) {
      const dispatch_world w(team.ranks(), random.bits(), nodes);
      const entry_rule entry = random.below(2) == 0 ? entry_rule::same_local_number : entry_rule::leader;
      for (const dispatch_route route :
           {dispatch_route::per_node, dispatch_route::per_rank, dispatch_route::per_expert}) {
        serve_and_compare(team, staged, w, route, entry, found);
      }
    }
  }
  exchange_device_offsets(team, through, found);
  return found.status();
}

TEST_CASE("nccl: rows meet their experts and come back added up, by every route") {
  const std::size_t gpus = gpu_ranks::count();
  if (gpus < 2) WARN("one GPU: nothing was exchanged between GPUs");
  for (const std::size_t ranks : {1U, 2U, 3U, 4U, 8U}) {
    if (ranks > gpus) continue;
    std::printf("%zu ranks, each with a GPU\n", ranks);
    INFO(ranks << " ranks");
    CHECK(gpu_ranks::run(ranks, dispatch_and_combine) == 0);
  }
}

int refuse(const gpu_ranks::team& team) {
  findings found(team);
  const rank_on_gpu gpu(team);
  const auto says = [](const auto& r, const char* words) {
    return !r && std::string(r.error().what()).find(words) != std::string::npos;
  };
  found.expect(says(nccl_exchange::try_make(gpu.communicator, nullptr, gpu.counts().first(1)),
                    "room for 2 counts in device memory, got 1"),
               "too little room for counts");
  found.expect(!nccl_exchange::try_make(nullptr, nullptr, gpu.counts()), "no communicator");
  auto through = nccl_exchange::try_make(gpu.communicator, nullptr, gpu.counts()).value();
  moe::dispatch_plan other(3, 1);
  found.expect(says(through.try_exchange_counts(other), "expected a plan for 1 ranks, got 3"), "a plan for others");
  found.expect(bool(through.try_check()), "an error without a cause");

  const moe::dispatch_plan nothing(1, 1);
  std::byte one{};
  const auto is_caught = [](const auto& call) {
    try {
      static_cast<void>(call());
    } catch (const precondition_failed&) {
      return true;
    }
    return false;
  };
  found.expect(is_caught([&] { return through.try_send_rows(nothing, {&one, 1}, {}, 1); }), "a row too many there");
  found.expect(is_caught([&] { return through.try_return_rows(nothing, {}, {&one, 1}, 1); }), "a row too many back");
  return found.status();
}

TEST_CASE("nccl: errors name the call and NCCL's result") {
  const auto r = comm::check_nccl(ncclInvalidUsage, "ncclSend");
  REQUIRE_FALSE(r);
  CHECK(r.error().code() == tetromino::errc::io);
  CHECK_THAT(r.error().what(), contains("ncclSend failed: ncclInvalidUsage ("));
  CHECK(comm::check_nccl(ncclSuccess, "ncclSend"));
  CHECK(comm::check_nccl(ncclInProgress, "ncclSend"));
  CHECK(gpu_ranks::run(1, refuse) == 0);
}

TEST_CASE("gpu_ranks: what ranks say to each other, and how they end") {
  const auto talk = [](const gpu_ranks::team& t) {
    const std::size_t of_first = t.of_first(t.rank() + 10), sum = t.sum(t.rank()), most = t.largest(t.rank());
    return of_first == 10 && sum == 3 && most == 2 && t.gather(t.rank()) == std::vector<std::size_t>{0, 1, 2} ? 0 : 1;
  };
  CHECK(gpu_ranks::run(3, talk) == 0);
  CHECK(gpu_ranks::run(3, [](const gpu_ranks::team& t) { return static_cast<int>(t.rank()); }) == 2);
  const auto fail = [](const gpu_ranks::team& t) {
    if (t.rank() == 1) throw std::runtime_error("on purpose");
    t.wait_for_all();  // would wait for ever
    return 0;
  };
  CHECK(gpu_ranks::run(3, fail) == gpu_ranks::gave_up);
}

}  // namespace
