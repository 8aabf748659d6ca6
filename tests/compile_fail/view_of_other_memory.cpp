// expect: no matching function|no matching constructor
// 16-bit words may hold either 16-bit float, but floats hold neither.
#include <tetromino/matrix.hpp>

int main() {
#if defined(MUST_FAIL)
  const float words[4] = {};
#else
  const std::uint16_t words[4] = {};
#endif
  const tetromino::matrix_view<const tetromino::bfloat16> x(words, 2, 2);
  return static_cast<int>(x.rows);
}
