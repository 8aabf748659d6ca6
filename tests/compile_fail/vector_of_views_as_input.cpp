// expect: views in a vector are packed one by one
// Experts that lie apart, as amax takes them together.
#include <tetromino/quantize.hpp>

#include <vector>

int main() {
  const std::vector<float> x(32);
  const std::vector<tetromino::matrix_view<const float>> views = {tetromino::matrix_view(x.data(), 1, 32)};
#if defined(MUST_FAIL)
  const auto packed = tetromino::quantize(tetromino::scalar, views, "nvfp4");
#else
  const auto packed = tetromino::quantize(tetromino::scalar, views[0], "nvfp4");
#endif
  return packed.codes[0];
}
