#include <tetromino/cuda/gemm/matmul.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> repack<bfloat16>(const stream&, const packed_view<any_format>&, const repacked_shape&,
                                       std::byte*);
template result<void> repack<e4m3>(const stream&, const packed_view<any_format>&, const repacked_shape&, std::byte*);
template result<void> repack<half>(const stream&, const packed_view<any_format>&, const repacked_shape&, std::byte*);
template result<void> matmul(const stream&, const matmul_job<bfloat16>&);
template result<void> matmul(const stream&, const matmul_job<half>&);
template result<void> matmul(const stream&, const matmul_job<e4m3>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
