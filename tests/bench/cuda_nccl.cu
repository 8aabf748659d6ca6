/// How fast rows reach their experts over NCCL and come back, on all GPUs of this host, against the rate of the links
/// and plainer exchanges of the same bytes:
///   bench_cuda_nccl [--gpus N] [ROUTING.safetensors]     default: all GPUs, examples/data/routing-128x8.safetensors
/// One layer of the recorded routing, rows of 7168 bfloat16. A step's time is the slowest rank's, the median of runs.

#include "../../examples/tools/gpu/gpu_ranks.hpp"
#include "../../examples/tools/gpu/nccl_dispatch.hpp"
#include "bundled_routing.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/place_local.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

namespace {

namespace moe = tetromino::moe;
using moe::row_copies;
using tetromino::bfloat16;
using tetromino::comm::check_nccl;

constexpr std::size_t width = 7168, layer = 4, k = 8;

/// Requests that plans are made from, and requests that are served: every other one.
struct halves {
  moe::trace all;
  std::vector<moe::request> calibration, served;

  explicit halves(const std::string& path) : all(bundled::read_routing(path)) {
    for (std::size_t r = 0; r < all.requests().size(); ++r) {
      (r % 2 == 0 ? calibration : served).push_back(all.requests()[r]);
    }
  }
};

/// Where experts are, and on which node each served request runs.
struct plan {
  moe::topology cluster;
  moe::placement experts;
  std::vector<std::uint32_t> node_of_request;
};
plan contiguous(const halves& h, std::size_t nodes, std::size_t gpus) {
  plan out{moe::topology::with_node_slots(nodes, gpus / nodes, (128 + nodes - 1) / nodes), {}, {}};
  out.experts = moe::contiguous(8, 128, out.cluster);
  for (std::size_t r = 0; r < h.served.size(); ++r) out.node_of_request.push_back(std::uint32_t(r % nodes));
  return out;
}
plan local(const halves& h, std::size_t nodes, std::size_t gpus) {
  plan out = contiguous(h, nodes, gpus);
  const moe::trace_view calibration = h.all.view().with(h.calibration);
  moe::local_options options;
  options.served = moe::phase::all;
  out.experts = moe::local(calibration, out.cluster, options).experts;
  const auto affinity = moe::node_affinity::make(out.experts, out.cluster, calibration);
  moe::signature_builder builder = affinity.builder();
  std::vector<moe::request_signature> signatures;
  std::vector<std::uint64_t> tokens;
  for (const moe::request& r : h.served) {
    signatures.push_back(moe::signature_of(h.all.view(), r, builder));
    tokens.push_back(r.tokens);
  }
  out.node_of_request = moe::group(affinity, signatures, tokens);
  return out;
}

/// Ids of so many tokens of the requests that run on a rank; where they are too few, again from the first.
std::vector<std::uint16_t> ids_of_rank(const halves& h, const plan& p, std::size_t rank, std::size_t tokens) {
  std::vector<std::uint16_t> out;
  std::vector<std::size_t> turn(p.cluster.nodes(), 0);
  const std::size_t node = p.cluster.node_of_gpu(rank), number = rank - p.cluster.first_gpu(node);
  for (std::size_t r = 0; r < h.served.size(); ++r) {
    if (p.node_of_request[r] != node || turn[node]++ % p.cluster.gpus_on_node(node) != number) continue;
    for (std::uint64_t t = 0; t < h.served[r].tokens; ++t) {
      const auto ids = h.all.view().experts_of(h.served[r].first_token + t, layer);
      out.insert(out.end(), ids.begin(), ids.end());
    }
  }
  if (out.empty()) throw std::runtime_error("a rank without requests");
  for (std::size_t i = 0; out.size() < tokens * k; ++i) out.push_back(out[i]);
  out.resize(tokens * k);
  return out;
}

/// One rank, its stream and communicator, and timing among all ranks.
class bench_rank {
 public:
  explicit bench_rank(const gpu_ranks::team& t) : team(t) {
    check(cudaSetDevice(int(t.rank())), "cudaSetDevice");
    check(cudaStreamCreate(&s.handle), "cudaStreamCreate");
    ncclUniqueId id{};
    if (t.is_first()) check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId").value();
    check_nccl(ncclCommInitRank(&communicator, int(t.ranks()), t.of_first(id), int(t.rank())), "ncclCommInitRank")
        .value();
    for (cudaEvent_t& e : events_) check(cudaEventCreate(&e), "cudaEventCreate");
  }
  bench_rank(const bench_rank&) = delete;
  bench_rank& operator=(const bench_rank&) = delete;
  ~bench_rank() {
    for (cudaEvent_t& e : events_) cudaEventDestroy(e);
    ncclCommDestroy(communicator);
    cudaStreamDestroy(s.handle);
  }

