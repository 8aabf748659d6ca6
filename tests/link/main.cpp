/// Calls the code for plain x86-64, and the other where the CPU may run it and an argument asks for it.

#include <tetromino/packed.hpp>

int run_plain();
int run_wide();
tetromino::packed<tetromino::any_format> packed_wide();
bool reads_plain(const tetromino::packed<tetromino::any_format>& other);

int main(int count, char**) {
  if (count == 1) return run_plain();
  return reads_plain(packed_wide()) ? run_wide() : 3;
}
