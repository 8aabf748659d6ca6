/// The folders that test programs read from: the one source that is compiled differently in each clone.

#include "check.hpp"

std::filesystem::path tetromino_test::data_file(const std::string& name) {
  return std::filesystem::path(TETROMINO_TEST_DATA) / name;
}
