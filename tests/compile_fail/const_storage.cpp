// expect: packing writes: its storage is packed, or packed_view
// A view of storage that is const is no place to pack into.
#include <tetromino/quantize.hpp>

int main() {
  const float x[32] = {};
#if defined(MUST_FAIL)
  const tetromino::packed<tetromino::mxfp4> packed({}, 1, 1, 32);
#else
  tetromino::packed<tetromino::mxfp4> packed({}, 1, 1, 32);
#endif
  tetromino::quantize_to(tetromino::scalar, tetromino::matrix_view(x, 1, 32), packed.view());
  return packed.codes[0];
}
