/// Calls the code for plain x86-64, and the other where the CPU may run it and an argument asks for it.

#include <tetromino/packed.hpp>

int run_plain();
int run_wide();
#if defined(PLACES)
int place_plain(const char* folder);
int place_wide(const char* folder);
#else  // placement.cpp is not there
int place_plain(const char*) { return 0; }
int place_wide(const char*) { return 0; }
#endif
tetromino::packed<tetromino::any_format> packed_wide();
bool reads_plain(const tetromino::packed<tetromino::any_format>& other);

/// Arguments: a folder to write to, without which nothing is placed or read; and whatever asks for the other code.
int main(int count, char** words) {
  if (count == 1) return run_plain();
  if (count == 2) return place_plain(words[1]);
  const int status = reads_plain(packed_wide()) ? run_wide() : 3;
  return status != 0 ? status : place_wide(words[1]);
}
