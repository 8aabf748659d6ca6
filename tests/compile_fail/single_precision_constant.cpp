// Constants that are read as floats round elsewhere.
// only: g++
// with: -fsingle-precision-constant
// expect: which -fsingle-precision-constant breaks
#include <tetromino/tetromino.hpp>

int main() {}
