/// One mixture-of-experts layer over the GPUs of this host, a process for each, through NCCL: route, dispatch, grouped
/// products from 4-bit weights, combine. Each rank holds the experts that a placement gives it. Checks the outputs
/// against the same layer on one GPU, and the bytes that NCCL is handed against what was planned.
///   nccl_moe_layer [--gpus N] [--tokens N]     default: all GPUs that there are, 256 tokens on each

#include "gpu/cuda_layer.hpp"
#include "gpu/gpu_ranks.hpp"
#include "gpu/nccl_dispatch.hpp"

#include <tetromino/moe/place.hpp>
#include <tetromino/moe/placement.hpp>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

namespace tt = tetromino;
using tt::bfloat16;
using tt::comm::check_nccl;
using tt::moe::row_copies;

constexpr std::size_t hidden = 4096, inner = 1536, experts = 128, k = 8;  // as in Qwen3-235B-A22B
const tt::recipe weights_as = tt::recipe::parse("mxfp4-32/oas/mbs-static");

std::uint64_t bytes_to_others = 0;  // what NCCL was handed for other ranks

/// The tokens of all ranks and where the router sends them, alike on all ranks.
struct tokens {
  std::size_t count;
  device_array<bfloat16> x;
  device_array<float> logits, weights;
  device_array<std::uint16_t> ids;

  /// Each rank's tokens are routed in a call of their own, as the rank does it: in a call with more tokens another
  /// kernel may route them, to weights that differ in the last places.
  tokens(const tt::cuda::stream& s, std::size_t ranks, std::size_t each)
      : count(ranks * each), x(count * hidden), logits(count * experts), weights(count * k), ids(count * k) {
    fill(s.handle, x.data, x.size, 4000, 1.0f);
    fill(s.handle, logits.data, logits.size, 5000, 2.0f);
    for (std::size_t r = 0; r < ranks; ++r) route(s, r * each, each);
  }
  void route(const tt::cuda::stream& s, std::size_t first, std::size_t n) const {
    tt::moe::router_options options;
    options.experts_per_token = k;
    tt::cuda::route(s, logits.span().subspan(first * experts, n * experts), experts, options,
                    ids.span().subspan(first * k, n * k), weights.span().subspan(first * k, n * k));
  }
};

/// The layer on one GPU, with the products of each rank's experts after those of another's: kernels add up in an order
/// that follows from the shapes, so this way all sums are those that the ranks make.
std::vector<bfloat16> on_one_gpu(const tt::cuda::stream& s, const tokens& all, const tt::moe::topology& cluster,
                                 const tt::moe::placement& where) {
  const tt::moe::replica_index index(where);
  const std::vector<std::uint16_t> ids = all.ids.host();
  std::vector<tt::moe::expert_call> slots(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) slots[i].slot = index.slots_of(0, ids[i])[0];
  const device_array<tt::moe::expert_call> calls{std::span<const tt::moe::expert_call>(slots)};
  const device_array<std::uint32_t> offsets(cluster.slots() + 1);
  const device_array<std::uint32_t> rows(ids.size());
  const device_array<std::uint32_t> pairs(ids.size());
  const device_array<bfloat16> grouped(ids.size() * hidden);
  const device_array<bfloat16> y(ids.size() * hidden);
  const device_array<bfloat16> out(all.count * hidden);
  const tt::cuda::expert_groups groups{offsets.span(), rows.span(), pairs.span(), k};
  tt::cuda::group_by_expert(s, std::span<const tt::moe::expert_call>(calls.span()), 0, groups);
  tt::cuda::permute<bfloat16>(s, all.x.span(), grouped.span(), hidden, groups);
  check(cudaStreamSynchronize(s.handle), "grouping");
  const std::vector<std::uint32_t> ends = offsets.host();
  for (std::size_t r = 0; r < cluster.gpus(); ++r) {
    const std::size_t first = cluster.first_slot(r), n = cluster.slots_on_gpu(r), begin = ends[first];
    std::vector<std::uint32_t> part;
    for (std::size_t i = first; i <= first + n; ++i) part.push_back(ends[i] - ends[first]);
    const device_array<std::uint32_t> part_offsets{std::span<const std::uint32_t>(part)};
    expert_weights held(s, weights_as, where.layer(0).subspan(first, n), hidden, inner);
    held(s, grouped.span().subspan(begin * hidden, part.back() * hidden), part_offsets.span(),
         y.span().subspan(begin * hidden, part.back() * hidden));
    check(cudaStreamSynchronize(s.handle), "the products");
  }
  tt::cuda::combine<bfloat16>(s, y.span(), std::span<const float>(all.weights.span()), out.span(), hidden, groups);
  check(cudaStreamSynchronize(s.handle), "the layer on one GPU");
  return out.host();
}

/// What `got` is off from `expected`, relative to it in the mean square.
double difference(std::span<const bfloat16> got, std::span<const bfloat16> expected) {
  double error = 0, energy = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double e = double(expected[i]), d = double(got[i]) - e;
    error += d * d, energy += e * e;
  }
  return std::sqrt(error / energy);
}

