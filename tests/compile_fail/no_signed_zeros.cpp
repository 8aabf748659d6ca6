// The sign of a zero is part of the bytes.
// with: -fno-signed-zeros
// only: g++
// expect: compile what includes it with -fno-fast-math
#include <tetromino/tetromino.hpp>

int main() {}
