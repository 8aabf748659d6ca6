#include "check.hpp"

#include <tetromino/io/imatrix.hpp>

#include "reference/gguf_reader.hpp"

#include <filesystem>  // std::filesystem
#include <fstream>     // std::ofstream
#include <limits>      // std::numeric_limits
#include <string>      // std::string
#include <vector>      // std::vector

namespace fs = std::filesystem;
namespace io = tetromino::io;
using namespace reference;
using tetromino::errc;
using tetromino_test::contains;
using tetromino_test::temporary_directory;

namespace {

fs::path store(const fs::path& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary) << contents;
  return path;
}

std::string floats(const std::vector<float>& values) {
  std::string out;
  for (const float value : values) out += gguf_number(value);
  return out;
}

std::string i32(std::int32_t value) { return gguf_number(value); }

std::string legacy_entry(const std::string& name, std::int32_t calls, const std::vector<float>& sums) {
  return i32(static_cast<std::int32_t>(name.size())) + name + i32(calls) + i32(static_cast<std::int32_t>(sums.size())) +
         floats(sums);
}

/// Sums [matrices, cols] and counts [matrices] of two tensors.
std::string gguf_form(const std::vector<float>& sums, const std::vector<float>& counts) {
  const auto padded = [](std::string data) {
    data.resize((data.size() + 31) / 32 * 32);
    return data;
  };
  const std::uint64_t matrices = counts.size(), cols = sums.size() / counts.size();
  const std::string datasets = gguf_number(std::uint32_t{8}) + gguf_number(std::uint64_t{1}) + gguf_string("text.txt");
  const std::string first = padded(floats(sums));
  return gguf_with(gguf_start(2, 2) + gguf_entry("imatrix.datasets", 9, datasets) +
                       gguf_entry("imatrix.chunk_count", 4, gguf_number(std::uint32_t{7})) +
                       gguf_tensor_info("blk.0.w.weight.in_sum2", {cols, matrices}, 0, 0) +
                       gguf_tensor_info("blk.0.w.weight.counts", {1, matrices}, 0, first.size()),
                   first + padded(floats(counts)));
}

std::string complaint(const std::string& contents) {
  const temporary_directory folder;
  const auto read = io::imatrix::try_open(store(folder / "i", contents));
  if (read) return "(accepted)";
  CHECK(read.error().code() == errc::malformed_file);
  CHECK_THROWS_AS(io::imatrix::open(folder / "i"), tetromino::error);
  return read.error().what();
}

constexpr auto infinity = std::numeric_limits<float>::infinity();

}  // namespace

