// expect: elements are float, half or bfloat16
// Packing reads float, half and bfloat16 only.
#include <tetromino/quantize.hpp>

int main() {
#if defined(MUST_FAIL)
  const double x[32] = {};
#else
  const float x[32] = {};
#endif
  const auto packed = tetromino::quantize<tetromino::mxfp4>(tetromino::scalar, tetromino::matrix_view(x, 1, 32));
  return static_cast<int>(packed.codes[0]);
}
