#include <tetromino/cuda/pack/quantize.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

extern template result<void> dispatch_pack<void>(const stream&, const pack_args&, scale_rule);  // quantize_rotated.cu
template result<void> quantize(const stream&, const tetromino::detail::quantize_job<half>&, scale_order);
template result<void> quantize_transposed(const stream&, const tetromino::detail::quantize_job<half>&);
template result<void> fake_quantize(const stream&, const tetromino::detail::fake_quantize_job<half>&);
template result<void> rotate(const stream&, const tetromino::detail::rotate_job<half>&);
template result<void> amax(const stream&, const batch_view<const half>&, special_values, std::span<float>);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
