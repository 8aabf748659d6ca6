// expect: the input is a matrix_view, a batch_view or a matrix
// A span does not say how many rows it has.
#include <tetromino/quantize.hpp>

#include <span>
#include <vector>

int main() {
  const std::vector<float> x(32);
  const std::vector<std::uint16_t> words(32);
#if defined(MUST_FAIL)
  const auto packed = tetromino::quantize<tetromino::mxfp4>(tetromino::scalar, std::span(x));
#else
  const auto packed = tetromino::quantize<tetromino::mxfp4>(tetromino::scalar, tetromino::matrix_view(x.data(), 1, 32));
#endif
  return packed.codes[0];
}
