// expect: cannot convert|no viable conversion
// Conversions are explicit in both directions: a sum of halves in float is asked for.
#include <tetromino/float16.hpp>

int main() {
  const tetromino::half x(0.5f);
#if defined(MUST_FAIL)
  const float y = x;
#else
  const float y(x);
#endif
  return y == 0.5f ? 0 : 1;
}
