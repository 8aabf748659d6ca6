// Floats that are computed as something wider round elsewhere.
// with: -mfpmath=387
// expect: floats must be computed as floats|the '387' unit is not supported
#include <tetromino/tetromino.hpp>

int main() {}
