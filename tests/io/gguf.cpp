#include "check.hpp"

#include <tetromino/io/gguf.hpp>

#include "reference/gguf_reader.hpp"

#include <cmath>       // std::isinf
#include <cstring>     // std::memcpy
#include <filesystem>  // std::filesystem
#include <fstream>     // std::ofstream, std::ifstream
#include <iterator>    // std::istreambuf_iterator
#include <random>      // std::mt19937_64
#include <string>      // std::string
#include <vector>      // std::vector

namespace fs = std::filesystem;
namespace io = tetromino::io;
using namespace reference;
using tetromino::errc;
using tetromino_test::contains;
using tetromino_test::temporary_directory;

namespace {

using bytes = std::vector<std::uint8_t>;

fs::path store(const fs::path& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary) << contents;
  return path;
}

bytes load(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::size_t files_in(const fs::path& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

/// What opening a file of these contents says.
std::string complaint(const std::string& contents) {
  const temporary_directory folder;
  const fs::path path = store(folder / "hostile.gguf", contents);
  const auto file = io::gguf_file::try_open(path);
  if (file) return "(accepted)";
  CHECK(file.error().code() == errc::malformed_file);
  const std::string message = file.error().what(), prefix = path.string() + ": ";
  CHECK(message.substr(0, prefix.size()) == prefix);
  CHECK(message.size() < prefix.size() + 500);
  CHECK_THROWS_AS(io::gguf_file::open(path), tetromino::error);
  return message.substr(prefix.size());
}

/// With one metadata entry, or one tensor.
std::string entry_complaint(const std::string& entry) {
  return complaint(gguf_with(gguf_start(0, 1) + entry + std::string(40, '\0'), ""));
}
std::string tensor_complaint(const std::string& info, std::size_t data_bytes = 64) {
  return complaint(gguf_with(gguf_start(1, 0) + info, std::string(data_bytes, 'd')));
}

constexpr std::uint64_t huge = ~std::uint64_t{0};

void require_same(const io::gguf_file& file, const gguf_contents& expected) {
  REQUIRE(file.size() == expected.tensors.size());
  REQUIRE(file.metadata().size() == expected.metadata.size());
  for (const auto& [key, value] : file.metadata()) {
    INFO(key);
    const auto& [type, stored] = expected.metadata.at(key);
    CHECK(static_cast<std::uint32_t>(value.type()) == type);
    CHECK(std::string(value.bytes().begin(), value.bytes().end()) == stored);
  }
  for (const auto& tensor : file) {
    INFO(tensor.name());
    const auto& same = expected.tensors.at(tensor.name());
    CHECK(static_cast<std::uint32_t>(tensor.type()) == same.type);
    CHECK(std::vector<std::uint64_t>(tensor.shape().rbegin(), tensor.shape().rend()) == same.dimensions);
    CHECK(bytes(tensor.bytes().begin(), tensor.bytes().end()) == same.bytes);
  }
}

}  // namespace

TEST_CASE("a file that is no GGUF file says so") {
  CHECK_THAT(complaint(""), contains("expected a file that begins with 'GGUF', found no bytes"));
  CHECK_THAT(complaint("GGU"), contains("found 'GGU'"));
  CHECK_THAT(complaint("ggml and more"), contains("found 'ggml'"));
  CHECK_THAT(complaint("GGUF"), contains("expected 4 bytes for the version, found 0 (is the file cut short?)"));
  CHECK_THAT(complaint(gguf_start(0, 0, 1)), contains("expected version 2 or 3, found version 1"));
  CHECK_THAT(complaint(gguf_start(0, 0, 4)), contains("found version 4"));
  CHECK_THAT(complaint(gguf_start(0, 0, 0x03000000)),
             contains("expected a little-endian file, found a big-endian one"));
  CHECK_THAT(complaint(gguf_start(0, 0, 0)), contains("found version 0"));
  CHECK_THAT(complaint(gguf_start(0, 0).substr(0, 20)), contains("for the number of metadata entries, found 4"));
  CHECK_THAT(complaint(gguf_start(huge, 0)), contains("expected at most 0 tensors in the 0 bytes that are left, found "
                                                      "18446744073709551615"));
  CHECK_THAT(complaint(gguf_start(0, huge) + std::string(28, 'x')), contains("expected at most 2 metadata entries"));
  CHECK(complaint(gguf_start(0, 0)) == "(accepted)");
  CHECK(complaint(gguf_start(0, 0, 2)) == "(accepted)");
  CHECK(complaint(gguf_with(gguf_start(0, 0), "")) == "(accepted)");
  CHECK_THAT(complaint(gguf_with(gguf_start(0, 0), "x")), contains("expected the file to end at byte 32, found 33"));
}

TEST_CASE("metadata that make no sense say which key, and why") {
  CHECK_THAT(entry_complaint(gguf_number(huge)),
             contains("metadata entry 0: expected 18446744073709551615 bytes for its "
                      "key, found"));
  CHECK_THAT(entry_complaint(gguf_entry("", 0, "x")),
             contains("metadata entry 0: expected a name, found an empty one"));
  CHECK_THAT(entry_complaint(gguf_entry("\xFF", 0, "x")), contains("expected a name in UTF-8 without zero bytes"));
  CHECK_THAT(entry_complaint(gguf_entry(std::string("a\0b", 3), 0, "x")), contains("zero bytes, found 'a\\x00b'"));
  CHECK_THAT(entry_complaint(gguf_entry(std::string(65536, 'k'), 0, "x")),
             contains("at most 65535 bytes, found 65536"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 13, "x")),
             contains("key 'k': expected a type of value from 0 to 12, found 13"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 7, "\x02")), contains("key 'k': expected a bool of 0 or 1, found 2"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 8, gguf_number(huge))), contains("bytes for a string, found"));
  const auto array = [](std::uint32_t type, std::uint64_t count) { return gguf_number(type) + gguf_number(count); };
  CHECK_THAT(entry_complaint(gguf_entry("k", 9, array(9, 1))), contains("numbers or strings, found one of arrays"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 9, array(99, 1))), contains("expected a type of elements from 0 to 12"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 9, array(12, huge))),
             contains("expected 18446744073709551615 values of 8"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 9, array(12, (huge >> 3) + 2))), contains("values of 8 bytes, found"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 9, array(8, huge))), contains("for a string, found"));
  CHECK_THAT(entry_complaint(gguf_entry("k", 9, array(7, 2) + "\x01\x03")), contains("bool of 0 or 1, found 3"));
  CHECK_THAT(complaint(gguf_with(gguf_start(0, 2) + gguf_entry("k", 0, "x") + gguf_entry("k", 0, "y"), "")),
             contains("key 'k': expected each key once, found it twice"));
  CHECK_THAT(complaint(gguf_start(0, 1) + gguf_entry("key", 5, "123")), contains("key 'key': expected 1 values of 4"));
  CHECK_THAT(entry_complaint(gguf_entry("general.alignment", 4, gguf_number(std::uint32_t{24}))),
             contains("key 'general.alignment': expected a power of two, found 24"));
  CHECK_THAT(entry_complaint(gguf_entry("general.alignment", 4, gguf_number(std::uint32_t{0}))), contains("found 0"));
  CHECK_THAT(entry_complaint(gguf_entry("general.alignment", 10, gguf_number(std::uint64_t{32}))),
             contains("expected uint32, found uint64"));
}

