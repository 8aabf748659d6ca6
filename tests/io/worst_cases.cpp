#include "check.hpp"

/// Inputs of up to half a megabyte that are made to cost time or memory, through every reader: each comes to an end
/// within a second and 128 MiB, whether it is taken or refused. Where the size is free, a slow test doubles it, with
/// twice the time and memory.

#include <tetromino/io/checkpoint.hpp>
#include <tetromino/io/gguf.hpp>
#include <tetromino/io/imatrix.hpp>
#include <tetromino/io/safetensors.hpp>
#include <tetromino/moe/placement_io.hpp>
#include <tetromino/moe/trace_io.hpp>

#include "support/memory_in_use.hpp"
#include "support/safetensors_files.hpp"

#include <ctime>
#include <functional>
#include <sstream>
#include <streambuf>

namespace {

namespace io = tetromino::io;
namespace moe = tetromino::moe;
using tetromino_test::file_with;
using tetromino_test::length_prefix;
using tetromino_test::measures_memory;
using tetromino_test::memory_in_use;
using tetromino_test::most_memory_in_use;
using tetromino_test::store;

constexpr std::size_t usual_bytes = 500'000;
std::size_t most_bytes = usual_bytes;

std::string repeated(const std::string& piece, std::size_t most = most_bytes) {
  std::string out;
  while (out.size() + piece.size() <= most) out += piece;
  return out;
}

/// piece(0), piece(1) … between commas, up to `most` bytes.
std::string listed(const std::function<std::string(std::size_t)>& piece, std::size_t most = most_bytes - 5000) {
  std::string out;
  for (std::size_t i = 0; out.size() < most; ++i) out += (i == 0 ? "" : ",") + piece(i);
  return out;
}

/// Lines of a routing log, each with other values.
std::string log_lines(const std::function<std::string(std::size_t)>& line) {
  std::string out;
  for (std::size_t i = 0; out.size() + 200 < most_bytes; ++i) out += line(i) + "\n";
  return out;
}
std::string record(const std::string& request, std::size_t token, std::size_t layer, const std::string& more = "") {
  return R"({"req_id":")" + request + R"(","token_idx":)" + std::to_string(token) + R"(,"layer":)" +
         std::to_string(layer) + R"(,"topk_ids":[)" + std::to_string(token % 65000) + "]" + more + "}";
}

std::string little(std::uint64_t value, std::size_t bytes) { return length_prefix(value).substr(0, bytes); }

/// An archive whose entries all are the same bytes.
std::string overlapping_zip(std::size_t data_bytes, const std::string& content) {
  std::string out = "PK\x03\x04" + std::string(22, '\0') + little(1, 2) + little(0, 2) + "a" + content;
  out.resize(31 + data_bytes);
  const std::size_t directory = out.size();
  std::size_t count = 0;
  while (out.size() + 47 + 22 < most_bytes && count < 0xFFFF) {
    out += "PK\x01\x02" + std::string(6, '\0') + little(0, 2) + std::string(8, '\0') + little(data_bytes, 4) +
           little(data_bytes, 4) + little(1, 2) + std::string(12, '\0') + little(0, 4) + "a";
    ++count;
  }
  return out + "PK\x05\x06" + std::string(4, '\0') + little(count, 2) + little(count, 2) +
         little(out.size() - directory, 4) + little(directory, 4) + little(0, 2);
}
std::string npy(const std::string& shape, std::size_t data_bytes) {
  std::string header = "{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + ", }\n";
  return "\x93NUMPY" + std::string("\x01\0", 2) + little(header.size(), 2) + header + std::string(data_bytes, '\1');
}

struct input {
  std::string name, content;
};