TEST_CASE("the GGUF form divides sums by the counts of each expert") {
  const temporary_directory folder;
  const auto read = io::imatrix::open(store(folder / "i.gguf", gguf_form({2, 4, 6, 9, 0, 3, 5, 5, 5}, {2, 3, 0})));
  CHECK(read.size() == 1);
  CHECK(read.tensors() == std::vector<std::string_view>{"blk.0.w.weight"});
  CHECK(read.contains("blk.0.w.weight"));
  CHECK_FALSE(read.contains("blk.0.w"));
  CHECK(read.datasets() == std::vector<std::string>{"text.txt"});
  CHECK(read.chunks() == 7);
  CHECK(read.column_weights("blk.0.w.weight", 0, 3, 3) == std::vector<float>{1, 2, 3});
  CHECK(read.column_weights("blk.0.w.weight", 1, 3, 3) == std::vector<float>{3, 0, 1});
  CHECK(read.column_weights("blk.0.w.weight", 2, 3, 3) == std::vector<float>{1, 1, 1});  // no token reached it
  CHECK_THAT(read.try_column_weights("blk.1.w.weight", 0, 3, 3).error().what(),
             contains("tensor 'blk.1.w.weight': expected activations of it; the nearest names are 'blk.0.w.weight'"));
  CHECK_THAT(read.try_column_weights("blk.0.w.weight", 0, 1, 3).error().what(),
             contains("expected activations of 1 x 3 columns, found 9 of them and 3 counts"));
  CHECK(read.try_column_weights("blk.0.w.weight", 0, 3, 4).error().code() == errc::shape_mismatch);
  CHECK_THROWS_AS(read.column_weights("blk.0.w.weight", 3, 3, 3), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(read.column_weights("blk.0.w.weight", 0, 3, 0), tetromino_test::precondition_failed);

  const auto shared = io::imatrix::open(store(folder / "shared", gguf_form({2, 4}, {4})));
  CHECK(shared.column_weights("blk.0.w.weight", 5, 8, 2) == std::vector<float>{0.5f, 1});
}

TEST_CASE("the form before GGUF divides sums by calls") {
  const temporary_directory folder;
  const std::string entries = i32(2) + legacy_entry("b", 4, {4, 8, 0, 2}) + legacy_entry("a", 0, {3, 4});
  for (const std::string& end : {std::string(), i32(9), i32(9) + i32(4) + "text"}) {
    const auto read = io::imatrix::open(store(folder / "i.dat", entries + end));
    CHECK(read.size() == 2);
    CHECK(read.column_weights("b", 0, 1, 4) == std::vector<float>{1, 2, 0, 0.5f});
    CHECK(read.column_weights("b", 1, 2, 2) == std::vector<float>{0, 0.5f});
    CHECK(read.column_weights("a", 0, 1, 2) == std::vector<float>{3, 4});
    CHECK(read.chunks() == (end.empty() ? 0 : 9));
    CHECK(read.datasets().size() == (end.size() > 4 ? 1 : 0));
  }
  for (std::size_t size = 1; size < entries.size(); ++size) {
    INFO(size);
    CHECK(complaint(entries.substr(0, size)) != "(accepted)");
  }
}

TEST_CASE("what is no imatrix is refused, and so are values that are no weights") {
  CHECK_THAT(complaint(""), contains("expected 4 bytes for the number of entries, found 0"));
  CHECK_THAT(complaint(i32(0)), contains("expected the number of entries to be at least 1, found 0"));
  CHECK_THAT(complaint("#!/bin/sh"), contains("entry 0: expected"));
  CHECK_THAT(complaint(i32(1) + i32(-1)),
             contains("entry 0: expected the length of its name to be at least 1, found -1"));
  CHECK_THAT(complaint(i32(1) + i32(0x7fffffff)), contains("bytes for its name, found 0"));
  CHECK_THAT(complaint(i32(1) + i32(1) + "n" + i32(-1)), contains("tensor 'n': expected the number of calls"));
  CHECK_THAT(complaint(i32(1) + i32(1) + "n" + i32(1) + i32(0)), contains("tensor 'n': expected the number of sums"));
  CHECK_THAT(complaint(i32(1) + i32(1) + "n" + i32(1) + i32(0x7fffffff)),
             contains("expected 8589934588 bytes for its sums"));
  CHECK_THAT(complaint(i32(2) + legacy_entry("n", 1, {1}) + legacy_entry("n", 1, {1})),
             contains("'n': expected each name once"));
  CHECK_THAT(complaint(i32(1) + legacy_entry("n", 1, {1}) + i32(1) + i32(1) + "tt"),
             contains("after the dataset's name, found 1"));
  CHECK_THAT(complaint(i32(1) + legacy_entry("n", 1, {1}) + i32(-1)), contains("expected the number of chunks"));
  CHECK_THAT(complaint("GGUF"), contains("for the version"));
  CHECK_THAT(complaint(gguf_start(0, 0)), contains("expected an imatrix, found no tensor *.in_sum2"));
  const auto alone = [](std::uint32_t type, const char* second) {
    return gguf_with(
        gguf_start(2, 0) + gguf_tensor_info("w.in_sum2", {8}, 0, 0) + gguf_tensor_info(second, {8}, type, 32),
        std::string(64, '\0'));
  };
  CHECK_THAT(complaint(alone(0, "v.counts")), contains("tensor 'w': expected counts beside its sums"));
  CHECK_THAT(complaint(alone(26, "w.counts")), contains("tensor 'w.counts': expected F32 values, found 8 of I32"));

  const temporary_directory folder;
  const auto value = [&](const std::vector<float>& sums, const std::vector<float>& counts) {
    const auto read = io::imatrix::open(store(folder / "i", gguf_form(sums, counts)));
    const auto weights = read.try_column_weights("blk.0.w.weight", 0, counts.size(), sums.size() / counts.size());
    if (weights) return std::string("(accepted)");
    CHECK(weights.error().code() == errc::malformed_file);
    return std::string(weights.error().what());
  };
  CHECK_THAT(value({1, -1}, {1}), contains("expected finite means of at least 0, found -1 in column 1"));
  CHECK_THAT(value({1, infinity}, {1}), contains("found inf in column 1"));
  CHECK_THAT(value({1, std::numeric_limits<float>::quiet_NaN()}, {1}), contains("nan in column 1"));
  CHECK_THAT(value({1, 1}, {-2}), contains("expected a count of at least 0, found -2"));
  CHECK_THAT(value({1, 1}, {infinity}), contains("expected a count of at least 0, found inf"));
  CHECK_THAT(value({3e38f, 1}, {0.01f}), contains("found inf in column 0"));
}
