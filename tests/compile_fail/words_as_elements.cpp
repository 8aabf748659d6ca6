// expect: 16-bit words are viewed as what they hold
// 16-bit words do not say which float they are.
#include <tetromino/quantize.hpp>

#include <span>
#include <vector>

int main() {
  const std::vector<float> x(32);
  const std::vector<std::uint16_t> words(32);
#if defined(MUST_FAIL)
  const auto packed = tetromino::quantize(tetromino::scalar, tetromino::matrix_view(words.data(), 1, 32), "nvfp4");
#else
  const auto packed = tetromino::quantize(tetromino::scalar,
                                          tetromino::matrix_view<const tetromino::half>(words.data(), 1, 32), "nvfp4");
#endif
  return packed.codes[0];
}
