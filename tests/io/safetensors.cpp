#include "check.hpp"

#include <tetromino/io/safetensors.hpp>

#include "reference/safetensors_reader.hpp"

#include <sys/resource.h>  // ::setrlimit
#include <sys/wait.h>      // ::waitpid
#include <unistd.h>        // ::fork, ::truncate

#include <csignal>     // std::signal, ::kill
#include <cstdint>     // std::uint8_t
#include <filesystem>  // std::filesystem
#include <fstream>     // std::ofstream, std::ifstream
#include <numeric>     // std::iota
#include <random>      // std::mt19937_64
#include <string>      // std::string
#include <vector>      // std::vector

namespace fs = std::filesystem;
namespace io = tetromino::io;
using bytes = std::vector<std::uint8_t>;
using tetromino::errc;
using tetromino_test::contains;
using tetromino_test::temporary_directory;

namespace {

std::string length_prefix(std::uint64_t length) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(static_cast<unsigned char>(length >> (8 * i)));
  return out;
}

/// A file as it should be, around any header.
std::string file_with(const std::string& header, std::size_t data_bytes) {
  std::string out = length_prefix(header.size()) + header;
  for (std::size_t i = 0; i < data_bytes; ++i) out += static_cast<char>(static_cast<unsigned char>(i * 7 + 1));
  return out;
}

fs::path store(const fs::path& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary) << contents;
  return path;
}

std::string load(const fs::path& path) {
  const auto read = reference::read_bytes(path);
  return {read.begin(), read.end()};
}

/// What opening a file of these contents says.
std::string complaint(const std::string& contents) {
  const temporary_directory folder;
  const fs::path path = store(folder / "hostile.safetensors", contents);
  const auto file = io::safetensors_file::try_open(path);
  if (file) return "(accepted)";
  CHECK(file.error().code() == errc::malformed_file);
  const std::string message = file.error().what();
  const std::string prefix = path.string() + ": ";
  CHECK(message.substr(0, prefix.size()) == prefix);
  CHECK(message.size() < prefix.size() + 700);
  CHECK_THROWS_AS(io::safetensors_file::open(path), tetromino::error);
  return message.substr(prefix.size());
}

std::string complaint(const std::string& header, std::size_t data_bytes) {
  return complaint(file_with(header, data_bytes));
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + '}';
}

std::size_t files_in(const fs::path& folder) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& file : fs::directory_iterator(folder)) ++count;
  return count;
}

bytes counting(std::size_t count, std::uint8_t first = 0) {
  bytes out(count);
  std::iota(out.begin(), out.end(), first);
  return out;
}

void require_same(const io::safetensors_file& file, const reference::stored_file& expected) {
  REQUIRE(file.size() == expected.tensors.size());
  CHECK(std::map<std::string, std::string>(file.metadata().begin(), file.metadata().end()) == expected.metadata);
  for (const auto& tensor : file) {
    INFO(tensor.name());
    const auto found = expected.tensors.find(tensor.name());
    REQUIRE(found != expected.tensors.end());
    CHECK(io::name(tensor.dtype()) == found->second.dtype);
    CHECK(std::vector<std::uint64_t>(tensor.shape().begin(), tensor.shape().end()) == found->second.shape);
    CHECK(bytes(tensor.bytes().begin(), tensor.bytes().end()) == found->second.bytes);
  }
}

}  // namespace

TEST_CASE("a file that is no safetensors file says so") {
  CHECK_THAT(complaint(""), contains("expected at least the 8 bytes of a header length, found a file of 0 bytes"));
  CHECK_THAT(complaint("1234567"), contains("found a file of 7 bytes"));
  CHECK_THAT(complaint(length_prefix(0)), contains("begins with '{', found no bytes"));
  CHECK_THAT(complaint(length_prefix(3) + "{}"), contains("expected a header of 3 bytes after the header length, "
                                                          "found only 2 (is the file cut short?)"));
  CHECK_THAT(complaint(length_prefix(100'000'001)), contains("at most 100000000 bytes, found a header length of "
                                                             "100000001 (is it a safetensors file?)"));
  CHECK_THAT(complaint(length_prefix(~std::uint64_t{0}) + "{}"), contains("length of 18446744073709551615"));
  CHECK_THAT(complaint(length_prefix(100'000'000) + "{}"), contains("found only 2"));
  CHECK_THAT(complaint("#!/bin/sh\nexit 0\n"), contains("is it a safetensors file?"));

  CHECK_THAT(complaint("[]", 0), contains("begins with '{', found '[]'"));
  CHECK_THAT(complaint(" {}", 0), contains("begins with '{', found ' {}'"));
  CHECK_THAT(complaint("\xEF\xBB\xBF{}", 0), contains("begins with '{'"));
  CHECK_THAT(complaint("\x1b[31m red", 0), contains("found '\\x1b[31m re...'"));
  CHECK_THAT(complaint("{", 0), contains("expected JSON, found a fault at byte 2"));
  CHECK_THAT(complaint("{}}", 0), contains("expected JSON, found a fault at byte 3"));
  CHECK_THAT(complaint("{} // no", 0), contains("expected JSON, found a fault at byte 4"));
  CHECK_THAT(complaint(R"({"a":{"dtype":1e999}})", 0), contains("expected JSON, found a fault"));
  CHECK_THAT(complaint("{\"" + std::string(5000, 'x') + "\":}", 0), contains("expected JSON, found a fault"));
  CHECK_THAT(complaint(std::string("{}\0 ", 4), 0), contains("found a zero byte at byte 2"));
  CHECK_THAT(complaint("{\"\xC3\x28\":1}", 0), contains("expected UTF-8, found an invalid sequence at byte 2"));
  CHECK_THAT(complaint("{\"\xED\xA0\x80\":1}", 0), contains("expected UTF-8, found an invalid sequence at byte 2"));
  CHECK_THAT(complaint(R"({"\ud800":1})", 0), contains("expected JSON, found a fault"));
}

