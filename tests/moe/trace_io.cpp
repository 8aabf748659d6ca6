#include "check.hpp"

#include <tetromino/moe/trace_io.hpp>

#include "reference/generators.hpp"

#include <algorithm>  // std::swap
#include <fstream>    // std::ofstream
#include <sstream>    // std::istringstream
#include <stdexcept>  // std::runtime_error
#include <streambuf>  // std::streambuf
#include <string>     // std::string
#include <utility>    // std::pair
#include <variant>    // std::get, std::holds_alternative
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;
using tetromino_test::contains;
using tetromino_test::data_file;
using tetromino_test::temporary_directory;

tetromino::result<trace> from_lines(const std::string& lines, trace_read_options options = {}) {
  std::istringstream in(lines);
  return try_read_trace_json_lines(in, "log", options);
}
std::string problem_of(const tetromino::result<trace>& r) {
  REQUIRE_FALSE(r.has_value());
  return r.error().what();
}

std::string line(const std::string& request, std::size_t token, std::size_t layer, const std::string& ids,
                 const std::string& more = "") {
  return R"({"req_id":")" + request + R"(","token_idx":)" + std::to_string(token) + R"(,"layer":)" +
         std::to_string(layer) + R"(,"topk_ids":[)" + ids + "]" + more + "}\n";
}

struct tensor {
  tetromino::io::tensor_declaration declared;
  std::vector<std::uint8_t> bytes;
};
template <class T>
tensor make_tensor(const std::string& name, std::vector<std::size_t> shape, const std::vector<T>& values) {
  const auto* first = reinterpret_cast<const std::uint8_t*>(values.data());
  return {{name, tetromino::io::dtype_of<T>::value, std::move(shape)}, {first, first + sizeof(T) * values.size()}};
}
tetromino::result<trace> from_tensors(const std::vector<tensor>& tensors,
                                      const tetromino::io::safetensors_metadata& metadata = {}) {
  const temporary_directory folder;
  std::vector<tetromino::io::tensor_declaration> declared;
  for (const tensor& t : tensors) declared.push_back(t.declared);
  auto writer = tetromino::io::safetensors_writer::create(folder / "t.safetensors",
                                                          tetromino::io::aligned_order(declared), metadata);
  for (const tensor& t : tensors) writer.append(t.declared.name, t.bytes);
  writer.finish();
  return try_read_trace(folder / "t.safetensors");
}
using u8 = std::vector<std::uint8_t>;
using i64 = std::vector<std::int64_t>;
using i32 = std::vector<std::int32_t>;
using numbers_of = std::vector<std::uint32_t>;  // layers

}  // namespace

