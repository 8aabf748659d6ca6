// expect: e2m1::encode rounds a number to a code; e2m1::from_bits takes a code
#include <tetromino/e2m1.hpp>

int main() {
#if defined(MUST_FAIL)
  const tetromino::e2m1 code(0.5f);
#else
  const auto code = tetromino::e2m1::encode(0.5f);
#endif
  return code.bits;
}