TEST_CASE("a header that describes no tensors says where it goes wrong") {
  const auto hostile = [](const std::string& header) { return complaint("{" + header + "}", 8); };
  CHECK_THAT(hostile(R"("a":1)"), contains("tensor 'a': expected an object, found 1"));
  CHECK_THAT(hostile(R"("a":null)"), contains("tensor 'a': expected an object, found null"));
  CHECK_THAT(hostile(R"("a":[])"), contains("tensor 'a': expected an object, found an array"));
  CHECK_THAT(hostile(R"("a\u001b[2J":[])"), contains("tensor 'a\\x1b[2J': expected an object"));
  CHECK_THAT(hostile("\"" + std::string(300, 'n') + "\":[]"), contains("nnn...': expected an object"));
  CHECK_THAT(hostile(R"("a":{})"), contains("tensor 'a': expected the keys dtype, shape and data_offsets, "
                                            "found no dtype"));
  CHECK_THAT(hostile(R"("a":{"dtype":"U8","data_offsets":[0,8]})"), contains("found no shape"));
  CHECK_THAT(hostile(R"("a":{"dtype":"U8","shape":[8]})"), contains("found no data_offsets"));
  CHECK_THAT(hostile(R"("a":{"dtype":"U8","offsets":[0,8]})"),
             contains("tensor 'a': expected the keys dtype, shape and data_offsets, found 'offsets'"));
  CHECK_THAT(hostile(R"("a":{"dtype":"U8","dtype":"I8"})"),
             contains("tensor 'a', dtype: expected each key once, found it twice"));
  CHECK_THAT(hostile(R"("a":{"shape":[8],"shape":[8]})"), contains("tensor 'a', shape: expected each key once"));
  CHECK_THAT(hostile(R"("a":{"dtype":"F31"})"), contains("tensor 'a', dtype: expected one of BOOL, F4, "));
  CHECK_THAT(hostile(R"("a":{"dtype":"F31"})"), contains("U64, found 'F31'"));
  CHECK_THAT(hostile(R"("a":{"dtype":8})"), contains("tensor 'a', dtype: expected the name of a number type, found 8"));
  CHECK_THAT(hostile(R"("a":{"dtype":{}})"), contains("expected the name of a number type, found an object"));
  CHECK_THAT(hostile(R"("a":{"dtype":["U8"]})"), contains("expected the name of a number type, found an array"));
  CHECK_THAT(hostile(R"("a":{"shape":"8"})"), contains("tensor 'a', shape: expected an array of whole numbers, "
                                                       "found the string '8'"));
  CHECK_THAT(hostile(R"("a":{"shape":8})"), contains("expected an array of whole numbers, found 8"));
  CHECK_THAT(hostile(R"("a":{"shape":[-1]})"), contains("whole numbers from 0 to 2^64 - 1, found -1"));
  CHECK_THAT(hostile(R"("a":{"shape":[-0]})"), contains("found -0"));
  CHECK_THAT(hostile(R"("a":{"shape":[8.0]})"), contains("found 8.0"));
  CHECK_THAT(hostile(R"("a":{"shape":[1e3]})"), contains("found 1e3"));
  CHECK_THAT(hostile(R"("a":{"shape":[18446744073709551616]})"), contains("found 18446744073709551616"));
  CHECK_THAT(hostile(R"("a":{"shape":[true]})"), contains("found true"));
  CHECK_THAT(hostile(R"("a":{"shape":[[8]]})"), contains("found an array"));
  CHECK_THAT(hostile(R"("a":{"shape":[{}]})"), contains("found an object"));
  CHECK_THAT(hostile(R"("a":{"data_offsets":[]})"),
             contains("tensor 'a', data_offsets: expected two offsets [begin, end], found 0"));
  CHECK_THAT(hostile(R"("a":{"data_offsets":[0]})"), contains("expected two offsets [begin, end], found 1"));
  CHECK_THAT(hostile(R"("a":{"data_offsets":[0,8,8]})"), contains("expected two offsets [begin, end], found more"));
  CHECK_THAT(hostile(R"("a":{"data_offsets":[0,-8]})"), contains("expected two whole numbers [begin, end], found -8"));
  CHECK_THAT(hostile(R"("a":{"data_offsets":{}})"), contains("expected two whole numbers [begin, end], found an obj"));
  CHECK_THAT(hostile(R"("a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[0],)"
                     R"("data_offsets":[8,8]})"),
             contains("tensor 'a': expected each name once, found it twice"));

  CHECK_THAT(hostile(R"("__metadata__":1)"), contains("__metadata__: expected an object of strings, found 1"));
  CHECK_THAT(hostile(R"("__metadata__":null)"), contains("__metadata__: expected an object of strings, found null"));
  CHECK_THAT(hostile(R"("__metadata__":{"k":1})"), contains("__metadata__ key 'k': expected a string, found 1"));
  CHECK_THAT(hostile(R"("__metadata__":{"k":{}})"), contains("__metadata__ key 'k': expected a string, found an obj"));
  CHECK_THAT(hostile(R"("__metadata__":{"k":["v"]})"), contains("expected a string, found an array"));
  CHECK_THAT(hostile(R"("__metadata__":{"k":"v","k":"w"})"), contains("__metadata__ key 'k': expected each key once"));
  CHECK_THAT(hostile(R"("__metadata__":{},"__metadata__":{})"), contains("__metadata__: expected it once"));
}