  /// Microseconds of each step, and of all of them: medians of `runs`, the slowest rank's.
  template <class... Steps>
  std::array<double, sizeof...(Steps) + 1> time(int runs, const Steps&... steps) {
    constexpr std::size_t n = sizeof...(Steps);
    static_assert(n + 1 <= most_events);
    std::array<std::vector<double>, n + 1> all;
    for (int run = -3; run < runs; ++run) {
      check(cudaStreamSynchronize(s.handle), "a timed step");
      team.wait_for_all();
      std::size_t i = 0;
      check(cudaEventRecord(events_[0], s.handle), "cudaEventRecord");
      (
          [&] {
            steps();
            check(cudaEventRecord(events_[++i], s.handle), "cudaEventRecord");
          }(),
          ...);
      check(cudaStreamSynchronize(s.handle), "a timed step");
      if (run < 0) continue;
      for (std::size_t j = 0; j < n; ++j) all[j].push_back(microseconds(j, j + 1));
      all[n].push_back(microseconds(0, n));
    }
    std::array<double, n + 1> medians{}, out{};
    for (std::size_t j = 0; j <= n; ++j) {
      std::sort(all[j].begin(), all[j].end());
      medians[j] = all[j][all[j].size() / 2];
    }
    for (const auto& of_rank : team.gather(medians)) {
      for (std::size_t j = 0; j <= n; ++j) out[j] = std::max(out[j], of_rank[j]);
    }
    return out;
  }
  /// The same for one step alone, eight times in a row.
  template <class Step>
  double time_in_a_row(const Step& step) {
    return time(9,
                [&] {
                  for (int i = 0; i < 8; ++i) step();
                })[0] /
           8;
  }

  /// Each rank to the next, `bytes` both ways at once.
  double ring(std::byte* from, std::byte* to, std::size_t bytes) {
    const int next = int((team.rank() + 1) % team.ranks());
    const int previous = int((team.rank() + team.ranks() - 1) % team.ranks());
    return time_in_a_row([&] {
      check_nccl(ncclGroupStart(), "ncclGroupStart").value();
      check_nccl(ncclSend(from, bytes, ncclUint8, next, communicator, s.handle), "ncclSend").value();
      check_nccl(ncclRecv(to, bytes, ncclUint8, previous, communicator, s.handle), "ncclRecv").value();
      check_nccl(ncclGroupEnd(), "ncclGroupEnd").value();
    });
  }
  /// `bytes` from each rank to each other one, and to itself.
  double all_to_all(std::byte* from, std::byte* to, std::size_t bytes) {
    return time_in_a_row([&] {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
      check_nccl(ncclAlltoAll(from, to, bytes, ncclUint8, communicator, s.handle), "ncclAlltoAll").value();
#else
      check_nccl(ncclGroupStart(), "ncclGroupStart").value();
      for (std::size_t r = 0; r < team.ranks(); ++r) {
        check_nccl(ncclSend(from + r * bytes, bytes, ncclUint8, int(r), communicator, s.handle), "ncclSend").value();
        check_nccl(ncclRecv(to + r * bytes, bytes, ncclUint8, int(r), communicator, s.handle), "ncclRecv").value();
      }
      check_nccl(ncclGroupEnd(), "ncclGroupEnd").value();
#endif
    });
  }
  /// A copy engine's writes to the next GPU's memory, all ranks at once; 0 where processes may not share memory.
  double peer_copy(std::byte* from, std::byte* to, std::size_t bytes) {
    cudaIpcMemHandle_t handle{};
    bool works = cudaIpcGetMemHandle(&handle, to) == cudaSuccess;
    const auto handles = team.gather(handle);
    void* next = nullptr;
    works = works && cudaIpcOpenMemHandle(&next, handles[(team.rank() + 1) % team.ranks()],
                                          cudaIpcMemLazyEnablePeerAccess) == cudaSuccess;
    static_cast<void>(cudaGetLastError());
    double us = 0;
    if (team.sum(int(works)) == int(team.ranks())) {
      us = time_in_a_row(
          [&] { check(cudaMemcpyAsync(next, from, bytes, cudaMemcpyDeviceToDevice, s.handle), "the copy to a peer"); });
    }
    if (next != nullptr) check(cudaIpcCloseMemHandle(next), "cudaIpcCloseMemHandle");
    return us;
  }

