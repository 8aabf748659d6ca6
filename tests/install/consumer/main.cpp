#include <tetromino/error.hpp>
#include <tetromino/version.hpp>

#include <cstdio>

int main() {
  const tetromino::result<int> value = 4;
  std::printf("tetromino %d.%d.%d, %d bits\n", TETROMINO_VERSION_MAJOR, TETROMINO_VERSION_MINOR, TETROMINO_VERSION_PATCH,
              *value);
  return *value == 4 ? 0 : 1;
}