TEST_CASE("tensors that make no sense say which, and why") {
  CHECK_THAT(tensor_complaint(gguf_tensor_info("", {16}, 0, 0)), contains("tensor 0: expected a name"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {1, 1, 1, 1, 16}, 0, 0)), contains("tensor 't': expected at most 4 "
                                                                                       "dimensions, found 5"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {16}, 4, 0)),
             contains("expected the number of one of ggml's types, found 4"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {16}, 43, 0)), contains("found 43"));
  CHECK_THAT(
      tensor_complaint(gguf_tensor_info("t", {48, 2}, 39, 0)),
      contains("tensor 't': expected rows of whole blocks of 32 elements, as MXFP4 has them, found shape [2, 48]"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {32}, 40, 0)), contains("whole blocks of 64 elements"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {huge, 2}, 0, 0)), contains("expected a size in bytes that fits"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {huge / 2}, 0, 0)), contains("expected a size in bytes that fits"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {huge, huge, 0, huge}, 24, 0)),
             contains("size in bytes that fits"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {17}, 0, 0)),
             contains("tensor 't': expected 68 bytes at byte 0 for F32 of shape [17], found 64 bytes of data (is the "
                      "file cut short?)"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {huge - 31}, 24, 0)), contains("found 64 bytes of data"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {16}, 0, 32)), contains("expected it at byte 0 of the data"));
  CHECK_THAT(tensor_complaint(gguf_tensor_info("t", {4}, 0, 0)), contains("expected the file to end at byte"));
  CHECK_THAT(complaint(gguf_start(1, 0) + gguf_tensor_info("t", {1}, 0, 0)),
             contains("expected the data at byte 64, found"));
  CHECK_THAT(complaint(gguf_start(1, 0) + gguf_tensor_info("t", {1}, 0, 0).substr(0, 25) + "12"),
             contains("tensor 't': expected 8 bytes for its offset, found 2"));

  const auto two = [](std::uint64_t second) {
    return gguf_with(gguf_start(2, 0) + gguf_tensor_info("a", {1}, 0, 0) + gguf_tensor_info("b", {1}, 0, second),
                     std::string(36, 'd'));
  };
  CHECK(complaint(two(32)) == "(accepted)");
  CHECK_THAT(complaint(two(4)), contains("tensor 'b': expected it at byte 32 of the data, after the tensor before it, "
                                         "found byte 4"));
  CHECK_THAT(complaint(two(64)), contains("found byte 64"));
  CHECK_THAT(
      complaint(gguf_with(gguf_start(2, 0) + gguf_tensor_info("a", {8}, 0, 0) + gguf_tensor_info("a", {8}, 0, 32),
                          std::string(64, 'd'))),
      contains("tensor 'a': expected each name once, found it twice"));
}

