#include <tetromino/cuda/matmul.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> prepare<bfloat16>(const stream&, const packed_view<any_format>&, const prepared_shape&,
                                        std::byte*);
template result<void> prepare<half>(const stream&, const packed_view<any_format>&, const prepared_shape&, std::byte*);
template result<void> matmul(const stream&, const matmul_job<bfloat16>&);
template result<void> matmul(const stream&, const matmul_job<half>&);

}  // namespace tetromino::cuda::detail
