// expect: a bfloat16 rounds a float or a double, so convert to one first; bfloat16::from_bits takes its 16 bits
// From one 16-bit float to the other is a rounding that the code should show.
#include <tetromino/float16.hpp>

int main() {
  const tetromino::half x(0.5f);
#if defined(MUST_FAIL)
  const tetromino::bfloat16 y(x);
#else
  const tetromino::bfloat16 y(static_cast<float>(x));
#endif
  return y.bits;
}
