#include "interface.c"  // as C++17
