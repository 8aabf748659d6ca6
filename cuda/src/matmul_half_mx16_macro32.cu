#include <tetromino/cuda/matmul_launch.cuh>

namespace tetromino::cuda::detail {

template result<void> matmul_of_kind<half, weight_kind::mx16, 2>(const stream&, const matmul_job<half>&,
                                                                 const matmul_args<half>&);

}  // namespace tetromino::cuda::detail