TEST_CASE("the bundled traces are what their page says") {
  const trace large = read_trace(data_file("routing-128x8.safetensors"));
  CHECK(large.shape() == routing_shape{8, 128, 8});
  CHECK(large.tokens() == 87'408);
  CHECK(large.requests().size() == 480);
  REQUIRE(large.domain_names().size() == 4);
  CHECK(large.domain_names()[0] == "code");
  CHECK(large.view().tokens() == 87'408);
  CHECK(large.view().tokens(phase::decode) + large.view().tokens(phase::prefill) == 87'408);

  CHECK(read_trace(data_file("routing-128x8.small.safetensors")).requests().size() == 160);
  const trace small = read_trace(data_file("routing-16x2.safetensors"));
  CHECK(small.shape() == routing_shape{4, 16, 2});
  CHECK(small.requests().size() == 240);
}

TEST_CASE("safetensors traces may use wider ids and leave out what is optional") {
  const auto offsets = make_tensor("request_offsets", {3}, i64{0, 1, 2});
  for (const auto& ids :
       {make_tensor("experts", {2, 1, 2}, u8{0, 1, 3, 2}), make_tensor("experts", {2, 1, 2}, i64{0, 1, 3, 2}),
        make_tensor("experts", {2, 1, 2}, std::vector<std::uint16_t>{0, 1, 3, 2}),
        make_tensor("experts", {2, 1, 2}, i32{0, 1, 3, 2})}) {
    const auto t = from_tensors({ids, offsets});
    REQUIRE(t.has_value());
    CHECK(t->shape() == routing_shape{1, 4, 2});
    CHECK(t->view().token(1)[0] == 3);
    CHECK(t->requests()[1] == request{1, 1, 0, 0});
    CHECK(t->domain_names().empty());
  }
  const auto named = from_tensors({make_tensor("experts", {2, 1, 2}, u8{0, 1, 3, 2}), offsets,
                                   make_tensor("domain", {2}, u8{1, 0}), make_tensor("prefill_length", {2}, i32{1, 0})},
                                  {{"num_experts", "9"}, {"domains", "a,b"}});
  REQUIRE(named.has_value());
  CHECK(named->shape().experts == 9);
  CHECK(named->requests()[0] == request{0, 1, 1, 1});
  CHECK(named->domain_names()[1] == "b");
}

TEST_CASE("broken safetensors traces are errors") {
  const auto ids = make_tensor("experts", {2, 1, 2}, u8{0, 1, 3, 2});
  const auto offsets = make_tensor("request_offsets", {3}, i64{0, 1, 2});
  CHECK_THAT(problem_of(from_tensors({offsets})), contains("experts"));
  CHECK(from_tensors({ids})->requests()[0] == request{0, 2, 0, 0});  // one request of all tokens
  CHECK_THAT(problem_of(from_tensors({make_tensor("experts", {4, 1}, u8{0, 1, 3, 2}), offsets})), contains("2 dimen"));
  CHECK_THAT(problem_of(from_tensors({make_tensor("experts", {2, 1, 2}, std::vector<float>{0, 1, 3, 2}), offsets})),
             contains("floating-point"));
  CHECK_THAT(problem_of(from_tensors({make_tensor("experts", {2, 1, 2}, i32{0, 1, -3, 2}), offsets})),
             contains("got -3"));
  CHECK_THAT(problem_of(from_tensors({make_tensor("experts", {2, 1, 2}, i32{0, 1, 70'000, 2}), offsets})),
             contains("got 70000"));
  CHECK_THAT(problem_of(from_tensors({ids, offsets}, {{"num_experts", "3"}})), contains("below 3, got 3 in token 1"));
  for (const i64& bad : {i64{0, 1, 1}, i64{1, 1, 2}, i64{0, 3, 2}, i64{0, -1, 2}, i64{0, std::int64_t{1} << 62, 2}}) {
    CHECK_FALSE(from_tensors({ids, make_tensor("request_offsets", {3}, bad)}).has_value());
  }
  CHECK_FALSE(from_tensors({ids, make_tensor("request_offsets", {0}, i64{})}).has_value());
  CHECK_FALSE(from_tensors({ids, make_tensor("request_offsets", {3}, std::vector<float>{0, 1, 2})}).has_value());
  for (const i32& bad : {i32{2, 0}, i32{-1, 0}}) {
    CHECK_FALSE(from_tensors({ids, offsets, make_tensor("prefill_length", {2}, bad)}).has_value());
    CHECK_FALSE(from_tensors({ids, offsets, make_tensor("domain", {2}, bad)}, {{"domains", "a,b"}}).has_value());
  }
  CHECK_FALSE(from_tensors({ids, offsets, make_tensor("prefill_length", {1}, i32{0})}).has_value());
  CHECK_FALSE(from_tensors({make_tensor("experts", {2, 1, 2}, u8{0, 0, 3, 2}), offsets}).has_value());
  CHECK_FALSE(from_tensors({make_tensor("experts", {2, 0, 2}, u8{}), offsets}).has_value());
  CHECK_FALSE(try_read_trace("/nowhere/x.safetensors").has_value());
  CHECK_FALSE(try_read_trace("/nowhere/x.jsonl").has_value());
}

TEST_CASE("an empty safetensors trace has no requests") {
  const auto t = from_tensors({make_tensor("experts", {0, 2, 1}, u8{}), make_tensor("request_offsets", {1}, i64{0})},
                              {{"num_experts", "4"}});
  REQUIRE(t.has_value());
  CHECK(t->tokens() == 0);
  CHECK(t->requests().empty());
}

TEST_CASE("JSON lines in any order, with unknown keys, empty lines and layers that start anywhere") {
  const auto t =
      from_lines(line("b", 7, 5, "1, 0", R"(,"phase":"prefill","weights":[0.7,0.3])") + "\n  \r\n" +
                 line("a", 0, 3, "3,2", R"(,"domain":"math")") + line("b", 8, 3, "0,2") + line("a", 0, 5, "1,3") +
                 line("b", 7, 3, "0,1", R"(,"phase":"prefill")") + line("b", 8, 5, "2,3"));
  REQUIRE(t.has_value());
  CHECK(t->shape() == routing_shape{2, 4, 2});
  REQUIRE(t->requests().size() == 2);
  CHECK(t->requests()[0] == request{0, 2, 1, 0});
  CHECK(t->requests()[1] == request{2, 1, 0, 1});
  CHECK(t->domain_names()[0] == "unnamed");
  CHECK(t->domain_names()[1] == "math");
  const auto ids = t->view().ids;
  CHECK(std::vector<std::uint16_t>(ids.begin(), ids.end()) ==
        std::vector<std::uint16_t>{0, 1, 1, 0, 0, 2, 2, 3, 3, 2, 1, 3});
  CHECK(from_lines(line("a", 0, 0, "1"), {.experts = 6})->shape().experts == 6);
  // a number as name, and the length of the prefill instead of the phase
  const auto n = from_lines(R"({"req_id":12,"token_idx":0,"layer":0,"topk_ids":[1],"prefill_length":1})"
                            "\n"
                            R"({"req_id":12,"token_idx":1,"layer":0,"topk_ids":[0],"prefill_length":1})");
  REQUIRE(n.has_value());
  CHECK(n->requests()[0] == request{0, 2, 1, 0});
}

TEST_CASE("a trace survives being written as shuffled JSON lines") {
  const trace original = read_trace(data_file("routing-16x2.safetensors"));
  generator g(tetromino_test::seed());
  std::vector<std::string> lines;
  std::size_t tokens = 0;
  for (std::size_t r = 0; r < 20; ++r) {
    const request& q = original.requests()[r];
    for (std::uint64_t t = 0; t < q.tokens; ++t, ++tokens) {
      for (std::size_t l = 0; l < 4; ++l) {
        const auto ids = original.view().experts_of(q.first_token + t, l);
        lines.push_back(line(std::to_string(r), t, l + 3, std::to_string(ids[0]) + "," + std::to_string(ids[1]),
                             t < q.prefill_length ? R"(,"phase":"prefill")" : R"(,"phase":"decode")"));
      }
    }
  }
  // the first line of each request stays in front, as that is what orders requests
  for (std::size_t i = lines.size() - 1; i > 0; --i) {
    const std::size_t j = 1 + g.below(i);
    if (lines[i].find(R"("token_idx":0,)") == std::string::npos &&
        lines[j].find(R"("token_idx":0,)") == std::string::npos)
      std::swap(lines[i], lines[j]);
  }
  std::string all;
  for (const std::string& l : lines) all += l;
  const auto read = from_lines(all, {.experts = 16});
  REQUIRE(read.has_value());
  CHECK(read->tokens() == tokens);
  std::size_t same = 0;
  for (std::size_t r = 0; r < 20; ++r) {
    const request& a = original.requests()[r];
    for (const request& b : read->requests()) {
      if (a.tokens != b.tokens || a.prefill_length != b.prefill_length) continue;
      const auto x = original.view().ids.subspan(a.first_token * 8, a.tokens * 8);
      const auto y = read->view().ids.subspan(b.first_token * 8, b.tokens * 8);
      if (std::equal(x.begin(), x.end(), y.begin(), y.end())) {
        ++same;
        break;
      }
    }
  }
  CHECK(same == 20);
}

TEST_CASE("broken JSON lines are errors that name the line") {
  const std::string good = line("a", 0, 0, "1,2");
  CHECK_THAT(problem_of(from_lines("")), contains("at least one line"));
  CHECK_THAT(problem_of(from_lines(good + "{\"req_id\":")), contains("log, line 2: expected JSON"));
  CHECK_THAT(problem_of(from_lines("[1]")), contains("line 1: expected a JSON object, got array"));
  CHECK_THAT(problem_of(from_lines(R"({"token_idx":0,"layer":0,"topk_ids":[1]})")), contains("req_id"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":{},"token_idx":0,"layer":0,"topk_ids":[1]})")), contains("object"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","layer":0,"topk_ids":[1]})")), contains("token_idx"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":-1,"layer":0,"topk_ids":[1]})")), contains("whole"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":0.5,"layer":0,"topk_ids":[1]})")), contains("whole"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":0,"layer":70000,"topk_ids":[1]})")), contains("layer"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":0,"layer":0})")), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, ""))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "-2"))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "65535"))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "null"))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 1, 0, "1,2") + line("a", 1, 0, "1,2"))),
             contains("line 3: expected token 1"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 1, 0, "1"))), contains("line 2: expected 2 experts per token"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 2, 0, "1,2"))), contains("line 2: expected token_idx 1"));
  CHECK_THAT(problem_of(from_lines(good + line("b", 0, 1, "1,2"))), contains("line 1"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 0, 1, "1,2") + line("b", 0, 1, "1,2"))), contains("line 3"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 0, 1, "1,2") + line("a", 0, 1, "0,2"))), contains("line 3"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 1, 0, "3,3"))), contains("line 2: expected distinct experts"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 1, 0, "3,9"), {.experts = 9})),
             contains("line 2: expected expert"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "1", R"(,"phase":"train")"))), contains("phase"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "1", R"(,"prefill_length":-3)"))), contains("prefill_length"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "1", R"(,"domain":3)"))), contains("domain"));
  CHECK_THAT(
      problem_of(from_lines(line("a", 0, 0, "1", R"(,"domain":"x")") + line("a", 1, 0, "1", R"(,"domain":"y")"))),
      contains("line 2: expected domain \"x\""));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "1") + line("a", 1, 0, "1", R"(,"phase":"prefill")"))),
             contains("line 2: expected no prefill after decode"));
  // numbers far apart take no memory
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "1") + line("a", 4294967294, 65535, "1"))), contains("line 1"));
  CHECK_THAT(problem_of(from_lines(line("a", 4294967295, 0, "1"))), contains("token_idx"));
  CHECK(from_lines(line("a", 4294967294, 65535, "1")).has_value());
}

