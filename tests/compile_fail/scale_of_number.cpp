// expect: e4m3::encode rounds a number to a scale; e4m3::from_bits takes its 8 bits
#include <tetromino/e4m3.hpp>

int main() {
#if defined(MUST_FAIL)
  const tetromino::e4m3 scale(0.5f);
#else
  const auto scale = tetromino::e4m3::encode(0.5f);
#endif
  return scale.bits;
}
