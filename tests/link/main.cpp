/// Calls the code for plain x86-64, and the other where the CPU may run it and an argument asks for it.

#include <tetromino/packed.hpp>

int run_plain();
int place_plain(const char* folder);
int run_wide();
int place_wide(const char* folder);
tetromino::packed<tetromino::any_format> packed_wide();
bool reads_plain(const tetromino::packed<tetromino::any_format>& other);

/// Arguments: a folder to write to, and whatever asks for the other code.
int main(int count, char** words) {
  if (count < 2) return 9;
  const int status = count == 2 ? run_plain() : reads_plain(packed_wide()) ? run_wide() : 3;
  if (status != 0) return status;
  return count == 2 ? place_plain(words[1]) : place_wide(words[1]);
}