TEST_CASE("a stream that breaks is no end of the log") {
  struct broken : std::streambuf {
    std::string first = line("a", 0, 0, "1");
    broken() { setg(first.data(), first.data(), first.data() + first.size()); }
    int_type underflow() override { throw std::runtime_error("the device is gone"); }
  } buffer;
  std::istream in(&buffer);
  const auto read = try_read_trace_json_lines(in, "log");
  CHECK_THAT(problem_of(read), contains("log: expected to read on"));
  CHECK(read.error().code() == errc::io);
}

TEST_CASE("nobody, meta lines, passes that count anew, and names of two types") {
  const auto padded = from_lines(R"({"type":"meta","num_experts":7})"
                                 "\n" +
                                 line("a", 0, 2, "4,-1") + line("a", 0, 1, "-1,-1") + line("a", 1, 2, "-1,-1") +
                                 line("a", 1, 1, "-1,-1"));
  REQUIRE(padded.has_value());
  CHECK(padded->shape() == routing_shape{1, 7, 2});  // layer 1 has nobody at all
  CHECK(padded->view().experts_of(0, 0)[0] == 4);
  CHECK(padded->view().experts_of(0, 0)[1] == no_expert);
  CHECK(padded->view().experts_of(1, 0)[0] == no_expert);

  // a prompt of two tokens, then two passes of one, as a hook in each layer sees them
  const auto hooked =
      from_lines(line("a", 0, 0, "1") + line("a", 1, 0, "2") + line("a", 0, 1, "3") + line("a", 1, 1, "4") +
                 line("a", 0, 0, "5") + line("a", 0, 1, "6") + line("a", 0, 0, "0") + line("a", 0, 1, "1"));
  REQUIRE(hooked.has_value());
  const auto ids = hooked->view().ids;
  CHECK(std::vector<std::uint16_t>(ids.begin(), ids.end()) == std::vector<std::uint16_t>{1, 3, 2, 4, 5, 6, 0, 1});

  const auto two = from_lines(R"({"req_id":1,"token_idx":0,"layer":0,"topk_ids":[1]})"
                              "\n"
                              R"({"req_id":"1","token_idx":0,"layer":0,"topk_ids":[2]})");
  REQUIRE(two.has_value());
  CHECK(two->requests().size() == 2);
  CHECK_THAT(problem_of(from_lines(R"({"req_id":1,"req_id":2,"token_idx":0,"layer":0,"topk_ids":[1]})")),
             contains("each key once"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "1") + R"({"type":"routing"})")), contains("line 2"));
  CHECK(from_lines(line("a", 0, 0, "1") + R"({"type":"meta"})").has_value());
  CHECK_THAT(problem_of(from_lines(std::string(3'000'000, '['))), contains("levels"));
}

