#include <tetromino/cuda/gemm/launch.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> matmul_of_kind<bfloat16, weight_kind::mx32, 0>(const stream&, const matmul_job<bfloat16>&,
                                                                     const matmul_args<bfloat16>&);
template result<void> matmul_of_kind<bfloat16, weight_kind::mx32, 1>(const stream&, const matmul_job<bfloat16>&,
                                                                     const matmul_args<bfloat16>&);
template result<void> matmul_of_kind<bfloat16, weight_kind::mx32, 2>(const stream&, const matmul_job<bfloat16>&,
                                                                     const matmul_args<bfloat16>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