  const gpu_ranks::team& team;
  tetromino::cuda::stream s;
  ncclComm_t communicator = nullptr;

 private:
  static constexpr std::size_t most_events = 12;
  double microseconds(std::size_t from, std::size_t to) {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events_[from], events_[to]), "cudaEventElapsedTime");
    return 1e3 * double(ms);
  }
  cudaEvent_t events_[most_events] = {};
};

/// What one batch sends, and how long that takes.
struct measured {
  std::uint64_t most_bytes = 0;     ///< to other GPUs, by the rank that sends most or gets most
  std::uint64_t rows = 0;           ///< to other GPUs, of all ranks
  std::uint64_t between_nodes = 0;  ///< those of them that leave their node
  std::array<double, 6> there{};    ///< plan, counts, pack, send, group; all
  std::array<double, 4> back{};     ///< answer, send, add; all
  double send = 0;                  ///< the exchange of rows alone
};
measured measure(bench_rank& b, const halves& h, const plan& p, std::size_t tokens, row_copies copies) {
  const std::size_t rank = b.team.rank(), ranks = b.team.ranks();
  const std::vector<std::uint16_t> chosen = ids_of_rank(h, p, rank, tokens);
  const device_array<std::uint16_t> ids{std::span<const std::uint16_t>(chosen)};
  const device_array<float> weights{std::span<const float>(std::vector<float>(tokens * k, 1.0f / k))};
  const device_array<bfloat16> x(tokens * width), out(tokens * width);
  check(cudaMemset(x.data, 0x3C, x.size * sizeof(bfloat16)), "cudaMemset");
  nccl_dispatch d(b.communicator, b.s, p.cluster, p.experts, layer, rank, k, width, copies, tokens);
  d.dispatch(ids.span(), weights.span(), x.span());
  const std::size_t pairs = d.pairs();
  const device_array<bfloat16> y(pairs * width);

  measured m;
  m.there = b.time(
      15, [&] { d.plan(ids.span(), weights.span()); }, [&] { d.exchange_counts(); }, [&] { d.pack(x.span()); },
      [&] { d.send(); },
      [&] {
        d.group();
        d.expert_inputs(y.span());
      });
  m.back = b.time(
      15, [&] { d.answer(y.span()); }, [&] { d.send_back(); }, [&] { d.add_up(weights.span(), out.span()); });
  m.send = b.time_in_a_row([&] { d.send(); });
  std::uint64_t sent = 0, got = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    if (r == rank) continue;
    sent += std::uint64_t(d.counts().send_counts()[r]);
    got += std::uint64_t(d.counts().receive_counts()[r]);
  }
  m.rows = b.team.sum(sent);
  m.between_nodes = b.team.sum(moe::rows_carried(d.counts(), p.cluster, rank).between_nodes);
  m.most_bytes = b.team.largest(std::max(sent, got)) * d.bytes_there();
  return m;
}

double gigabytes_per_second(std::uint64_t bytes, double us) { return us > 0 ? double(bytes) / us * 1e-3 : 0; }