namespace {

std::string base64(const std::vector<std::uint8_t>& bytes) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t block = 0;
    for (std::size_t j = 0; j < 3; ++j) block = block << 8 | (i + j < bytes.size() ? bytes[i + j] : 0);
    for (std::size_t j = 0; j < 4; ++j) out += i + j > bytes.size() ? '=' : digits[block >> (18 - 6 * j) & 63];
  }
  return out;
}
template <class T>
std::vector<std::uint8_t> bytes_of(const std::vector<T>& values) {
  const auto* first = reinterpret_cast<const std::uint8_t*>(values.data());
  return {first, first + sizeof(T) * values.size()};
}
/// An .npy as NumPy 1.x writes it.
std::vector<std::uint8_t> npy(const std::string& type, const std::string& shape, std::vector<std::uint8_t> data,
                              const std::string& fortran = "False") {
  std::string header = "{'descr': '" + type + "', 'fortran_order': " + fortran + ", 'shape': (" + shape + "), }";
  header.resize((header.size() + 10 + 64) / 64 * 64 - 11, ' ');
  header += '\n';
  std::vector<std::uint8_t> out{0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0};
  out.push_back(static_cast<std::uint8_t>(header.size()));
  out.push_back(static_cast<std::uint8_t>(header.size() >> 8));
  out.insert(out.end(), header.begin(), header.end());
  out.insert(out.end(), data.begin(), data.end());
  return out;
}
/// A zip archive; method 0 is storing.
std::vector<std::uint8_t> zip(const std::vector<std::pair<std::string, std::vector<std::uint8_t>>>& files,
                              std::uint8_t method = 0) {
  std::vector<std::uint8_t> out, directory;
  const auto put = [](std::vector<std::uint8_t>& to, std::size_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) to.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
  };
  for (const auto& [name, data] : files) {
    const std::size_t at = out.size();
    for (auto* to : {&out, &directory}) {
      put(*to, to == &out ? 0x04034B50 : 0x02014B50, 4);
      put(*to, 20, to == &out ? 2 : 4);
      put(*to, 0, 2);
      put(*to, method, 2);
      put(*to, 0, 8);
      put(*to, data.size(), 4);
      put(*to, data.size(), 4);
      put(*to, name.size(), 2);
      put(*to, 0, 2);
      if (to == &directory) put(*to, 0, 8), put(*to, 0, 2), put(*to, at, 4);
      to->insert(to->end(), name.begin(), name.end());
    }
    out.insert(out.end(), data.begin(), data.end());
  }
  const std::size_t begin = out.size();
  out.insert(out.end(), directory.begin(), directory.end());
  put(out, 0x06054B50, 4);
  put(out, 0, 4);
  put(out, files.size(), 2);
  put(out, files.size(), 2);
  put(out, directory.size(), 4);
  put(out, begin, 4);
  put(out, 0, 2);
  return out;
}
template <class Bytes>
tetromino::result<routing_file> from_file(const Bytes& bytes, const trace_read_options& options = {}) {
  const temporary_directory folder;
  std::ofstream(folder / "file", std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  return try_read_routing(folder / "file", options);
}
template <class Content, class Bytes>
Content read_as(const Bytes& bytes, const trace_read_options& options = {}) {
  auto read = from_file(bytes, options);
  if (!read) FAIL(read.error().what());
  REQUIRE(std::holds_alternative<Content>(read->content));
  return std::get<Content>(read->content);
}
template <class Bytes>
std::string problem_in(const Bytes& bytes, const trace_read_options& options = {}) {
  const auto read = from_file(bytes, options);
  REQUIRE_FALSE(read.has_value());
  return read.error().what();
}
using numbers = std::vector<double>;

}  // namespace