TEST_CASE("tensors must cover the data, each with its own bytes") {
  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets,
                      std::size_t data_bytes) {
    return complaint("{" + entry("t", dtype, shape, offsets) + "}", data_bytes);
  };
  CHECK_THAT(one("F32", "[2]", "[8,0]", 8),
             contains("tensor 't': expected an end after the beginning, found data_offsets [8, 0]"));
  CHECK_THAT(one("F32", "[2]", "[0,8]", 7),
             contains("tensor 't': expected an end within the 7 bytes of data, found data_offsets [0, 8] (is the file "
                      "cut short?)"));
  CHECK_THAT(one("F32", "[2]", "[0,18446744073709551615]", 8), contains("within the 8 bytes of data"));
  CHECK_THAT(one("F32", "[2]", "[0,4]", 4),
             contains("tensor 't': expected 8 bytes for F32 of shape [2], found 4 in data_offsets [0, 4]"));
  CHECK_THAT(one("BF16", "[2, 3, 4]", "[0,50]", 50), contains("expected 48 bytes for BF16 of shape [2, 3, 4]"));
  CHECK_THAT(one("U8", "[]", "[0,0]", 0), contains("expected 1 bytes for U8 of shape [], found 0"));
  CHECK_THAT(one("U8", "[0]", "[0,1]", 1), contains("expected 0 bytes for U8 of shape [0], found 1"));
  CHECK_THAT(one("U8", "[4294967296,4294967296]", "[0,0]", 0),
             contains("tensor 't': expected a shape whose product fits in 64 bits, found [4294967296, 4294967296]"));
  CHECK_THAT(one("U8", "[4294967296,4294967296,0]", "[0,0]", 0), contains("product fits in 64 bits"));
  CHECK_THAT(one("U8", "[0,4294967296,4294967296]", "[0,0]", 0), contains("product fits in 64 bits"));
  CHECK_THAT(one("F64", "[4611686018427387904]", "[0,0]", 0), contains("a size in bits that fits in 64 bits"));
  CHECK_THAT(one("F4", "[3]", "[0,2]", 2), contains("expected elements that fill whole bytes, found shape [3] of F4, "
                                                    "12 bits"));
  CHECK_THAT(one("F6_E2M3", "[2]", "[0,2]", 2), contains("fill whole bytes"));
  CHECK_THAT(one("U8", "[1,1,1,1,1,1,1,1,1,9]", "[0,1]", 1), contains("1, ... 10 dimensions]"));
  CHECK_THAT(one("U8", "[4]", "[1,5]", 5), contains("tensor 't': expected it to begin at byte 0 of the data, where "
                                                    "the one before it ends; found byte 1, a hole"));
  CHECK_THAT(one("U8", "[4]", "[0,4]", 5),
             contains("expected the tensors to cover the 5 bytes of data, found that they end at byte 4"));
  CHECK_THAT(complaint("{}", 3), contains("cover the 3 bytes of data, found that they end at byte 0"));

  const auto two = [](const std::string& first, const std::string& second) {
    return complaint("{" + entry("a", "U8", "[4]", first) + "," + entry("b", "U8", "[4]", second) + "}", 8);
  };
  CHECK_THAT(two("[0,4]", "[2,6]"), contains("tensor 'b': expected it to begin at byte 4 of the data, where the one "
                                             "before it ends; found byte 2, an overlap"));
  CHECK_THAT(two("[4,8]", "[3,7]"), contains("tensor 'b': expected it to begin at byte 0"));
  CHECK_THAT(two("[0,4]", "[0,4]"), contains("tensor 'b': expected it to begin at byte 4"));
  CHECK(two("[4,8]", "[0,4]") == "(accepted)");
  CHECK(one("F4", "[2,3]", "[0,3]", 3) == "(accepted)");
  CHECK(one("F6_E3M2", "[4]", "[0,3]", 3) == "(accepted)");
  CHECK(one("U8", "[3,0]", "[0,0]", 0) == "(accepted)");
  CHECK(complaint("{}", 0) == "(accepted)");
  CHECK(complaint("{}\n\t ", 0) == "(accepted)");
}

