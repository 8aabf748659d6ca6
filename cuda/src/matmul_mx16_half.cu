#include <tetromino/cuda/gemm/launch.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> matmul_of_kind<half, weight_kind::mx16, 0>(const stream&, const matmul_job<half>&,
                                                                 const matmul_args<half>&);
template result<void> matmul_of_kind<half, weight_kind::mx16, 1>(const stream&, const matmul_job<half>&,
                                                                 const matmul_args<half>&);
template result<void> matmul_of_kind<half, weight_kind::mx16, 2>(const stream&, const matmul_job<half>&,
                                                                 const matmul_args<half>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
