#include <tetromino/cuda/gemm/block_scaled_operand.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> repack_block_scaled(const stream&, const packed_view<any_format>&,
                                          const block_scaled_view<std::uint8_t, float>&);
template result<void> multiply_factors(const stream&, const float*, const float*, float*);
template result<void> multiply_block_scaled(const stream&, const block_scaled_job&, bfloat16*);
template result<void> multiply_block_scaled(const stream&, const block_scaled_job&, half*);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