TEST_CASE("every prefix of a file is refused without a fault, and the file itself is read") {
  std::string names;
  for (const char* token : {"<s>", "", "caf\xC3\xA9"}) names += gguf_string(token);
  const std::string header =
      gguf_start(2, 3) + gguf_entry("general.architecture", 8, gguf_string("llama")) +
      gguf_entry("general.alignment", 4, gguf_number(std::uint32_t{64})) +
      gguf_entry("tokens", 9, gguf_number(std::uint32_t{8}) + gguf_number(std::uint64_t{3}) + names) +
      gguf_tensor_info("blk.0.ffn_up.weight", {32, 2, 3}, 39, 0) + gguf_tensor_info("s", {}, 0, 128);
  const std::string contents = gguf_with(header, std::string(132, 'w'), 64);
  const temporary_directory folder;
  for (std::size_t size = 0; size < contents.size(); ++size) {
    const auto file = io::gguf_file::try_open(store(folder / "cut", contents.substr(0, size)));
    REQUIRE_FALSE(file);
    CHECK(file.error().code() == errc::malformed_file);
  }
  const auto opened = io::gguf_file::open(store(folder / "whole", contents));
  const auto file = std::move(const_cast<io::gguf_file&>(opened));
  require_same(file, read_gguf(load(folder / "whole")));
  CHECK(file.path() == (folder / "whole").string());
  CHECK(file.metadata().get<std::string_view>("general.architecture") == "llama");
  CHECK(file.metadata().find("tokens")->as_array<std::string_view>() ==
        std::vector<std::string_view>{"<s>", "", "caf\xC3\xA9"});
  const auto& weights = file["blk.0.ffn_up.weight"];
  CHECK(weights.type() == io::ggml_type::MXFP4);
  CHECK(weights.shape() == std::vector<std::size_t>{3, 2, 32});
  CHECK(weights.elements() == 192);
  CHECK(file["s"].elements() == 1);
  float w = 0;
  std::memcpy(&w, "wwww", 4);
  CHECK(file["s"].as<float>()[0] == w);
  CHECK_THAT(weights.try_as<float>().error().what(),
             contains("whole: tensor 'blk.0.ffn_up.weight': expected elements of type F32, found MXFP4"));
  CHECK_THAT(file.try_get("t").error().what(), contains("whole: expected a tensor 't'; the nearest names are 's'"));
  CHECK_THAT(file.metadata().try_get<std::uint32_t>("tokens").error().what(),
             contains("key 'tokens': expected uint32, found an array of string"));
  CHECK_THAT(file.metadata().try_get<bool>("none").error().what(), contains("expected a key 'none', found none"));
  CHECK_THAT(file.metadata().find("tokens")->try_as_array<float>().error().what(),
             contains("expected an array of float32, found an array of string"));
  CHECK_THAT(file.metadata().find("general.alignment")->try_as_array<float>().error().what(),
             contains("expected an array of float32, found uint32"));
}

TEST_CASE("every type has ggml's block") {
  std::size_t known = 0;
  for (std::uint32_t number = 0; number < 60; ++number) {
    const auto* const fact = tetromino::detail::find_ggml_fact(number);
    if (fact == nullptr) {
      CHECK_THROWS(gguf_block(number));
      continue;
    }
    ++known;
    INFO(fact->name);
    CHECK(io::block_elements(fact->type) == gguf_block(number).first);
    CHECK(io::block_bytes(fact->type) == gguf_block(number).second);
  }
  CHECK(known == tetromino::detail::ggml_facts.size());
}

