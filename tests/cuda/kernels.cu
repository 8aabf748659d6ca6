/// All kernels in one file, as those include them who compile CUDA themselves: their headers go together, and what a
/// call needs is instantiated where it stands.

#include "harness.hpp"

#include <tetromino/cuda/kernels.cuh>

int main() {
  using namespace harness;
  need_device();
  const std::vector<float> ones(4 * 64, 1.0f);
  const device<float> x(ones), out(ones.size());
  const tetromino::hadamard rotation{64};
  std::vector<float> expected(ones.size());
  tetromino::rotate(tetromino::scalar, tetromino::batch_view<const float>(ones.data(), 1, 4, 64), rotation,
                    tetromino::batch_view<float>(expected.data(), 1, 4, 64));
  require(tetromino::try_rotate(tetromino::cuda::stream{}, tetromino::batch_view<const float>(x.data(), 1, 4, 64),
                                rotation, tetromino::batch_view<float>(out.data(), 1, 4, 64)),
          "rotate");
  expect(first_difference(expected, out.values()) < 0, "a rotation instantiated here");
  return finish("kernels");
}
