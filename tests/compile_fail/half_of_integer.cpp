// expect: a half rounds a float or a double, so convert to one first; half::from_bits takes its 16 bits
// An integer could be meant as a number or as bits.
#include <tetromino/float16.hpp>

int main() {
#if defined(MUST_FAIL)
  const int x = 3;
#else
  const float x = 3;
#endif
  return tetromino::half(x) == tetromino::half::from_bits(0x4200) ? 0 : 1;
}
