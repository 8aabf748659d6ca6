// NaN and infinities are part of what is promised.
// with: -ffinite-math-only
// expect: compile what includes it with -fno-fast-math
#include <tetromino/tetromino.hpp>

int main() {}
