// Fast-math rounds as it likes; a file that takes it back is fine.
// with: -ffast-math
// expect: compile what includes it with -fno-fast-math
#include <tetromino/tetromino.hpp>

int main() {}
