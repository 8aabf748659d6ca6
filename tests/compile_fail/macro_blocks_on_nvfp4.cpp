// expect: macro-block scaling goes on top of
// NVFP4 has a scale of its own above the blocks.
#include <tetromino/format.hpp>

int main() {
#if defined(MUST_FAIL)
  using inner = tetromino::nvfp4;
#else
  using inner = tetromino::mxfp4_16;
#endif
  return static_cast<int>(tetromino::mbs<inner>::macro_block);
}