TEST_CASE("completions and responses with routed experts") {
  // 3 tokens, 2 layers, 2 experts each; the first two tokens are the prompt
  const std::vector<std::int32_t> ids{0, 1, 2, 3, 4, 5, -1, -1, 1, 0, 3, 2};
  const std::string vllm = R"({"choices":[{"routed_experts":")" + base64(npy("<i4", "3, 2, 2", bytes_of(ids))) +
                           R"("}],"usage":{"prompt_tokens":2}})";
  const std::string sglang = R"({"meta_info":{"prompt_tokens":2,"routed_experts":")" + base64(bytes_of(ids)) + R"("}})";
  for (const trace& t : {read_as<trace>(vllm + "\n" + vllm), read_as<trace>(sglang + "\n" + sglang, {0, 2, 2})}) {
    CHECK(t.shape() == routing_shape{2, 6, 2});
    REQUIRE(t.requests().size() == 2);
    CHECK(t.requests()[1] == request{3, 3, 2, 0});
    CHECK(t.view().experts_of(4, 0)[1] == 5);
    CHECK(t.view().experts_of(4, 1)[1] == no_expert);
  }
  CHECK_THAT(problem_in(sglang), contains("how many layers"));
  CHECK_THAT(problem_in(sglang, {0, 5, 2}), contains("5 × 2 ids, got 12"));
  CHECK_THAT(problem_in(vllm + "\n" + sglang, {0, 2, 2}), contains("line 2: expected vLLM"));
  CHECK_THAT(problem_in(std::string(R"({"choices":[{"routed_experts":"?"}]})")), contains("base64"));
  CHECK_THAT(problem_in(std::string(R"({"choices":[{"routed_experts":"AAAA"}]})")), contains(".npy"));
  CHECK_THAT(problem_in(std::string(R"({"choices":[7]})")), contains("objects"));
}