TEST_CASE("what is no regular file cannot be opened") {
  const temporary_directory folder;
  const auto refused = [](const fs::path& path) {
    const auto file = io::safetensors_file::try_open(path);
    REQUIRE_FALSE(file);
    CHECK(file.error().code() == errc::io);
    return std::string(file.error().what());
  };
  CHECK_THAT(refused(folder / "absent"), contains("absent: could not open: No such file or directory"));
  CHECK_THAT(refused(folder.path()), contains("expected a regular file, found a directory"));
  CHECK_THAT(refused("/dev/zero"), contains("expected a regular file, found a device, pipe or socket"));
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THAT(refused(folder / "pipe"), contains("found a device, pipe or socket"));
}

TEST_CASE("tensors come in the order of their data and are found by name") {
  const temporary_directory folder;
  const std::string header = R"({"__metadata__":{"who":"us"},)" + entry("z", "U8", "[2]", "[4,6]") + "," +
                             entry("a", "F32", "[]", "[0,4]") + "," + entry("empty", "F64", "[0,7]", "[4,4]") + "}";
  auto opened = io::safetensors_file::open(store(folder / "f", file_with(header, 6)));
  const auto file = std::move(opened);
  REQUIRE(file.size() == 3);
  CHECK(file.tensors()[0].name() == "a");
  CHECK(file.tensors()[1].name() == "empty");
  CHECK(file.tensors()[2].name() == "z");
  CHECK(file.metadata().at("who") == "us");
  CHECK(file.path() == (folder / "f").string());

  CHECK(file["a"].elements() == 1);
  CHECK(file["a"].shape().empty());
  CHECK(file["empty"].elements() == 0);
  CHECK(file["empty"].as<double>().empty());
  CHECK(file["z"].as<std::uint8_t>()[1] == 5 * 7 + 1);
  CHECK(file.find("z") == &file.tensors()[2]);
  CHECK(file.find("y") == nullptr);
  CHECK(file.find("") == nullptr);

  const auto missing = file.try_get("emty");
  REQUIRE_FALSE(missing);
  CHECK(missing.error().code() == errc::unknown_name);
  CHECK_THAT(missing.error().what(), contains("f: expected a tensor 'emty'; the nearest names are 'empty', "));
  CHECK_THROWS_AS(file["emty"], tetromino::error);
  CHECK_THAT(io::safetensors_file::open(store(folder / "none", file_with("{}", 0))).try_get("a").error().what(),
             contains("there are no tensors"));

  const auto wrong = file["a"].try_as<std::int32_t>();
  REQUIRE_FALSE(wrong);
  CHECK(wrong.error().code() == errc::invalid_argument);
  CHECK_THAT(wrong.error().what(), contains("f: tensor 'a': expected elements of type I32, found F32"));
  CHECK_THROWS_AS(file["a"].copy_as<double>(), tetromino::error);
  CHECK_THROWS_AS(file.done_with(counting(4)), tetromino_test::precondition_failed);
}

TEST_CASE("misaligned elements are refused in place, and can be copied") {
  const temporary_directory folder;
  const std::string header = "{" + entry("a", "U8", "[3]", "[0,3]") + "," + entry("b", "F32", "[2]", "[3,11]") + "}";
  const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
  std::string contents = file_with(padded, 11);
  const float values[2] = {1.5f, -2.25f};
  std::memcpy(contents.data() + contents.size() - 8, values, 8);
  const auto file = io::safetensors_file::open(store(folder / "f", contents));
  const auto refused = file["b"].try_as<float>();
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code() == errc::malformed_file);
  CHECK_THAT(refused.error().what(),
             contains("tensor 'b': expected elements at a multiple of 4 bytes, found them at byte " +
                      std::to_string(8 + padded.size() + 3) + " of the file: copy_as reads them from anywhere"));
  CHECK(file["b"].copy_as<float>() == std::vector<float>{1.5f, -2.25f});
}

TEST_CASE("the bundled files read as an independent reader reads them, and survive being written again") {
  const temporary_directory folder;
  std::size_t files = 0;
  for (const auto& candidate : fs::directory_iterator(tetromino_test::data_file(""))) {
    if (candidate.path().extension() != ".safetensors") continue;
    ++files;
    INFO(candidate.path());
    const auto expected = reference::read_safetensors(candidate.path());
    const auto file = io::safetensors_file::open(candidate.path());
    require_same(file, expected);

    std::vector<io::tensor_declaration> declared;
    for (const auto& tensor : file) declared.push_back({tensor.name(), tensor.dtype(), tensor.shape()});
    auto writer = io::safetensors_writer::create(folder / "copy", declared, file.metadata(), &file);
    for (const auto& tensor : file) writer.append(tensor.name(), tensor.bytes());
    writer.finish();
    require_same(file, reference::read_safetensors(folder / "copy"));
    require_same(io::safetensors_file::open(folder / "copy"), expected);
  }
  CHECK(files >= 2);
}

