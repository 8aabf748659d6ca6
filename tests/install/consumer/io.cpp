#include <tetromino/io/safetensors.hpp>

#include <cstdio>

int main() {
  const auto file = tetromino::io::safetensors_file::try_open("there-is-no-such-file");
  if (file) return 1;
  std::puts(file.error().what());
  return file.error().code() == tetromino::errc::io ? 0 : 1;
}
