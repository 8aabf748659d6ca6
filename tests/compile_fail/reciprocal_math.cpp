// A quotient is no product with an inverse.
// with: -freciprocal-math
// only: g++
// expect: compile what includes it with -fno-fast-math
#include <tetromino/tetromino.hpp>

int main() {}