std::vector<input> json_inputs() {
  const auto key = [](std::size_t i) { return "\"" + std::to_string(i) + "\":0"; };
  std::vector<input> out{
      {"lists in lists", repeated("[")},
      {"objects in objects", repeated("{\"a\":")},
      {"lists and objects", repeated("[{\"a\":")},
      {"one string", "{\"a\":\"" + repeated("x") + "\"}"},
      {"one string of escapes", "{\"a\":\"" + repeated("\\u0000") + "\"}"},
      {"one number", "{\"a\":" + repeated("9") + "}"},
      {"one exponent", "{\"a\":1e" + repeated("9") + "}"},
      {"one key", "{\"" + repeated("k") + "\":1}"},
      {"blanks", repeated(" ")},
      {"lines", repeated("\n")},
      {"nothing but commas", "[" + repeated(",")},
      {"many keys", "{" + listed(key) + "}"},
      {"the same key", "{" + listed([](std::size_t) { return std::string("\"a\":0"); }) + "}"},
      {"many keys, then many lists", "{" + listed(key, most_bytes / 2) + ",\"l\":[" +
                                         listed([](std::size_t) { return std::string("[]"); }, most_bytes / 2) + "]}"},
      {"an object of many keys, then many objects",
       "[{" + listed(key, most_bytes / 2) + "}," +
           listed([](std::size_t) { return std::string("{}"); }, most_bytes / 2) + "]"},
      {"an object of many keys, then many lists",
       "[{" + listed(key, most_bytes / 2) + "}," +
           listed([](std::size_t) { return std::string("[]"); }, most_bytes / 2) + "]"},
      {"empty objects", "[" + listed([](std::size_t) { return std::string("{}"); }) + "]"},
      {"numbers", "[" + listed([](std::size_t) { return std::string("1"); }) + "]"},
      {"counts of one layer", R"({"logical_count":[[)" + listed([](std::size_t) { return std::string("1"); }) + "]]}"},
      {"counts of many layers",
       R"({"logical_count":[)" + listed([](std::size_t) { return std::string("[1]"); }) + "]}"},
      {"counts that grow", R"({"logical_count":[)" + listed([](std::size_t i) {
                             std::string row;
                             for (std::size_t e = 0; e <= i % 1400; ++e) row += e == 0 ? "1" : ",1";
                             return "[" + row + "]";
                           }) + "]}"},
      {"a plan of many layers",
       R"({"physical_to_logical_map":[)" + listed([](std::size_t) { return std::string("[0]"); }) + "]}"},
      {"a plan of empty layers",
       R"({"physical_to_logical_map":[)" + listed([](std::size_t) { return std::string("[]"); }) + "]}"},
      {"a plan of many devices", R"({"layer_list":[{"device_list":[)" + listed([](std::size_t) {
                                   return std::string(R"({"device_expert":[0]})");
                                 }) + "]}]}"},
      {"a placement that promises",
       R"({"layers":1,"experts":65535,"slots":18446744073709551615,"slot_to_expert":[[]]})"},
      {"a placement of no slots", R"({"layers":4000000000,"experts":1,"slots":0,"slot_to_expert":[]})"},
      {"an index", R"({"weight_map":{)" + listed([](std::size_t i) {
                     return "\"" + std::to_string(i) + "\":\"model-" + std::to_string(i) + ".safetensors\"";
                   }) + "}}"}};
  return out;
}