void by_tokens(bench_rank& b, const halves& h, double link) {
  const std::size_t ranks = b.team.ranks();
  const plan p = contiguous(h, 1, ranks);
  if (b.team.is_first()) {
    std::printf(
        "\nContiguous experts, requests in turn, a row once to each GPU. Microseconds; the bytes are those of the\n"
        "busiest GPU, as are those of the all-to-all and the ring; at link: bytes at the rate of the best ring or "
        "copy\n"
        "tokens       MB  at link |  rows   GB/s  all-to-all   ring | plan counts pack  send group  dispatch | answer  "
        "send   add  combine\n");
  }
  for (const std::size_t tokens : {16U, 64U, 256U, 1024U, 4096U, 8192U}) {
    const measured m = measure(b, h, p, tokens, row_copies::per_rank);
    const std::size_t to_each = m.most_bytes / (ranks - 1) / 16 * 16;
    device_array<std::byte> from(std::max<std::size_t>(m.most_bytes, ranks * to_each)), to(from.size);
    const double all_to_all = b.all_to_all(from.data, to.data, to_each);
    const double ring = b.ring(from.data, to.data, m.most_bytes);
    if (!b.team.is_first()) continue;
    std::printf(
        "%6zu %8.2f %8.1f |%6.1f %6.1f %11.1f %6.1f |%5.1f %6.1f %4.1f %5.1f %5.1f %9.1f | %6.1f %5.1f %5.1f %8.1f\n",
        tokens, double(m.most_bytes) * 1e-6, double(m.most_bytes) / link * 1e-3, m.send,
        gigabytes_per_second(m.most_bytes, m.send), all_to_all, ring, m.there[0], m.there[1], m.there[2], m.there[3],
        m.there[4], m.there[5], m.back[0], m.back[1], m.back[2], m.back[3]);
  }
}

void by_plan(bench_rank& b, const halves& h) {
  const std::size_t ranks = b.team.ranks(), tokens = 4096;
  if (b.team.is_first()) {
    std::printf(
        "\n%zu tokens on each GPU, which count as those of so many nodes; a row once to each GPU, or once for each\n"
        "expert. Rows are of all GPUs, MB of the busiest; microseconds\n"
        "nodes experts     copies       rows/token  between nodes       MB    rows  dispatch  combine\n",
        tokens);
  }
  for (const std::size_t nodes : std::set<std::size_t>{1, 2, ranks}) {
    if (ranks % nodes != 0) continue;
    for (const bool is_local : {false, true}) {
      const plan p = is_local ? local(h, nodes, ranks) : contiguous(h, nodes, ranks);
      for (const row_copies copies : {row_copies::per_rank, row_copies::per_expert}) {
        const measured m = measure(b, h, p, tokens, copies);
        if (!b.team.is_first()) continue;
        const double all = double(tokens * ranks);
        std::printf("%5zu %-11s %-11s %11.3f %14.3f %8.2f %7.1f %9.1f %8.1f\n", nodes,
                    is_local ? "local" : "contiguous", copies == row_copies::per_rank ? "per rank" : "per expert",
                    double(m.rows) / all, double(m.between_nodes) / all, double(m.most_bytes) * 1e-6, m.send,
                    m.there[5], m.back[3]);
      }
    }
  }
}

int run(const gpu_ranks::team& team, const std::string& path) {
  const halves h(path);
  bench_rank b(team);
  double link = 0;
  {
    constexpr std::size_t bytes = std::size_t{256} << 20;
    const device_array<std::byte> from(bytes), to(bytes);
    const double copy = gigabytes_per_second(bytes, b.peer_copy(from.data, to.data, bytes));
    const double ring = gigabytes_per_second(bytes, b.ring(from.data, to.data, bytes));
    link = std::max(copy, ring);
    int version = 0;
    check_nccl(ncclGetVersion(&version), "ncclGetVersion").value();
    if (team.is_first()) {
      std::printf("%zu GPUs, NCCL %d; each to the next and from the one before it, 256 MiB: ", team.ranks(), version);
      if (copy > 0) std::printf("copies to a peer %.0f GB/s, ", copy);
      std::printf("ncclSend %.0f GB/s\n", ring);
    }
  }
  by_tokens(b, h, link);
  by_plan(b, h);
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  std::size_t gpus = gpu_ranks::count();
  if (gpus < 2) {
    std::printf("skipped: expected two GPUs or more, found %zu\n", gpus);
    return 77;
  }
  std::string path = "examples/data/routing-128x8.safetensors";
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--gpus" && i + 1 < argc) {
      const std::size_t wanted = std::strtoull(argv[++i], nullptr, 10);
      if (wanted < 2 || wanted > gpus) throw std::runtime_error("--gpus: expected 2 to " + std::to_string(gpus));
      gpus = wanted;
    } else {
      path = argv[i];
    }
  }
  return gpu_ranks::run(gpus, [&](const gpu_ranks::team& team) { return run(team, path); });
} catch (const std::exception& e) {
  std::fprintf(stderr, "bench_cuda_nccl: %s\n", e.what());
  return 1;
}
