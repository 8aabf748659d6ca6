#pragma once

#include "check.hpp"

#include <tetromino/io/safetensors.hpp>

#include "reference/safetensors_reader.hpp"

#include <cstdint>     // std::uint8_t, std::uint64_t
#include <filesystem>  // std::filesystem
#include <fstream>     // std::ofstream
#include <map>         // std::map
#include <numeric>     // std::iota
#include <string>      // std::string
#include <vector>      // std::vector

/// What the tests of the reader and of the writer share: files made by hand, and a comparison with the second reader.
namespace tetromino_test {

using bytes = std::vector<std::uint8_t>;

inline std::string length_prefix(std::uint64_t length) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(static_cast<unsigned char>(length >> (8 * i)));
  return out;
}

/// A file as it should be, around any header.
inline std::string file_with(const std::string& header, std::size_t data_bytes) {
  std::string out = length_prefix(header.size()) + header;
  for (std::size_t i = 0; i < data_bytes; ++i) out += static_cast<char>(static_cast<unsigned char>(i * 7 + 1));
  return out;
}

inline std::filesystem::path store(const std::filesystem::path& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary) << contents;
  return path;
}

inline std::string load(const std::filesystem::path& path) {
  const auto read = reference::read_bytes(path);
  return {read.begin(), read.end()};
}

inline std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
  return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + '}';
}

inline bytes counting(std::size_t count, std::uint8_t first = 0) {
  bytes out(count);
  std::iota(out.begin(), out.end(), first);
  return out;
}

inline void require_same(const tetromino::io::safetensors_file& file, const reference::stored_file& expected) {
  REQUIRE(file.size() == expected.tensors.size());
  CHECK(std::map<std::string, std::string>(file.metadata().begin(), file.metadata().end()) == expected.metadata);
  for (const auto& tensor : file) {
    INFO(tensor.name());
    const auto found = expected.tensors.find(tensor.name());
    REQUIRE(found != expected.tensors.end());
    CHECK(tetromino::io::name(tensor.dtype()) == found->second.dtype);
    CHECK(std::vector<std::uint64_t>(tensor.shape().begin(), tensor.shape().end()) == found->second.shape);
    CHECK(bytes(tensor.bytes().begin(), tensor.bytes().end()) == found->second.bytes);
  }
}

}  // namespace tetromino_test