TEST_CASE("the writer's bytes are those of the format, whatever the order and size of the pieces") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{
      {"w\"\\\n", io::dtype::F32, {1, 2}}, {"none", io::dtype::F64, {0}}, {"s", io::dtype::U8, {3}}};
  const io::safetensors_metadata metadata{{"format", "pt"}, {"\xC3\xA4", "\x1f"}};
  const std::string header = R"({"__metadata__":{"format":"pt","\u00e4":"\u001f"},"w\"\\\u000a":{"dtype":"F32",)"
                             R"("shape":[1,2],"data_offsets":[0,8]},"none":{"dtype":"F64","shape":[0],)"
                             R"("data_offsets":[8,8]},"s":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})";
  std::string expected = header;
  expected.replace(expected.find("\\u00e4"), 6, "\xC3\xA4");
  expected.append((8 - expected.size() % 8) % 8, ' ');
  expected = length_prefix(expected.size()) + expected + std::string("\0\0\x80\x3f\0\0\0\xc0\x07\x08\x09", 11);

  const std::vector<float> weights{1.0f, -2.0f};
  auto first = io::safetensors_writer::create(folder / "first", declared, metadata);
  first.append_values<float>("w\"\\\n", weights);
  first.append("s", counting(3, 7));
  first.finish();
  CHECK(load(folder / "first") == expected);

  auto second = io::safetensors_writer::create(folder / "second", declared, metadata);
  for (std::uint8_t i = 7; i < 10; ++i) second.append("s", counting(1, i));
  second.append("none", {});
  second.append("s", {});
  auto moved = std::move(second);
  for (const float w : weights) moved.append_values<float>("w\"\\\n", std::span(&w, 1));
  moved.finish();
  CHECK(load(folder / "second") == expected);
  CHECK(files_in(folder.path()) == 2);

  const auto file = io::safetensors_file::open(folder / "first");
  require_same(file, reference::read_safetensors(folder / "first"));
  CHECK(file.metadata() == metadata);
  CHECK(file["w\"\\\n"].as<float>()[1] == -2.0f);
}

TEST_CASE("the data begins at a multiple of 8 bytes, with as little padding as that takes") {
  const temporary_directory folder;
  for (std::size_t length = 1; length <= 16; ++length) {
    const std::vector<io::tensor_declaration> declared{{std::string(length, 'n'), io::dtype::U8, {1}}};
    auto writer = io::safetensors_writer::create(folder / "f", declared);
    writer.append(declared[0].name, counting(1));
    writer.finish();
    const std::string contents = load(folder / "f");
    CHECK(contents.size() % 8 == 1);
    CHECK(contents.size() - contents.rfind('}') <= 9);
  }
}

TEST_CASE("random files round-trip", "[random]") {
  const temporary_directory folder;
  std::mt19937_64 random(tetromino_test::seed());
  const auto below = [&](std::uint64_t n) { return static_cast<std::size_t>(random() % n); };
  for (int round = 0; round < 50; ++round) {
    std::vector<io::tensor_declaration> declared;
    for (std::size_t t = below(8); t > 0; --t) {
      io::tensor_declaration tensor{"tensor." + std::to_string(t), static_cast<io::dtype>(below(22)), {}};
      for (std::size_t d = below(4); d > 0; --d) tensor.shape.push_back(below(6));
      const std::size_t bits = io::bits_per_element(tensor.dtype);
      if (bits < 8) tensor.shape.push_back(4);
      declared.push_back(tensor);
    }
    declared = io::aligned_order(declared);
    io::safetensors_metadata metadata;
    for (std::size_t m = below(3); m > 0; --m) metadata[std::string(m, 'k')] = std::to_string(random());
    auto writer = io::safetensors_writer::create(folder / "f", declared, metadata);
    std::map<std::string, bytes> contents;
    for (const auto& tensor : declared) {
      const auto size = *tetromino::detail::tensor_bytes(tensor.dtype, tensor.shape);
      bytes& mine = contents[tensor.name];
      while (mine.size() < size) {
        bytes piece(1 + below(size - mine.size()));
        for (auto& b : piece) b = static_cast<std::uint8_t>(random());
        writer.append(tensor.name, piece);
        mine.insert(mine.end(), piece.begin(), piece.end());
      }
    }
    writer.finish();
    const auto file = io::safetensors_file::open(folder / "f");
    require_same(file, reference::read_safetensors(folder / "f"));
    REQUIRE(file.size() == declared.size());
    CHECK(file.metadata() == metadata);
    for (const auto& tensor : declared) {
      INFO(tensor.name);
      CHECK(file[tensor.name].shape() == tensor.shape);
      const auto stored = file[tensor.name].bytes();
      CHECK(bytes(stored.begin(), stored.end()) == contents[tensor.name]);
      CHECK((stored.data() - file.tensors()[0].bytes().data()) % static_cast<int>(io::alignment(tensor.dtype)) == 0);
    }
  }
}

