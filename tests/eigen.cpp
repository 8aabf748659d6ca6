#include "check.hpp"

#include <tetromino/eigen.hpp>
#include <tetromino/tetromino.hpp>

TEST_CASE("Eigen matrices, blocks and transposes pack like the arrays they are") {
  using namespace tetromino;
  eigen_matrix<float> m = eigen_matrix<float>::Random(5, 70);
  const auto whole = quantize<mxfp4>(scalar, view_of(m));
  CHECK(whole.codes == quantize<mxfp4>(scalar, matrix_view<const float>(m.data(), 5, 70)).codes);

  const auto block = m.block(1, 2, 3, 64);
  const auto part = quantize<nvfp4>(scalar, view_of(block));
  const eigen_matrix<float> copy = block;
  CHECK(part.codes == quantize<nvfp4>(scalar, view_of(copy)).codes);

  const Eigen::MatrixXf columns = m.transpose();
  const auto transposed = columns.transpose();
  CHECK(quantize<mxfp4>(scalar, view_of(transposed)).codes == whole.codes);

  eigen_matrix<float> decoded(5, 70);
  dequantize_to(scalar, whole, view_of(decoded));
  CHECK(qsnr(view_of(m), view_of(decoded)) > 15.0);
  CHECK(eigen_map(view_of(decoded)) == decoded);
}

TEST_CASE("a row whose elements are apart is a caller's bug") {
  Eigen::Matrix<float, 4, 4, Eigen::RowMajor> m = Eigen::Matrix<float, 4, 4, Eigen::RowMajor>::Zero();
  const Eigen::Map<Eigen::Matrix<float, 2, 2, Eigen::RowMajor>, 0, Eigen::Stride<8, 2>> apart(m.data());
  CHECK_THROWS_AS(tetromino::view_of(apart), tetromino_test::precondition_failed);
  auto writable = apart;
  CHECK_THROWS_AS(tetromino::view_of(writable), tetromino_test::precondition_failed);
}