TEST_CASE("a GGUF writer's bytes are those of the format, whatever the order and size of the pieces") {
  const temporary_directory folder;
  io::gguf_metadata metadata;
  metadata.set("general.architecture", "llama");
  metadata.set("general.file_type", std::uint32_t{1});
  metadata.set("on", true);
  metadata.set("list", io::gguf_value(std::span<const std::int16_t>(std::vector<std::int16_t>{-1, 2})));
  const std::vector<std::string_view> words{"a", ""};
  metadata.set("words", io::gguf_value(std::span<const std::string_view>(words)));
  metadata.set("general.file_type", std::uint32_t{38});
  const std::vector<io::gguf_declaration> declared{
      {"w", io::ggml_type::F32, {1, 2}}, {"none", io::ggml_type::F32, {0}}, {"p", io::ggml_type::MXFP4, {2, 32}}};

  const std::string header =
      gguf_start(3, 5) + gguf_entry("general.architecture", 8, gguf_string("llama")) +
      gguf_entry("general.file_type", 4, gguf_number(std::uint32_t{38})) + gguf_entry("on", 7, "\x01") +
      gguf_entry("list", 9,
                 gguf_number(std::uint32_t{3}) + gguf_number(std::uint64_t{2}) + std::string("\xff\xff\x02\x00", 4)) +
      gguf_entry("words", 9,
                 gguf_number(std::uint32_t{8}) + gguf_number(std::uint64_t{2}) + gguf_string("a") + gguf_string("")) +
      gguf_tensor_info("w", {2, 1}, 0, 0) + gguf_tensor_info("none", {0}, 0, 32) +
      gguf_tensor_info("p", {32, 2}, 39, 32);
  std::string packed;
  for (int i = 0; i < 34; ++i) packed += static_cast<char>(i);
  const std::string expected = gguf_with(
      header, std::string("\0\0\x80\x3f\0\0\0\xc0", 8) + std::string(24, '\0') + packed + std::string(30, '\0'));

  const auto piece = [&](std::size_t begin, std::size_t count) {
    return std::span(reinterpret_cast<const std::uint8_t*>(packed.data()) + begin, count);
  };
  const std::vector<float> weights{1.0f, -2.0f};
  auto first = io::gguf_writer::create(folder / "first", metadata, declared);
  first.append_values<float>("w", weights);
  first.append("p", piece(0, 34));
  first.finish();
  const bytes stored = load(folder / "first");
  CHECK(std::string(stored.begin(), stored.end()) == expected);

  auto second = io::gguf_writer::create(folder / "second", metadata, declared);
  for (std::size_t i = 0; i < 34; ++i) second.append("p", piece(i, 1));
  auto moved = std::move(second);
  for (const float w : weights) moved.append_values<float>("w", std::span(&w, 1));
  CHECK_FALSE(fs::exists(folder / "second"));
  moved.finish();
  CHECK(load(folder / "second") == stored);
  CHECK(files_in(folder.path()) == 2);
  require_same(io::gguf_file::open(folder / "first"), read_gguf(stored));
}

TEST_CASE("random files round-trip, and pass through unchanged", "[random]") {
  const temporary_directory folder;
  std::mt19937_64 random(tetromino_test::seed());
  const auto below = [&](std::size_t n) -> std::size_t { return random() % n; };
  for (int round = 0; round < 50; ++round) {
    io::gguf_metadata metadata;
    if (below(2) == 0) metadata.set("general.alignment", std::uint32_t{1} << below(9));
    for (std::size_t m = below(4); m > 0; --m) metadata.set("key." + std::to_string(m), std::to_string(random()));
    metadata.set("number", static_cast<double>(random()));
    std::vector<io::gguf_declaration> declared;
    std::map<std::string, bytes> contents;
    for (std::size_t t = below(8); t > 0; --t) {
      const auto& fact = tetromino::detail::ggml_facts[below(tetromino::detail::ggml_facts.size())];
      io::gguf_declaration tensor{"tensor." + std::to_string(t), fact.type, {}};
      for (std::size_t d = below(4); d > 0; --d) tensor.shape.push_back(below(4));
      if (tensor.shape.empty() && fact.elements > 1) tensor.shape.push_back(1);
      if (!tensor.shape.empty()) tensor.shape.back() *= fact.elements;
      bytes& mine = contents[tensor.name];
      mine.resize(*tetromino::detail::ggml_tensor_bytes(tensor.type, tensor.shape));
      for (auto& b : mine) b = static_cast<std::uint8_t>(random());
      declared.push_back(tensor);
    }
    auto writer = io::gguf_writer::create(folder / "f", metadata, declared);
    for (const auto& tensor : declared) writer.append(tensor.name, contents[tensor.name]);
    writer.finish();
    const auto file = io::gguf_file::open(folder / "f");
    require_same(file, read_gguf(load(folder / "f")));
    for (const auto& tensor : declared) {
      INFO(tensor.name);
      CHECK(file[tensor.name].shape() == tensor.shape);
      const auto stored = file[tensor.name].bytes();
      CHECK(bytes(stored.begin(), stored.end()) == contents[tensor.name]);
    }

    auto copy = io::gguf_writer::create(folder / "copy", file.metadata(), declared, &file);
    for (const auto& tensor : file) copy.append(tensor.name(), tensor.bytes());
    copy.finish();
    CHECK(load(folder / "copy") == load(folder / "f"));
  }
}