TEST_CASE("declarations that make no valid file are refused before anything is written") {
  const temporary_directory folder;
  const auto refused = [&](const std::vector<io::tensor_declaration>& declared,
                           const io::safetensors_metadata& metadata = {}) {
    const auto writer = io::safetensors_writer::try_create(folder / "out", declared, metadata);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().code() == errc::invalid_argument);
    CHECK(files_in(folder.path()) == 0);
    return std::string(writer.error().what());
  };
  CHECK_THAT(refused({{"a", io::dtype::U8, {1}}, {"a", io::dtype::U8, {1}}}),
             contains("out: tensor 'a': expected each name once, found it twice"));
  CHECK_THAT(refused({{"__metadata__", io::dtype::U8, {1}}}), contains("the format reserves this name"));
  CHECK_THAT(refused({{"\xFF", io::dtype::U8, {1}}}), contains("expected a name in UTF-8"));
  CHECK_THAT(refused({}, {{"\xFF", ""}}), contains("expected UTF-8"));
  CHECK_THAT(refused({}, {{"k", "\xC3"}}), contains("metadata key 'k': expected UTF-8"));
  CHECK_THAT(refused({{"a", io::dtype::F4, {3}}}), contains("expected elements that fill whole bytes"));
  CHECK_THAT(refused({{"a", io::dtype::U8, {~std::size_t{0}, 2}}}), contains("product fits in 64 bits"));
  CHECK_THAT(refused({{"a", io::dtype::U8, {std::size_t{1} << 60}},
                      {"b", io::dtype::U8, {std::size_t{1} << 60}},
                      {"c", io::dtype::U8, {std::size_t{1} << 60}},
                      {"d", io::dtype::U8, {std::size_t{1} << 60}}}),
             contains("tensor 'd': expected a file of less than 2^62 bytes"));
  CHECK_THAT(refused({{"a", io::dtype::U8, {3}}, {"b", io::dtype::F32, {1}}}),
             contains("tensor 'b': expected F32 at a multiple of 4 bytes, got byte 3 of the data: declare the tensors "
                      "in aligned_order"));
  CHECK_THAT(refused({}, {{"k", std::string(100'000'001, 'x')}}), contains("expected a header of at most 100000000"));

  const auto ordered = io::aligned_order({{"a", io::dtype::U8, {3}},
                                          {"b", io::dtype::BF16, {1}},
                                          {"c", io::dtype::F32, {1}},
                                          {"d", io::dtype::F16, {1}},
                                          {"e", io::dtype::I64, {1}}});
  std::string names;
  for (const auto& tensor : ordered) names += tensor.name;
  CHECK(names == "ecbda");
}

TEST_CASE("bytes that do not belong are refused, and the file can still be finished") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{{"weight", io::dtype::F32, {2}}, {"scale", io::dtype::U8, {2}}};
  auto writer = io::safetensors_writer::create(folder / "out", declared);
  const auto unknown = writer.try_append("scales", counting(1));
  CHECK(unknown.error().code() == errc::unknown_name);
  CHECK_THAT(unknown.error().what(), contains("out: expected a declared tensor, got 'scales'; the nearest names are "
                                              "'scale', 'weight'"));
  writer.append("weight", counting(5));
  const auto many = writer.try_append("weight", counting(4));
  CHECK(many.error().code() == errc::shape_mismatch);
  CHECK_THAT(many.error().what(), contains("tensor 'weight': expected at most 3 more bytes of 8, got 4"));
  const std::vector<std::uint16_t> halves{1};
  CHECK_THAT(writer.try_append_values<std::uint16_t>("weight", halves).error().what(),
             contains("tensor 'weight': expected elements of type F32, got U16"));
  CHECK_THROWS_AS(writer.append("scale", counting(3)), tetromino::error);

  const auto early = writer.try_finish();
  CHECK(early.error().code() == errc::shape_mismatch);
  CHECK_THAT(early.error().what(), contains("tensor 'scale': expected 2 bytes before the file is finished, got 0"));
  CHECK_FALSE(fs::exists(folder / "out"));
  writer.append("scale", counting(2));
  CHECK_THAT(writer.try_finish().error().what(), contains("tensor 'weight': expected 8 bytes before"));
  writer.append("weight", counting(3, 5));
  writer.finish();
  CHECK(fs::exists(folder / "out"));
  CHECK_THAT(writer.try_finish().error().what(), contains("out: it was already finished, or a write to it failed"));
  CHECK(writer.try_append("none", {}).error().code() == errc::unknown_name);
  CHECK(writer.try_append("scale", counting(1)).error().code() == errc::shape_mismatch);
}

TEST_CASE("without finish, nothing appears and nothing is left") {
  const temporary_directory folder;
  store(folder / "out", "the old file");
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {100}}};
  {
    auto writer = io::safetensors_writer::create(folder / "out", declared);
    writer.append("a", counting(50));
    CHECK(files_in(folder.path()) == 2);
    auto other = io::safetensors_writer::create(folder / "out", declared);
    CHECK(files_in(folder.path()) == 3);
    other = std::move(writer);
    CHECK(files_in(folder.path()) == 2);
  }
  CHECK(files_in(folder.path()) == 1);
  CHECK(load(folder / "out") == "the old file");
}

