#include <tetromino/cuda/pack/e4m3_rows.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> quantize_e4m3(const stream&, const tetromino::detail::quantize_e4m3_job<float>&);
template result<void> quantize_e4m3(const stream&, const tetromino::detail::quantize_e4m3_job<half>&);
template result<void> quantize_e4m3(const stream&, const tetromino::detail::quantize_e4m3_job<bfloat16>&);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