TEST_CASE("NumPy arrays: requests and counts") {
  const std::vector<std::uint16_t> ids{0, 1, 2, 3, 0xFFFF, 0xFFFF, 1, 2};
  const auto one = npy("<u2", "2, 2, 2", bytes_of(ids));
  CHECK(read_as<trace>(one).shape() == routing_shape{2, 4, 2});
  const trace both = read_as<trace>(zip({{"a.npy", one}, {"b.npy", one}}));
  CHECK(both.requests().size() == 2);
  CHECK(both.view().experts_of(3, 0)[0] == no_expert);
  const auto counts = npy("<i8", "2, 3", bytes_of(std::vector<std::int64_t>{1, 2, 3, 4, 5, 6}));
  CHECK(read_as<load_table>(counts) == load_table{2, 3, numbers{1, 2, 3, 4, 5, 6}});
  CHECK(read_as<load_table>(counts, {4}).experts == 4);
  const auto steps = npy("<f4", "2, 1, 2", bytes_of(std::vector<float>{1, 2, 10, 20}));
  CHECK(read_as<load_table>(steps) == load_table{1, 2, numbers{11, 22}});

  CHECK_THAT(problem_in(npy("<u2", "2, 2, 2", bytes_of(ids), "True")), contains("ascontiguousarray"));
  CHECK_THAT(problem_in(npy(">u2", "2, 2, 2", bytes_of(ids))), contains("little-endian"));
  CHECK_THAT(problem_in(npy("<u2", "2, 2, 3", bytes_of(ids))), contains("expected the bytes of [2, 2, 3]"));
  CHECK_THAT(problem_in(npy("<u2", "4294967296, 4294967296, 4294967296", bytes_of(ids))),
             contains("expected the bytes"));
  CHECK_THAT(problem_in(zip({{"a.npy", one}}, 8)), contains("compress"));
  CHECK_THAT(problem_in(zip({{"x/data.pkl", u8{}}})), contains("torch.load"));
  CHECK_THAT(problem_in(std::string("\x80\x02}q")), contains("pickle"));
  // both names for the same bytes: a small archive must not become a large trace
  const auto large = npy("<u2", "200, 2, 2", bytes_of(std::vector<std::uint16_t>(800, 1)));
  const auto entry = std::ptrdiff_t{46 + 5}, end = std::ptrdiff_t{22};
  const std::size_t file_bytes = 30 + 5 + large.size();
  auto twice = zip({{"a.npy", large}, {"b.npy", large}});
  std::fill_n(twice.end() - end - entry + 42, 4, std::uint8_t{0});  // where b.npy begins
  twice.erase(twice.end() - end - 2 * entry - static_cast<std::ptrdiff_t>(file_bytes), twice.end() - end - 2 * entry);
  twice[twice.size() - 6] = static_cast<std::uint8_t>(file_bytes);  // where the directory begins
  twice[twice.size() - 5] = static_cast<std::uint8_t>(file_bytes >> 8);
  CHECK_THAT(problem_in(twice), contains("that do not overlap"));
  auto cut = zip({{"a.npy", one}});
  cut.erase(cut.begin() + static_cast<std::ptrdiff_t>(cut.size() / 2), cut.end());
  CHECK_FALSE(from_file(cut).has_value());
  generator g(tetromino_test::seed());
  const auto whole = zip({{"a.npy", one}, {"b.npy", one}});
  for (int i = 0; i < 1000; ++i) {  // no byte of an archive leads out of it
    auto changed = whole;
    changed[g.below(changed.size())] = static_cast<std::uint8_t>(g.below(256));
    changed.erase(changed.end() - static_cast<std::ptrdiff_t>(g.below(2) * g.below(40)), changed.end());
    static_cast<void>(from_file(changed));
  }
}