TEST_CASE("the writer refuses paths that it must not replace") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {4}}};
  const fs::path in = store(folder / "in", file_with("{" + entry("a", "U8", "[4]", "[0,4]") + "}", 4));
  const std::string before = load(in);
  const auto source = io::safetensors_file::open(in);
  fs::create_symlink(in, folder / "link");
  fs::create_hard_link(in, folder / "hard");
  for (const char* same : {"in", "link", "hard", "../in"}) {
    fs::create_directory(folder / "sub");
    const fs::path path = std::string(same) == "../in" ? folder.path() / "sub/../in" : folder / same;
    const auto writer = io::safetensors_writer::try_create(path, declared, {}, &source);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().code() == errc::invalid_argument);
    CHECK_THAT(writer.error().what(), contains("expected another file than the one being read, " + in.string()));
  }
  CHECK(load(in) == before);
  CHECK(io::safetensors_writer::try_create(folder / "other", declared, {}, &source));

  const auto refused = [&](const fs::path& path) {
    const auto writer = io::safetensors_writer::try_create(path, declared);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().code() == errc::io);
    return std::string(writer.error().what());
  };
  CHECK_THAT(refused("/dev/null"), contains("expected a regular file to write to, found a device"));
  CHECK_THAT(refused(folder / "sub"), contains("expected a regular file to write to, found a directory"));
  CHECK_THAT(refused(folder.path() / "absent/out"), contains("No such file or directory"));
  CHECK_THAT(refused(folder.path() / "in/out"), contains("Not a directory"));
}

TEST_CASE("a full disk leaves no file") {
  const temporary_directory folder;
  store(folder / "out", "the old file");
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {std::size_t{1} << 20}}};
  struct ::rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t most : {rlim_t{64}, rlim_t{4096}, rlim_t{100'000}}) {
    struct ::rlimit small = before;
    small.rlim_cur = most;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    auto writer = io::safetensors_writer::try_create(folder / "out", declared);
    auto outcome = writer ? writer->try_append("a", bytes(std::size_t{1} << 20)) : writer.error();
    const auto again = writer ? writer->try_append("a", bytes(1)) : writer.error();
    const auto finish = writer ? writer->try_finish() : writer.error();
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
    REQUIRE_FALSE(outcome);
    CHECK(outcome.error().code() == errc::io);
    CHECK_THAT(outcome.error().what(), contains("out: could not write "));
    CHECK_THAT(outcome.error().what(), contains("File too large"));
    CHECK_FALSE(again);
    CHECK_FALSE(finish);
    CHECK(files_in(folder.path()) == 1);
    CHECK(load(folder / "out") == "the old file");
  }
  std::signal(SIGXFSZ, handler);

  if (fs::exists("/dev/full")) {
    const auto full = tetromino::detail::open_file("/dev/full", O_WRONLY);
    REQUIRE(full.is_open());
    CHECK(tetromino::detail::write_all(full.number(), 0, counting(10)) == ENOSPC);
  }
}

TEST_CASE("a process killed while it writes leaves no file under the final name") {
  const temporary_directory folder;
  constexpr std::size_t pieces = 8, piece = 4096;
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {pieces * piece}}};
  for (std::size_t written = 0; written <= pieces; ++written) {
    const fs::path out = folder / ("out" + std::to_string(written));
    const ::pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      auto writer = io::safetensors_writer::create(out, declared);
      for (std::size_t i = 0; i < written; ++i) writer.append("a", bytes(piece));
      ::kill(::getpid(), SIGKILL);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    CHECK_FALSE(fs::exists(out));
    CHECK(files_in(folder.path()) == written + 1);

    auto writer = io::safetensors_writer::create(folder / "whole", declared);
    writer.append("a", bytes(pieces * piece));
    writer.finish();
    CHECK(io::safetensors_file::open(folder / "whole").size() == 1);
    fs::remove(folder / "whole");
  }
}

TEST_CASE("streaming a large file keeps memory bounded") {
  const auto resident_bytes = [] {
    std::ifstream statm("/proc/self/statm");
    std::size_t total = 0, resident = 0;
    statm >> total >> resident;
    return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  };
  if (resident_bytes() == 0) return;  // no such file on this system
  const temporary_directory folder;
  constexpr std::size_t size = std::size_t{192} << 20, slice = std::size_t{1} << 20;
  const std::string start =
      file_with("{" + entry("a", "U8", "[" + std::to_string(size) + "]", "[0," + std::to_string(size) + "]") + "}", 0);
  store(folder / "large", start);
  REQUIRE(::truncate((folder / "large").c_str(), static_cast<off_t>(start.size() + size)) == 0);
  const auto file = io::safetensors_file::open(folder / "large");
  const std::size_t before = resident_bytes();
  std::size_t most = before;
  std::uint64_t sum = 0;
  const auto all = file["a"].bytes();
  // Slices that begin and end in the middle of a page.
  for (std::size_t at = 0; at < size; at += slice - 1000) {
    const auto part = all.subspan(at, std::min(slice - 1000, size - at));
    for (std::size_t i = 0; i < part.size(); i += 512) sum += part[i];
    most = std::max(most, resident_bytes());
    file.done_with(part);
  }
  CHECK(sum == 0);
  CHECK(most - before < 8 * slice);
  CHECK(all[0] + all[size - 1] == 0);
}

