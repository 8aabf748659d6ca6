#include <tetromino/cuda/route/group.cuh>
#include <tetromino/cuda/route/move.cuh>
#include <tetromino/cuda/route/route.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> route(const stream&, const route_job<float>&);
template result<void> group(const stream&, std::span<const std::uint16_t>, std::size_t, const expert_groups&);
template result<void> group(const stream&, std::span<const moe::expert_call>, std::size_t, const expert_groups&);
template result<void> plan_copies(const stream&, const copies_job<std::uint16_t>&);
template result<void> permute(const stream&, const move_job<float>&);
template result<void> permute(const stream&, const move_job<half>&);
template result<void> permute(const stream&, const move_job<bfloat16>&);
template result<void> combine(const stream&, const move_job<float>&);
template result<void> combine(const stream&, const move_job<half>&);
template result<void> combine(const stream&, const move_job<bfloat16>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
