#include <tetromino/cuda/gemm/e4m3_launch.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> e4m3_matmul_of_kind<weight_kind::mx32>(const stream&, const matmul_job<e4m3>&,
                                                             const matmul_args<bfloat16>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