TEST_CASE("every header with one changed byte is read or refused", "[random]") {
  const std::string header = R"({"__metadata__":{"a\u00e9":"b"},)" + entry("x", "F32", "[2, 1]", "[0,8]") + "," +
                             entry("y", "F4", "[6]", "[8,11]") + "," + entry("z", "U8", "[]", "[11,12]") + "} ";
  const std::string valid = file_with(header, 12);
  std::size_t accepted = 0;
  const auto check = [&](const std::string& contents) {
    const std::span<const std::uint8_t> file(reinterpret_cast<const std::uint8_t*>(contents.data()), contents.size());
    const auto parsed = tetromino::detail::parse_safetensors(file, "f");
    if (!parsed) {
      if (parsed.error().code() != errc::malformed_file) FAIL(parsed.error().what());
      return;
    }
    ++accepted;
    std::size_t end = parsed->data_begin;
    for (const auto& tensor : parsed->tensors) {
      if (parsed->data_begin + tensor.begin != end) FAIL("a hole in " << contents);
      end = parsed->data_begin + tensor.end;
    }
    if (end != contents.size()) FAIL("bytes without a tensor in " << contents);
    const auto second = reference::parse_safetensors({file.begin(), file.end()});
    if (second.tensors.size() != parsed->tensors.size()) FAIL("another number of tensors in " << contents);
  };
  check(valid);
  REQUIRE(accepted == 1);
  for (std::size_t at = 0; at < 8 + header.size(); ++at) {
    std::string contents = valid;
    for (int value = 0; value < 256; ++value) {
      contents[at] = static_cast<char>(static_cast<unsigned char>(value));
      check(contents);
    }
    check(valid.substr(0, at));
  }
  CHECK(accepted > 100);

  const std::vector<std::string> tokens{
      "{",  "}",   "[",    "]",    ":", ",",         "\"",        "\\u0000", "18446744073709551615",
      "-1", "1e9", "\xF0", "null", "0", "\"shape\"", "\"dtype\"", "\"F64\"", "__metadata__"};
  std::mt19937_64 random(tetromino_test::seed());
  for (int round = 0; round < 30'000; ++round) {
    std::string contents = valid;
    for (std::uint64_t edits = 1 + random() % 4; edits > 0; --edits) {
      const std::size_t at = 8 + static_cast<std::size_t>(random() % (contents.size() - 8));
      switch (random() % 4) {
        case 0:
          contents[at] = static_cast<char>(static_cast<unsigned char>(random()));
          break;
        case 1:
          contents.erase(at, 1 + static_cast<std::size_t>(random() % 8));
          break;
        case 2:
          contents.insert(at, tokens[static_cast<std::size_t>(random() % tokens.size())]);
          break;
        default:
          contents.insert(at, contents.substr(static_cast<std::size_t>(random() % at), 1 + random() % 30));
          break;
      }
      if (contents.size() < 9) contents = valid;
    }
    if (random() % 2 == 0) contents.replace(0, 8, length_prefix(contents.size() - 8 - 12));
    check(contents);
  }
}

TEST_CASE("UTF-8 is told from what is not") {
  // Straight from the definition: decode by the lead byte's pattern, then ask whether the value has that length.
  const auto is_utf8 = [](const std::string& s) {
    for (std::size_t i = 0; i < s.size();) {
      const auto lead = static_cast<unsigned char>(s[i]);
      const int length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
      if (length == 0 || i + static_cast<std::size_t>(length) > s.size()) return false;
      std::uint32_t code = length == 1 ? lead : lead & (0x7Fu >> length);
      for (int k = 1; k < length; ++k) {
        const auto byte = static_cast<unsigned char>(s[i + static_cast<std::size_t>(k)]);
        if (byte >> 6 != 2) return false;
        code = code << 6 | (byte & 63u);
      }
      const int needs = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
      if (needs != length || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return false;
      i += static_cast<std::size_t>(length);
    }
    return true;
  };
  const auto text = [](std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d, std::size_t length) {
    const char all[4] = {
        static_cast<char>(static_cast<unsigned char>(a)), static_cast<char>(static_cast<unsigned char>(b)),
        static_cast<char>(static_cast<unsigned char>(c)), static_cast<char>(static_cast<unsigned char>(d))};
    return std::string(all, length);
  };
  std::size_t wrong = 0;
  const auto compare = [&](const std::string& s) {
    wrong += tetromino::detail::invalid_utf8(s).has_value() == is_utf8(s);
  };
  for (std::uint32_t a = 0; a < 256; ++a) {
    compare(text(a, 0, 0, 0, 1));
    for (std::uint32_t b = 0; b < 256; ++b) {
      compare(text(a, b, 0, 0, 2));
      for (const std::uint32_t c : {0x00u, 0x22u, 0x7Fu, 0x80u, 0x9Fu, 0xA0u, 0xBFu, 0xC0u, 0xFFu}) {
        compare(text(a, b, c, 0, 3));
        for (const std::uint32_t d : {0x00u, 0x7Fu, 0x80u, 0xBFu, 0xC0u}) compare(text(a, b, c, d, 4));
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(tetromino::detail::invalid_utf8("ab\xC3") == 2);
}
