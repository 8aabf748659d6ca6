// Sums have an order. (g++ takes the first option only with the others.)
// with: -fassociative-math -fno-signed-zeros -fno-trapping-math
// only: g++
// expect: compile what includes it with -fno-fast-math
#include <tetromino/tetromino.hpp>

int main() {}
