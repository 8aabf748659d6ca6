#include "check.hpp"

#include <tetromino/io/safetensors.hpp>

#include "support/safetensors_files.hpp"

#include <unistd.h>  // ::truncate, ::sysconf

#include <filesystem>  // std::filesystem
#include <fstream>     // std::ifstream
#include <random>      // std::mt19937_64
#include <span>        // std::span
#include <string>      // std::string
#include <vector>      // std::vector

namespace fs = std::filesystem;
namespace io = tetromino::io;
using tetromino::errc;
using namespace tetromino_test;

namespace {

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
TEST_CASE("streaming a large file keeps memory bounded") {
  const auto resident_bytes = [] {  // of mapped files alone: a sanitizer's own memory grows with what is read
    std::ifstream statm("/proc/self/statm");
    std::size_t total = 0, resident = 0, of_files = 0;
    statm >> total >> resident >> of_files;
    return of_files * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
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

TEST_CASE("no metadata may be called null, as other writers do") {
  const tetromino_test::temporary_directory folder;
  const std::string header = R"({"__metadata__":null,)" + entry("x", "U8", "[3]", "[0,3]") + "}";
  const auto file = io::safetensors_file::open(store(folder / "null", file_with(header, 3)));
  CHECK(file.metadata().empty());
  CHECK(file["x"].elements() == 3);
}

TEST_CASE("after a move, a file has no tensors and no name") {
  const tetromino_test::temporary_directory folder;
  const std::string header = "{" + entry("x", "U8", "[3]", "[0,3]") + "}";
  auto file = io::safetensors_file::open(store(folder / "f", file_with(header, 3)));
  const auto moved = std::move(file);
  CHECK(moved["x"].elements() == 3);
  CHECK(file.path().empty());  // NOLINT(bugprone-use-after-move): what is tested
  CHECK_THROWS_WITH(file["x"], contains("there are no tensors"));
}

TEST_CASE("every header with one changed byte is read or refused", "[random]") {
  const std::string header = R"({"__metadata__":{"a\u00e9":"b"},)" + entry("x", "F32", "[2, 1]", "[0,8]") + "," +
                             entry("y", "F4", "[6]", "[8,11]") + "," + entry("z", "U8", "[]", "[11,12]") + "} ";
  const std::string valid = file_with(header, 12);
  std::size_t accepted = 0;
  const auto check = [&](const std::string& contents) {
    const std::span<const std::uint8_t> file(reinterpret_cast<const std::uint8_t*>(contents.data()), contents.size());
    const auto parsed = tetromino::detail::parse_safetensors(file, file.size(), "f");
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
      const std::size_t at = 8 + random() % (contents.size() - 8);
      switch (random() % 4) {
        case 0:
          contents[at] = static_cast<char>(static_cast<unsigned char>(random()));
          break;
        case 1:
          contents.erase(at, 1 + random() % 8);
          break;
        case 2:
          contents.insert(at, tokens[random() % tokens.size()]);
          break;
        default:
          contents.insert(at, contents.substr(random() % at, 1 + random() % 30));
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
