// expect: this policy packs nothing: is the header of its backend included
// A policy has to bring a backend that can pack.
#include <tetromino/quantize.hpp>

struct my_policy {};

int main() {
  const float x[32] = {};
#if defined(MUST_FAIL)
  const my_policy policy;
#else
  const auto policy = tetromino::scalar;
#endif
  const auto packed = tetromino::quantize<tetromino::mxfp4>(policy, tetromino::matrix_view(x, 1, 32));
  return static_cast<int>(packed.codes[0]);
}
