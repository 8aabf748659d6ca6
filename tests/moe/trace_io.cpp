#include "check.hpp"

#include <tetromino/moe/trace_io.hpp>

#include "reference/generators.hpp"

#include <algorithm>  // std::swap
#include <fstream>    // std::ofstream
#include <sstream>    // std::istringstream
#include <string>     // std::string
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
  for (const auto& ids : {make_tensor("experts", {2, 1, 2}, u8{0, 1, 3, 2}),
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
  CHECK_THAT(problem_of(from_tensors({ids})), contains("request_offsets"));
  CHECK_THAT(problem_of(from_tensors({make_tensor("experts", {4, 1}, u8{0, 1, 3, 2}), offsets})), contains("2 dimen"));
  CHECK_THAT(problem_of(from_tensors({make_tensor("experts", {2, 1, 2}, i64{0, 1, 3, 2}), offsets})), contains("I64"));
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
  CHECK_THAT(problem_of(from_lines(good + "{\"req_id\":")), contains("log, line 2: expected a JSON object"));
  CHECK_THAT(problem_of(from_lines("[1]")), contains("line 1: expected a JSON object, got array"));
  CHECK_THAT(problem_of(from_lines(R"({"token_idx":0,"layer":0,"topk_ids":[1]})")), contains("req_id"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":{},"token_idx":0,"layer":0,"topk_ids":[1]})")), contains("object"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","layer":0,"topk_ids":[1]})")), contains("token_idx"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":-1,"layer":0,"topk_ids":[1]})")), contains("whole"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":0.5,"layer":0,"topk_ids":[1]})")), contains("whole"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":0,"layer":70000,"topk_ids":[1]})")), contains("layer"));
  CHECK_THAT(problem_of(from_lines(R"({"req_id":"a","token_idx":0,"layer":0})")), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, ""))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "-1"))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "65535"))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(line("a", 0, 0, "null"))), contains("topk_ids"));
  CHECK_THAT(problem_of(from_lines(good + line("a", 0, 0, "1,2"))), contains("line 2: expected token 0"));
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