std::vector<input> line_inputs() {
  return {{"other requests", log_lines([](std::size_t i) { return record(std::to_string(i), 0, 0); })},
          {"other domains", log_lines([](std::size_t i) {
             return record(std::to_string(i), 0, 0, ",\"domain\":\"" + std::to_string(i) + "\"");
           })},
          {"one long domain", record("a", 0, 0, ",\"domain\":\"" + repeated("d") + "\"")},
          {"tokens backwards", log_lines([](std::size_t i) { return record("a", 100'000 - i, 0); })},
          {"other layers", log_lines([](std::size_t i) { return record("a", 0, i % 65'536); })},
          {"huge tokens", log_lines([](std::size_t i) { return record("a", 4'000'000'000 + i, i % 2); })},
          {"new passes", log_lines([](std::size_t) { return record("a", 0, 0); })},
          {"layers and tokens that do not meet", log_lines([](std::size_t i) { return record("a", i, i % 60'000); })},
          {"many ids", R"({"req_id":"a","token_idx":0,"layer":0,"topk_ids":[)" +
                           listed([](std::size_t i) { return std::to_string(i % 65'000); }) + "]}"},
          {"meta lines", repeated("{\"type\":\"meta\"}\n")},
          {"blank lines", repeated(" \n")},
          {"base64", R"({"routed_experts":")" + repeated("AAAA") + R"("})"},
          {"no end of line", R"({"req_id":"a")" + repeated(" ")}};
}

std::vector<input> other_text_inputs() {
  return {{"CSV", "layer,expert,count\n" + repeated("0,0,1\n", most_bytes - 100)},
          {"CSV that grows",
           [] {
             std::string out = "layer,expert,count\n";
             for (std::size_t i = 0; out.size() < most_bytes - 100; ++i)
               out += std::to_string(i % 64) + "," + std::to_string(i % 65'000) + ",1\n";
             return out;
           }()},
          {"CSV of the last cell", "layer,expert,count\n65534,65534,1\n"},
          {"CSV of many cells", "layer,expert,count\n" + repeated(",", most_bytes - 100)},
          {"CSV of a wide layer and many layers",
           [] {
             std::string out = "layer,expert,count\n0,63,1\n";
             for (std::size_t i = 0; out.size() < most_bytes - 100; ++i) out += std::to_string(i % 65'000) + ",0,1\n";
             return out;
           }()},
          {"YAML", "num_slots: 1\ninitial_global_assignments:\n" +
                       [] {
                         std::string out;
                         for (std::size_t i = 0; out.size() < most_bytes - 100; ++i)
                           out += "  " + std::to_string(i) + ": [0]\n";
                         return out;
                       }()},
          {"YAML of one layer", "initial_global_assignments:\n  0: [" + repeated("0,", most_bytes - 100) + "]\n"},
          {"YAML of brackets", "initial_global_assignments:\n  0: " + repeated("[", most_bytes - 100)},
          {"YAML of comments", "initial_global_assignments:\n" + repeated("#\n", most_bytes - 100)},
          {"text of a placement that promises", "placement 1000000 65535 1000000\n"},
          {"text of a placement of many numbers", "placement 1 65535 200000\n" + repeated("0 ", most_bytes - 100)}};
}

std::vector<input> safetensors_inputs() {
  const auto tensors = [](const std::function<std::string(std::size_t)>& one, std::size_t data) {
    std::string header = "{" + listed(one, most_bytes - data - 1000) + "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    return file_with(header, data);
  };
  const auto entry = tetromino_test::entry;
  return {
      {"many empty tensors", tensors([&](std::size_t i) { return entry(std::to_string(i), "U8", "[0]", "[0,0]"); }, 0)},
      {"many tensors of a byte", tensors(
                                     [&](std::size_t i) {
                                       return entry(std::to_string(i), "U8", "[1]",
                                                    "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]");
                                     },
                                     7'500)},
      {"tensors that overlap",
       tensors([&](std::size_t i) { return entry(std::to_string(i), "U8", "[100]", "[0,100]"); }, 100)},
      {"tensors of one name", tensors([&](std::size_t) { return entry("a", "U8", "[0]", "[0,0]"); }, 0)},
      {"a tensor of many dimensions",
       file_with(
           "{" + entry("a", "U8", "[" + listed([](std::size_t) { return std::string("1"); }) + "]", "[0,1]") + "}", 1)},
      {"a huge shape", file_with("{" + entry("experts", "U8", "[1099511627776,0,8]", "[0,0]") + "}", 0)},
      {"a trace of no layers", file_with("{" + entry("experts", "U8", "[4000000000,0,8]", "[0,0]") + "}", 0)},
      {"a long name", file_with("{" + entry(repeated("n", most_bytes - 1000), "U8", "[0]", "[0,0]") + "}", 0)},
      {"metadata", file_with("{\"__metadata__\":{" +
                                 listed([](std::size_t i) { return "\"" + std::to_string(i) + "\":\"\""; }) + "}}",
                             0)},
      {"metadata in metadata", file_with("{\"__metadata__\":" + repeated("{\"a\":"), 0)},
      {"a header that promises", length_prefix(std::uint64_t{1} << 62) + "{"},
      {"a header of lists", file_with(repeated("["), 0)},
      {"statistics of many layers", tensors(
                                        [&](std::size_t i) {
                                          return entry("0_" + std::to_string(i * 7919 % 65'000), "U8", "[1]",
                                                       "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]");
                                        },
                                        6'500)},
      {"experts called by many domains",
       file_with(R"({"__metadata__":{"domains":")" + repeated(",", most_bytes - 1000) + R"("},)" +
                     entry("experts", "U8", "[1,1,1]", "[0,1]") + "," + entry("domain", "U8", "[1]", "[1,2]") + "}",
                 2)}};
}

std::vector<input> binary_inputs() {
  const std::string gguf = std::string("GGUF") + little(3, 4);
  const auto text = [](const std::string& s) { return little(s.size(), 8) + s; };
  return {{"GGUF that promises tensors", gguf + little(std::uint64_t{1} << 60, 8) + little(0, 8)},
          {"GGUF that promises metadata", gguf + little(0, 8) + little(std::uint64_t{1} << 60, 8)},
          {"GGUF, a long list of bytes", gguf + little(0, 8) + little(1, 8) + text("a") + little(9, 4) + little(0, 4) +
                                             little(490'000, 8) + std::string(490'000, '\0')},
          {"GGUF, a list of empty texts", gguf + little(0, 8) + little(1, 8) + text("a") + little(9, 4) + little(8, 4) +
                                              little(62'000, 8) + std::string(8 * 62'000, '\0')},
          {"GGUF, lists in lists",
           [&] {
             std::string out = gguf + little(0, 8) + little(1, 8) + text("a") + little(9, 4);
             while (out.size() + 12 < most_bytes) out += little(9, 4) + little(1, 8);
             return out;
           }()},
          {"GGUF, many keys",
           [&] {
             std::string out;
             std::uint64_t n = 0;
             for (; out.size() + 40 < most_bytes; ++n) out += text(std::to_string(n)) + little(0, 4) + "x";
             return gguf + little(0, 8) + little(n, 8) + out;
           }()},
          {"GGUF, many empty tensors",
           [&] {
             std::string out;
             std::uint64_t n = 0;
             for (; out.size() + 60 < most_bytes; ++n)
               out += text(std::to_string(n)) + little(1, 4) + little(0, 8) + little(0, 4) + little(0, 8);
             return gguf + little(n, 8) + little(0, 8) + out;
           }()},
          {"imatrix of many entries",
           [&] {
             std::string out;
             std::uint64_t n = 0;
             for (; out.size() + 30 < most_bytes; ++n)
               out += little(6, 4) + std::to_string(100'000 + n) + little(1, 4) + little(1, 4) + std::string(4, '\0');
             return little(n, 4) + out;
           }()},
          {"imatrix that promises", little(0x7FFFFFFF, 4) + little(0x7FFFFFFF, 4)},
          {".npy of no layers", npy("(4000000000, 0, 8)", 0)},
          {".npy of ids", npy("(450000, 1, 1)", 450'000)},
          {".npy of counts", npy("(1, 450000)", 450'000)},
          {".npy of many dimensions", npy("(" + repeated("1,", 60'000) + ")", 1)},
          {"archive of the same ids", overlapping_zip(250'000, npy("(249000, 1, 1)", 249'000).substr(0, 250'000))},
          {"archive of no directory", "PK\x03\x04" + repeated("PK\x05\x06")},
          {"a pickle", "\x80\x02" + repeated("(")}};
}

/// What every reader makes of a file; all may refuse it.
const std::vector<std::pair<const char*, std::function<void(const std::filesystem::path&, const std::string&)>>>
    readers{
        {"safetensors",
         [](const auto& path, const std::string&) { static_cast<void>(io::safetensors_file::try_open(path)); }},
        {"gguf", [](const auto& path, const std::string&) { static_cast<void>(io::gguf_file::try_open(path)); }},
        {"imatrix", [](const auto& path, const std::string&) { static_cast<void>(io::imatrix::try_open(path)); }},
        {"checkpoint", [](const auto& path, const std::string&) { static_cast<void>(io::checkpoint::try_open(path)); }},
        {"routing", [](const auto& path, const std::string&) { static_cast<void>(moe::try_read_routing(path)); }},
        {"routing of bare ids",
         [](const auto& path, const std::string&) {
           static_cast<void>(moe::try_read_routing(path, {.experts = 8, .layers = 1, .experts_per_token = 1}));
         }},
        {"lines",
         [](const auto&, const std::string& content) {
           std::istringstream in(content);
           static_cast<void>(moe::try_read_trace_json_lines(in, "lines"));
         }},
        {"plan", [](const auto&, const std::string& content) { static_cast<void>(moe::try_read_plan(content)); }},
        {"placement as text",
         [](const auto&, const std::string& content) { static_cast<void>(moe::try_placement_from_text(content)); }},
        {"placement as JSON",
         [](const auto&, const std::string& content) { static_cast<void>(moe::try_placement_from_json(content)); }},
    };

void check_all(const std::vector<input>& inputs) {
  const tetromino_test::temporary_directory folder;
  const std::size_t times = most_bytes / usual_bytes, most_memory = times * (std::size_t{128} << 20);
  const auto most_time = static_cast<std::clock_t>(times) * CLOCKS_PER_SEC;
  for (const auto& [name, content] : inputs) {
    REQUIRE(content.size() <= most_bytes + 100);
    const auto path = store(folder / "input", content), model = folder / "model";
    for (const auto& [reader, read] : readers) {
      INFO(name << ", read as " << reader);
      const std::size_t before = most_memory_in_use = memory_in_use.load();
      const std::clock_t start = std::clock();  // of this program alone
      read(path, content);
      CHECK(std::clock() - start < most_time);
      if (measures_memory) CHECK(most_memory_in_use - before < most_memory);
    }
    for (const char* part : {"config.json", "model.safetensors.index.json"}) {  // a model's texts
      INFO(name << ", as " << part);
      std::filesystem::create_directory(model);
      store(model / "model.safetensors", file_with("{}      ", 0));
      store(model / part, content);
      const std::size_t before = most_memory_in_use = memory_in_use.load();
      const std::clock_t start = std::clock();  // of this program alone
      static_cast<void>(io::checkpoint::try_open(model));
      CHECK(std::clock() - start < most_time);
      if (measures_memory) CHECK(most_memory_in_use - before < most_memory);
      std::filesystem::remove_all(model);
    }
  }
}

TEST_CASE("worst cases: JSON") { check_all(json_inputs()); }
TEST_CASE("worst cases: logs of lines") { check_all(line_inputs()); }
TEST_CASE("worst cases: CSV, YAML and text") { check_all(other_text_inputs()); }
TEST_CASE("worst cases: safetensors") { check_all(safetensors_inputs()); }
TEST_CASE("worst cases: GGUF, importance matrices and NumPy") { check_all(binary_inputs()); }

TEST_CASE("worst cases: all at twice the size", "[.slow]") {
  most_bytes = 2 * usual_bytes;
  for (const auto& inputs : {json_inputs, line_inputs, other_text_inputs, safetensors_inputs, binary_inputs}) {
    check_all(inputs());
  }
  most_bytes = usual_bytes;
}

/// Bytes that never end, and never a new line.
struct endless : std::streambuf {
  explicit endless(char what) : piece_(std::size_t{1} << 16, what) {}
  int_type underflow() override {
    setg(piece_.data(), piece_.data(), piece_.data() + piece_.size());
    return traits_type::to_int_type(piece_.front());
  }

 private:
  std::string piece_;
};

TEST_CASE("worst cases: lines without end are refused at 64 MiB, and memory for them is bounded") {
  for (const char what : {'x', '[', ' ', '\0'}) {
    endless source(what);
    std::istream in(&source);
    const std::size_t before = most_memory_in_use = memory_in_use.load();
    const auto read = moe::try_read_trace_json_lines(in, "log");
    REQUIRE_FALSE(read);
    CHECK_THAT(std::string(read.error().what()), tetromino_test::contains("lines of less than 67108864 bytes"));
    if (measures_memory) CHECK(most_memory_in_use - before < std::size_t{256} << 20);
  }
}

TEST_CASE("worst cases: 100 MB in one line of a file take bounded memory", "[.slow]") {
  const tetromino_test::temporary_directory folder;
  const std::string start = R"({"req_id":"a","token_idx":0,"layer":0,"topk_ids":)";
  for (const auto& [name, content] : std::vector<input>{
           {"numbers", start + "[" + listed([](std::size_t) { return std::string("1"); }, 100'000'000) + "]}"},
           {"lists", start + repeated("[", 100'000'000)},
           {"one string", start + "\"" + repeated("x", 100'000'000) + "\"}"}}) {
    INFO(name);
    const auto path = store(folder / "log", content);
    const std::size_t before = most_memory_in_use = memory_in_use.load();
    CHECK_FALSE(moe::try_read_routing(path));
    CHECK_FALSE(moe::try_read_plan(content));
    if (measures_memory) CHECK(most_memory_in_use - before < 5 * content.size());
  }
}

}  // namespace