int run(const gpu_ranks::team& team, std::size_t tokens_each) {
  check(cudaSetDevice(int(team.rank())), "cudaSetDevice");
  tt::cuda::stream s;
  check(cudaStreamCreate(&s.handle), "cudaStreamCreate");
  ncclUniqueId id{};
  if (team.is_first()) check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId").value();
  ncclComm_t communicator = nullptr;
  check_nccl(ncclCommInitRank(&communicator, int(team.ranks()), team.of_first(id), int(team.rank())),
             "ncclCommInitRank")
      .value();
  const auto cluster = tt::moe::topology::with_node_slots(1, team.ranks(), experts);
  const tt::moe::placement where = tt::moe::contiguous(1, experts, cluster);
  const std::size_t first = team.rank() * tokens_each;
  bool good = true;
  {
    const tokens all(s, team.ranks(), tokens_each);
    const std::vector<bfloat16> expected = on_one_gpu(s, all, cluster, where);
    expert_weights held(s, weights_as,
                        where.layer(0).subspan(cluster.first_slot(team.rank()), cluster.slots_on_gpu(team.rank())),
                        hidden, inner);
    const auto mine = [&](const auto& a, std::size_t width) {
      return a.span().subspan(first * width, tokens_each * width);
    };
    const device_array<bfloat16> out(tokens_each * hidden);
    device_array<bfloat16> grouped(0), y(0);
    for (const row_copies copies : {row_copies::per_expert, row_copies::per_rank}) {
      nccl_dispatch exchange(communicator, s, cluster, where, 0, team.rank(), k, hidden, copies, tokens_each);
      const auto layer = [&] {
        all.route(s, first, tokens_each);
        exchange.dispatch(mine(all.ids, k), mine(all.weights, k), mine(all.x, hidden));
        const std::size_t values = exchange.pairs() * hidden;
        grouped.reserve(values), y.reserve(values);
        exchange.expert_inputs(grouped.first(values));
        held(s, grouped.first(values), exchange.expert_offsets(), y.first(values));
        exchange.combine(y.first(values), mine(all.weights, k), out.span());
      };
      check(cudaMemset(out.data, 0xFF, out.size * sizeof(bfloat16)), "cudaMemset");
      bytes_to_others = 0;
      layer();
      check(cudaStreamSynchronize(s.handle), "the layer");

      std::uint64_t planned = 0;
      for (std::size_t r = 0; r < team.ranks(); ++r) {
        if (r == team.rank()) continue;
        planned += std::uint64_t(exchange.counts().send_counts()[r]) * exchange.bytes_there() +
                   std::uint64_t(exchange.counts().receive_counts()[r]) * exchange.bytes_back();
      }
      const std::vector<bfloat16> got = out.host();
      const std::span<const bfloat16> mine_expected(expected.data() + first * hidden, tokens_each * hidden);
      const bool same = std::memcmp(got.data(), mine_expected.data(), got.size() * sizeof(bfloat16)) == 0;
      // answers of ranks are rounded to bfloat16 before they are added: half of 2^-8 of each, and of the sum
      const double off = difference(got, mine_expected);
      const bool is_right = copies == row_copies::per_expert ? same : off < 0x1p-8;
      const bool all_right = team.sum(int(is_right && bytes_to_others == planned)) == int(team.ranks());
      const double off_most = team.largest(off);
      const std::uint64_t bytes = team.sum(bytes_to_others), bytes_planned = team.sum(planned);
      const double ms = team.largest(milliseconds(s.handle, layer));
      good = good && all_right;
      if (!team.is_first()) continue;
      std::printf("%-11s %9.3f ms, %11llu bytes sent, %11llu planned; off from one GPU by %.1e%s\n",
                  copies == row_copies::per_expert ? "per expert:" : "per rank:", ms,
                  static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(bytes_planned), off_most,
                  all_right ? "" : "  WRONG");
    }
  }
  check_nccl(ncclCommDestroy(communicator), "ncclCommDestroy").value();
  return good ? 0 : 1;
}

}  // namespace

/// Counts what goes to other ranks, then does what it always does (NCCL: "Profiling", the pnccl names).
extern "C" ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t type, int peer,
                                 ncclComm_t communicator, cudaStream_t stream) {
  int rank = 0;
  if (ncclCommUserRank(communicator, &rank) == ncclSuccess && peer != rank) bytes_to_others += count;
  return pncclSend(from, count, type, peer, communicator, stream);
}

int main(int argc, char** argv) try {
  std::size_t gpus = gpu_ranks::count(), tokens_each = 256;
  if (gpus < 2) {
    std::printf("skipped: expected two GPUs or more, found %zu\n", gpus);
    return 77;
  }
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    const std::size_t value = i + 1 < argc ? std::strtoull(argv[i + 1], nullptr, 10) : 0;
    if (value == 0 || (option != "--gpus" && option != "--tokens") || (option == "--gpus" && value > gpus)) {
      std::fprintf(stderr, "expected --gpus with 1 to %zu, or --tokens with a number, got %s\n", gpus, argv[i]);
      return 2;
    }
    (option == "--gpus" ? gpus : tokens_each) = value;
  }
  std::printf("%zu GPUs, %zu tokens on each, %zu experts, %zu per token, hidden %zu, %s weights\n", gpus, tokens_each,
              experts, k, hidden, weights_as.name().c_str());
  return gpu_ranks::run(gpus, [&](const gpu_ranks::team& team) { return run(team, tokens_each); });
} catch (const std::exception& e) {
  std::fprintf(stderr, "nccl_moe_layer: %s\n", e.what());
  return 1;
}
