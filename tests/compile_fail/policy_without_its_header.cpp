// expect: error: static.*tetromino::simd and tetromino::automatic need #include <tetromino/simd.hpp>
// A policy's kernels come with its header: the first error says which.
#include <tetromino/quantize.hpp>
#if !defined(MUST_FAIL)
#include <tetromino/simd.hpp>
#endif

int main() {
  const float x[32] = {};
  const auto packed = tetromino::quantize<tetromino::mxfp4>(tetromino::automatic, tetromino::matrix_view(x, 1, 32));
  return static_cast<int>(packed.codes[0]);
}