TEST_CASE("counts from JSON, CSV and statistics, and plans") {
  CHECK(read_as<load_table>(std::string(R"({"rank":0,"logical_count":[[1,2],[3,4]]})")) ==
        load_table{2, 2, numbers{1, 2, 3, 4}});
  CHECK(read_as<load_table>(std::string("{\"logical_count\":\n[[[1,2]],[[3,4]]]}")) == load_table{1, 2, numbers{4, 6}});
  const std::string pass = R"({"forward_pass_id":1,"logical_count":[[1,0,5]]})";
  CHECK(read_as<load_table>(pass + "\n" + pass) == load_table{1, 3, numbers{2, 0, 10}});
  CHECK(read_as<load_table>(std::string("count,layer,expert\r\n5,0,1\n7,1,0\n1,0,1\n")) ==
        load_table{2, 2, numbers{0, 6, 7, 0}});
  CHECK(read_as<load_table>(std::string("\n\nlayer,expert,count\n0,1,3\n")) == load_table{1, 2, numbers{0, 3}});
  CHECK_THAT(problem_in(std::string("\nexpert,counts\n")), contains("line 2: expected 3 cells"));
  CHECK_THAT(problem_in(std::string("\nexpert,count,x\n")), contains("line 2: expected a column layer"));
  CHECK_THAT(problem_in(std::string("layer,expert,count\n0,1\n")), contains("line 2: expected 3 cells"));
  CHECK_THAT(problem_in(std::string("layer,expert,count\n0,-1,3\n")), contains("line 2: expected expert"));
  CHECK_THAT(problem_in(std::string("layer,expert,count\n65000,65000,3\n")), contains("at most"));
  CHECK_THAT(problem_in(std::string(R"({"logical_count":[[1,"x"]]})")), contains("layer 0, expert 1"));
  CHECK_THAT(problem_in(std::string(R"({"logical_count":[[1,-2]]})")), contains("0 or more"));
  CHECK_THAT(problem_in(std::string(R"({"logical_count":[[1,2,3],[1]]})")), contains("3 counts in layer 1"));

  const temporary_directory folder;
  const auto save = [&](const std::vector<tensor>& tensors) {
    std::vector<tetromino::io::tensor_declaration> declared;
    for (const tensor& t : tensors) declared.push_back(t.declared);
    auto writer = tetromino::io::safetensors_writer::create(folder / "s", tetromino::io::aligned_order(declared));
    for (const tensor& t : tensors) writer.append(t.declared.name, t.bytes);
    writer.finish();
    return try_read_routing(folder / "s");
  };
  const auto statistics = save({make_tensor("7_3", {3}, i32{1, 2, 3}), make_tensor("8_3", {3}, i32{10, 20, 30}),
                                make_tensor("7_5", {2, 2}, i32{0, 2, 2, -1})});
  REQUIRE(statistics.has_value());
  CHECK(std::get<load_table>(statistics->content) == load_table{2, 3, numbers{11, 22, 33, 1, 0, 2}});
  CHECK(statistics->layers == numbers_of{3, 5});
  CHECK_THAT(save({make_tensor("weights", {1}, i32{1})}).error().what(), contains("iteration_layer"));

  CHECK(read_as<placement>(std::string(R"({"physical_to_logical_map":[[0,1,1],[1,0,-1]]})")) ==
        placement::make(2, 2, 3, {0, 1, 1, 1, 0, -1}));
  CHECK_THAT(problem_in(std::string("hello")), contains("expected routing, loads or a plan"));
  CHECK_THAT(problem_in(std::string()), contains("found none of them"));
  std::ofstream(folder / "loads.csv") << "layer,expert,count\n0,0,1\n";
  CHECK_THAT(problem_of(try_read_trace(folder / "loads.csv")), contains("found CSV of counts"));
  CHECK_THAT(problem_of(try_read_trace("/dev/zero")), contains("regular file"));
}

