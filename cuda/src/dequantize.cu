#include <tetromino/cuda/pack/dequantize.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> dequantize(const stream&, const tetromino::detail::dequantize_job<float>&);
template result<void> dequantize(const stream&, const tetromino::detail::dequantize_job<half>&);
template result<void> dequantize(const stream&, const tetromino::detail::dequantize_job<bfloat16>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
