// expect: unpacking writes: its output is a view of elements that are not const
// Unpacking writes: its output cannot be const.
#include <tetromino/tetromino.hpp>

int main() {
  const tetromino::packed<tetromino::nvfp4> packed(tetromino::nvfp4{}, 1, 1, 16);
  float x[16] = {};
#if defined(MUST_FAIL)
  using element = const float;
#else
  using element = float;
#endif
  tetromino::dequantize_to(tetromino::scalar, packed, tetromino::batch_view<element>(x, 1, 1, 16));
  return static_cast<int>(x[0]);
}
