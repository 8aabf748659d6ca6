// Rows to the ranks of their experts and back, over MPI: mpirun -n 4 09_mpi
#include <tetromino/comm/dispatcher.hpp>
#include <tetromino/comm/mpi.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/replica.hpp>

#include <cstdio>
#include <vector>

int main(int argc, char** argv) {
  using namespace tetromino;
  MPI_Init(&argc, &argv);
  int status = 0;
  {
    const comm::mpi_exchange exchange(MPI_COMM_WORLD);
    const std::size_t ranks = exchange.ranks(), rank = exchange.rank(), experts = 8, k = 2, width = 4, tokens = 5;
    const auto cluster = moe::topology::uniform(1, ranks, (experts + ranks - 1) / ranks);
    const moe::placement where = moe::contiguous(1, experts, cluster);
    const moe::replica_index copies(where);

    // Token t of this rank calls two experts, with weights 0.75 and 0.25.
    std::vector<std::uint16_t> ids;
    std::vector<float> weights;
    for (std::size_t t = 0; t < tokens; ++t) {
      ids.insert(ids.end(), {std::uint16_t((rank + t) % experts), std::uint16_t((rank + t + 3) % experts)});
      weights.insert(weights.end(), {0.75f, 0.25f});
    }
    moe::replica_chooser chooser(where, cluster);
    std::vector<std::uint32_t> gpus(ids.size()), tags(tokens, std::uint32_t(rank));  // a tag travels with each row
    for (std::size_t t = 0; t < tokens; ++t) {
      chooser.choose(0, std::span(ids).subspan(t * k, k), std::uint32_t(rank), std::span(gpus).subspan(t * k, k));
    }
    std::vector<moe::expert_call> calls(ids.size());
    moe::make_calls(copies, cluster, 0, ids, weights, gpus, calls);

    comm::dispatcher dispatcher(exchange, cluster, k);
    const std::vector<float> x(tokens * width, float(rank + 1));
    dispatcher.try_dispatch<float>(calls, x, tags, width).value();

    // This rank's experts: expert e here multiplies by e + 1. expert_rows says which received row each one gets.
    const auto& plan = dispatcher.plan();
    std::vector<float> y(plan.expert_rows().size() * width);
    moe::gather_rows<float>(plan.expert_rows(), dispatcher.received_rows<float>(), y, width);
    for (std::size_t s = 0; s < cluster.slots_on_gpu(rank); ++s) {
      const auto expert = float(where.layer(0)[cluster.first_slot(rank) + s]);
      for (std::size_t i = plan.expert_offsets()[s] * width; i < plan.expert_offsets()[s + 1] * width; ++i)
        y[i] *= expert + 1;
    }
    std::vector<float> out(tokens * width);
    dispatcher.try_combine(y, out, width).value();
    const float expected =
        float(rank + 1) * (0.75f * float(rank % experts + 1) + 0.25f * float((rank + 3) % experts + 1));
    std::printf("rank %zu: token 0 is %g, expected %g\n", rank, double(out[0]), double(expected));
    status = out[0] == expected ? 0 : 1;
  }
  MPI_Finalize();
  return status;
}
