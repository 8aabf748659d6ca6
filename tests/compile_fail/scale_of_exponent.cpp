// expect: e8m0::encode cuts a number to a power of two; e8m0::from_exponent and e8m0::from_bits take integers
#include <tetromino/e8m0.hpp>

int main() {
#if defined(MUST_FAIL)
  const tetromino::e8m0 scale(-1);
#else
  const auto scale = tetromino::e8m0::from_exponent(-1);
#endif
  return scale.bits;
}
