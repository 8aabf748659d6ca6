#include <tetromino/cuda/gemm/launch.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> matmul_of_kind<bfloat16, weight_kind::mx32_fine, 0>(const stream&, const matmul_job<bfloat16>&,
                                                                          const matmul_args<bfloat16>&);
template result<void> matmul_of_kind<half, weight_kind::mx32_fine, 0>(const stream&, const matmul_job<half>&,
                                                                      const matmul_args<half>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
