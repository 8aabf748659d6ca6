#include <tetromino/cuda/pack/quantize.cuh>

namespace TETROMINO_NAMESPACE::cuda::detail {

template result<void> dispatch_pack<void>(const stream&, const pack_args&, scale_rule);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