TEST_CASE("declarations and metadata that make no valid file are refused before anything is written") {
  const temporary_directory folder;
  const auto refused = [&](const std::vector<io::gguf_declaration>& declared, const io::gguf_metadata& metadata = {}) {
    const auto writer = io::gguf_writer::try_create(folder / "out", metadata, declared);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().code() == errc::invalid_argument);
    CHECK(files_in(folder.path()) == 0);
    return std::string(writer.error().what());
  };
  const auto u8 = io::ggml_type::I8;
  CHECK_THAT(refused({{"a", u8, {1}}, {"a", u8, {1}}}), contains("out: tensor 'a': expected each name once"));
  CHECK_THAT(refused({{std::string(64, 'n'), u8, {1}}}), contains("expected a name of at most 63 bytes, got 64"));
  CHECK_THAT(refused({{"", u8, {1}}}), contains("expected a name, found an empty one"));
  CHECK_THAT(refused({{"a", u8, {1, 1, 1, 1, 1}}}), contains("expected at most 4 dimensions, found 5"));
  CHECK_THAT(refused({{"a", io::ggml_type::MXFP4, {33}}}), contains("tensor 'a': expected rows of whole blocks of 32"));
  CHECK_THAT(refused({{"a", u8, {~std::size_t{0}, 2}}}), contains("expected a size in bytes that fits"));
  CHECK_THAT(refused({{"a", u8, {std::size_t{1} << 61}}, {"b", u8, {std::size_t{1} << 61}}}),
             contains("tensor 'b': expected a file of less than 2^62 bytes"));
  io::gguf_metadata odd;
  odd.set("general.alignment", std::uint32_t{48});
  CHECK_THAT(refused({}, odd), contains("key 'general.alignment': expected a power of two, found 48"));
  io::gguf_metadata unnamed;
  unnamed.set("", true);
  CHECK_THAT(refused({}, unnamed), contains("metadata entry 0: expected a name"));
  io::gguf_metadata twice;
  twice.append("k", true);
  twice.append("k", false);
  CHECK_THAT(refused({}, twice), contains("key 'k': expected each key once"));
}

TEST_CASE("a file is not written over the one being read, and nothing appears without finish") {
  const temporary_directory folder;
  const std::vector<io::gguf_declaration> declared{{"a", io::ggml_type::I8, {100}}};
  {
    auto writer = io::gguf_writer::create(folder / "in", {}, declared);
    writer.append("a", bytes(100, 1));
    writer.finish();
  }
  const bytes before = load(folder / "in");
  const auto file = io::gguf_file::open(folder / "in");
  fs::create_hard_link(folder / "in", folder / "link");
  CHECK_THAT(io::gguf_writer::try_create(folder / "link", {}, declared, &file).error().what(),
             contains("link: expected another file than the one being read"));
  {
    auto writer = io::gguf_writer::create(folder / "link", {}, declared);
    writer.append("a", bytes(50, 2));
    CHECK_THAT(writer.try_finish().error().what(), contains("tensor 'a': expected 100 bytes before the file is "
                                                            "finished, got 50"));
    CHECK_THAT(writer.try_append("a", bytes(51, 2)).error().what(), contains("expected at most 50 more bytes"));
  }
  CHECK(load(folder / "link") == before);
  CHECK(files_in(folder.path()) == 2);
}