TEST_CASE("what is read keeps the numbers of the model's layers") {
  const auto layers_in = [](const auto& file) {
    auto read = from_file(file);
    REQUIRE(read.has_value());
    return read->layers;
  };
  CHECK(layers_in(line("a", 0, 5, "0,1") + line("a", 0, 3, "-1,-1") + line("a", 0, 9, "1,0")) == numbers_of{5, 9});
  // a dense layer, in which nobody serves
  const auto ids = bytes_of(std::vector<std::uint16_t>{0xFFFF, 0xFFFF, 0, 1, 0xFFFF, 0xFFFF, 1, 2});
  CHECK(layers_in(npy("<u2", "2, 2, 2", ids)) == numbers_of{1});
  CHECK(layers_in(npy("<u2", "1, 4, 2", ids)) == numbers_of{1, 3});
  CHECK(layers_in(npy("<i8", "2, 1", bytes_of(std::vector<std::int64_t>{0, 4}))) == numbers_of{0, 1});
  CHECK(layers_in(std::string("layer,expert,count\n3,0,5\n5,1,0\n")) == numbers_of{3, 5});
  CHECK(read_as<load_table>(std::string("layer,expert,count\n3,0,5\n5,1,0\n")) ==
        load_table{2, 2, numbers{5, 0, 0, 0}});
  CHECK(layers_in(std::string("initial_global_assignments:\n  7: [0, 1]\n")) == numbers_of{7});
  const temporary_directory folder;
  const tensor experts = make_tensor("experts", {2, 2, 1}, i32{-1, 0, -1, 1});
  auto writer = tetromino::io::safetensors_writer::create(folder / "t", std::vector{experts.declared});
  writer.append("experts", experts.bytes);
  writer.finish();
  CHECK(read_routing(folder / "t").layers == numbers_of{1});
}

TEST_CASE("a hundred thousand domains are read in linear time") {
  std::string all;
  for (int i = 0; i < 100'000; ++i) {
    const std::string n = std::to_string(i);
    all += R"({"req_id":)" + n + R"(,"token_idx":0,"layer":0,"topk_ids":[1],"domain":")" + n + "\"}\n";
  }
  CHECK(from_lines(all)->domain_names().size() == 100'000);
}

TEST_CASE("random bytes and mutated lines never crash the reader") {
  generator g(tetromino_test::seed());
  const std::string good = line("a", 0, 0, "1,2", R"(,"domain":"x")") + line("a", 1, 0, "1,2", R"(,"phase":"decode")");
  std::size_t accepted = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string text = good;
    for (std::size_t n = g.below(4); n > 0; --n) {
      const std::size_t at = g.below(text.size());
      if (g.below(2) == 0) {
        text[at] = static_cast<char>(g.below(256));
      } else {
        text.erase(at, 1 + g.below(5));
      }
    }
    accepted += from_lines(text).has_value() ? 1U : 0U;
  }
  CHECK(accepted > 1000);
  CHECK(accepted < 19'000);
}
