#include "check.hpp"

#include "support/fastest.hpp"

#include <tetromino/io/gguf/verify.hpp>
#include <tetromino/thread_executor.hpp>

#include <algorithm>   // std::find_if, std::reverse
#include <cmath>       // std::isinf
#include <filesystem>  // std::filesystem
#include <fstream>     // std::ofstream, std::ifstream
#include <iterator>    // std::istreambuf_iterator
#include <limits>      // std::numeric_limits
#include <map>         // std::map
#include <random>      // std::mt19937_64
#include <string>      // std::string
#include <utility>     // std::exchange
#include <vector>      // std::vector

namespace fs = std::filesystem;
namespace io = tetromino::io;
using tetromino::errc;
using tetromino::recipe;
using tetromino_test::contains;
using tetromino_test::temporary_directory;

namespace {

using bytes = std::vector<std::uint8_t>;

bytes load(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::size_t files_in(const fs::path& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

/// A model of one layer with experts, in llama.cpp's names.
struct model {
  std::string architecture = "llama";
  std::vector<io::gguf_declaration> tensors{{"token_embd.weight", io::ggml_type::F16, {50, 64}},
                                            {"blk.0.attn_norm.weight", io::ggml_type::F32, {64}},
                                            {"blk.0.attn_q.weight", io::ggml_type::F16, {128, 64}},
                                            {"blk.0.attn_output.weight", io::ggml_type::BF16, {64, 128}},
                                            {"blk.0.ffn_gate_inp.weight", io::ggml_type::F32, {3, 64}},
                                            {"blk.0.ffn_up_exps.weight", io::ggml_type::F32, {3, 40, 64}},
                                            {"blk.0.ffn_up.weight", io::ggml_type::F32, {40, 64}}};
  io::gguf_metadata metadata{};

  /// Gaussian weights; the larger the tensor's number, the smaller they are.
  io::gguf_file write(const fs::path& path) {
    std::mt19937_64 random(tetromino_test::seed());
    metadata.set("general.architecture", architecture);
    metadata.set("general.file_type", std::uint32_t{1});
    const std::vector<std::string_view> tokens{"a", "b"};
    metadata.set("tokenizer.ggml.tokens", io::gguf_value(std::span<const std::string_view>(tokens)));
    auto writer = io::gguf_writer::create(path, metadata, tensors);
    float deviation = 0.1f;
    for (const auto& tensor : tensors) {
      std::normal_distribution<float> normal(0.0f, deviation *= 0.7f);
      std::size_t n = 1;
      for (const std::size_t d : tensor.shape) n *= d;
      for (std::size_t i = 0; i < n; ++i) {
        const float x = normal(random);
        if (tensor.type == io::ggml_type::F32) {
          writer.append_values<float>(tensor.name, std::span(&x, 1));
        } else if (tensor.type == io::ggml_type::F16) {
          const auto h = tetromino::detail::from_float<tetromino::half>(x);
          writer.append_values<tetromino::half>(tensor.name, std::span(&h, 1));
        } else {
          const auto b = tetromino::detail::from_float<tetromino::bfloat16>(x);
          writer.append_values<tetromino::bfloat16>(tensor.name, std::span(&b, 1));
        }
      }
    }
    writer.finish();
    return io::gguf_file::open(path);
  }
};

std::vector<float> values_of(const io::gguf_tensor& tensor) {
  std::vector<float> out;
  if (tensor.type() == io::ggml_type::F32) return tensor.copy_as<float>();
  if (tensor.type() == io::ggml_type::F16) {
    for (const auto x : tensor.as<tetromino::half>()) out.push_back(tetromino::detail::to_float(x));
  } else {
    for (const auto x : tensor.as<tetromino::bfloat16>()) out.push_back(tetromino::detail::to_float(x));
  }
  return out;
}

/// What llama.cpp multiplies with: decoded blocks, times the tensor scales where there are any.
std::vector<float> decoded(const io::gguf_file& file, const std::string& name) {
  const auto& tensor = file[name];
  const std::size_t cols = tensor.shape().back(), matrices = tensor.shape().size() == 3 ? tensor.shape()[0] : 1;
  const std::size_t rows = tensor.elements() / cols / matrices;
  const auto* const scales = file.find(name.substr(0, name.rfind('.')) + ".scale");
  std::vector<float> tensor_scales;
  tetromino::any_format format = tetromino::mxfp4{};
  if (tensor.type() == io::ggml_type::NVFP4) {
    format = tetromino::nvfp4{};
    tensor_scales = scales == nullptr ? std::vector<float>{1.0f} : scales->copy_as<float>();
  }
  const auto packed = tetromino::layout::from_ggml(format, tensor.bytes(), matrices, rows, cols, tensor_scales);
  std::vector<float> out(tensor.elements());
  const tetromino::batch_view<float> view(out.data(), matrices, rows, cols);
  tetromino::dequantize_to(tetromino::scalar, packed, view);
  return out;
}

std::vector<float> packed_again(const io::gguf_tensor& tensor, const recipe& how, bool has_scale,
                                std::span<const float> column_weights = {}) {
  const std::vector<float> values = values_of(tensor);
  const std::size_t cols = tensor.shape().back(), matrices = tensor.shape().size() == 3 ? tensor.shape()[0] : 1;
  const tetromino::batch_view<const float> view(values.data(), matrices, values.size() / cols / matrices, cols);
  tetromino::quantize_options options{.column_weights = column_weights,
                                      .scope = tetromino::tensor_scale_scope::per_matrix};
  const float one = 1.0f;
  if (how.format.scale == tetromino::scale_type::e4m3 && !has_scale) options.tensor_scales = {&one, 1};
  const auto packed = tetromino::quantize(tetromino::scalar, view, how, options);
  std::vector<float> out(values.size());
  tetromino::dequantize_to(tetromino::scalar, packed,
                           tetromino::batch_view<float>(out.data(), matrices, view.rows, cols));
  return out;
}

io::gguf_options with(const char* name) { return {.rules = {{"", recipe::parse(name)}}}; }

}  // namespace

TEST_CASE("what is no matrix product's weight stays, and says why") {
  using shape = std::vector<std::size_t>;
  const shape matrix{64, 64}, stack{4, 64, 64}, vector{64};
  const auto why = [](const char* name, const shape& s) {
    return std::string(tetromino::detail::gguf_kept_because(name, s));
  };
  for (const char* name :
       {"blk.0.attn_q.weight", "blk.11.attn_qkv.weight", "blk.3.ffn_gate.weight", "blk.0.ffn_down_shexp.weight",
        "blk.0.attn_kv_b.weight", "blk.0.ssm_in.weight", "enc.blk.0.attn_o.weight", "dec.blk.0.cross_attn_q.weight"}) {
    INFO(name);
    CHECK(why(name, matrix).empty());
  }
  for (const char* name : {"blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_up_exps.weight"})
    CHECK(why(name, stack).empty());
  CHECK(why("blk.0.ffn_gate_inp.weight", matrix) == "a router");
  CHECK(why("blk.0.ffn_gate_inp_shexp.weight", vector) == "a router");
  CHECK(why("blk.0.attn_q_norm.weight", vector) == "a norm");
  CHECK(why("token_embd.weight", matrix) == "an embedding");
  CHECK(why("per_layer_token_embd.weight", matrix) == "an embedding");
  CHECK(why("v.position_embd.weight", matrix) == "an embedding");
  CHECK(why("output.weight", matrix) == "an output head");
  CHECK(why("blk.0.ssm_conv1d.weight", matrix) == "a convolution");
  CHECK(why("blk.0.ssm_a", matrix) == "not a weight");
  CHECK(why("blk.0.ssm_dt.weight", matrix) == "a state-space parameter");
  CHECK(why("blk.0.attn_q.bias", vector) == "not a weight");
  CHECK(why("blk.0.attn_gate.weight", matrix) == "a gate");
  CHECK(why("v.blk.0.attn_q.weight", matrix) == "in a vision or audio tower");
  CHECK(why("blk.0.ffn_up_exps.weight", matrix) == "experts, but not a stack of matrices");
  CHECK(why("blk.0.attn_q.weight", stack) == "not known to be the weight of a matrix product");
  CHECK(why("blk.0.of_tomorrow.weight", matrix) == "not known to be the weight of a matrix product");
  CHECK(why("attn_q.weight", matrix) == "not known to be the weight of a matrix product");
  CHECK(why("blk.", matrix) == "not a weight");
  CHECK(why("blk.weight", matrix) != "");
}

TEST_CASE("a packed file holds what quantize gives, and all else as it was") {
  const temporary_directory folder;
  model source;
  const auto file = source.write(folder / "in");
  for (const char* name : {"mxfp4-32/floor", "mxfp4-32/oas", "mxfp4-32/min-error", "nvfp4/amax", "nvfp4/four-over-six",
                           "nvfp4/min-error"}) {
    INFO(name);
    const auto plan = io::plan_gguf(file, with(name));
    const auto report = io::pack_gguf(tetromino_test::fastest, file, plan, folder / "out");
    const auto out = io::gguf_file::open(folder / "out");
    const bool is_nv = std::string(name).starts_with("nvfp4");
    CHECK(out.size() == file.size() + (is_nv ? 4u : 0u));
    for (const auto& tensor : file) {
      INFO(tensor.name());
      const auto& made = out[tensor.name()];
      CHECK(made.shape() == tensor.shape());
      if (!tetromino::detail::gguf_kept_because(tensor.name(), tensor.shape()).empty()) {
        CHECK(made.type() == tensor.type());
        CHECK(bytes(made.bytes().begin(), made.bytes().end()) == bytes(tensor.bytes().begin(), tensor.bytes().end()));
        continue;
      }
      CHECK(made.type() == (is_nv ? io::ggml_type::NVFP4 : io::ggml_type::MXFP4));
      CHECK(decoded(out, tensor.name()) == packed_again(tensor, recipe::parse(name), is_nv));
    }
    if (is_nv) {
      CHECK(out["blk.0.attn_q.scale"].shape() == std::vector<std::size_t>{1});
      CHECK(out["blk.0.ffn_up_exps.scale"].shape() == std::vector<std::size_t>{3});
    }
    CHECK(out.metadata().get<std::uint32_t>("general.file_type") == (is_nv ? 39 : 38));
    CHECK(out.metadata().get<std::uint32_t>("general.quantization_version") == 2);
    CHECK(out.metadata().get<std::string_view>("tetromino.recipe") == name);
    CHECK(*out.metadata().find("tokenizer.ggml.tokens") == *file.metadata().find("tokenizer.ggml.tokens"));
    REQUIRE(report.size() == file.size());
    CHECK(report[0].errors.count == 0);
    CHECK(report[2].errors.qsnr() > 15);

    const tetromino::thread_executor threads(3);
    io::pack_gguf(tetromino_test::fastest.on(threads), file, plan, folder / "again");
    CHECK(load(folder / "again") == load(folder / "out"));
  }
}

TEST_CASE("NVFP4 has a tensor scale where llama.cpp applies it, and 1 elsewhere") {
  const temporary_directory folder;
  const auto scales = [&](model source) {
    const auto file = source.write(folder / "in");
    io::pack_gguf(tetromino_test::fastest, file, io::plan_gguf(file, with("nvfp4/min-error")), folder / "out");
    const auto out = io::gguf_file::open(folder / "out");
    std::string found;
    for (const auto& tensor : out) {
      if (tensor.name().ends_with(".scale") && file.find(tensor.name()) == nullptr) found += tensor.name() + ' ';
    }
    for (const char* name : {"blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight"}) {
      const bool has_scale =
          found.find(std::string(name, std::string(name).rfind('.')) + ".scale") != std::string::npos;
      if (out[name].type() != io::ggml_type::NVFP4) continue;
      if (!has_scale && out.find("blk.0.ffn_up.scale") != nullptr) continue;  // of the source: decoded() takes it
      CHECK(decoded(out, name) == packed_again(file[name], recipe::parse("nvfp4/min-error"), has_scale));
    }
    return found;
  };
  CHECK(scales({}) == "blk.0.attn_q.scale blk.0.attn_output.scale blk.0.ffn_up_exps.scale blk.0.ffn_up.scale ");
  model other;
  other.architecture = "qwen2moe";
  CHECK(scales(other).empty());
  model biased;
  biased.tensors.push_back({"blk.0.ffn_up.bias", io::ggml_type::F32, {40}});
  biased.tensors.push_back({"blk.0.attn_q.bias", io::ggml_type::F32, {128}});
  CHECK(scales(biased) == "blk.0.attn_q.scale blk.0.attn_output.scale blk.0.ffn_up_exps.scale ");
  model named;
  named.tensors.push_back({"blk.0.ffn_up.scale", io::ggml_type::F32, {1}});
  CHECK(scales(named) == "blk.0.attn_q.scale blk.0.attn_output.scale blk.0.ffn_up_exps.scale ");
}

TEST_CASE("the tensor scale is of the whole matrix, however many slices it is packed in") {
  const temporary_directory folder;
  const std::size_t rows = 8192, cols = 64;  // 2 MiB, of which a slice holds half
  io::gguf_metadata metadata;
  metadata.set("general.architecture", "llama");
  const std::vector<io::gguf_declaration> declared{{"blk.0.ffn_up.weight", io::ggml_type::F32, {rows, cols}}};
  auto writer = io::gguf_writer::create(folder / "in", metadata, declared);
  std::vector<float> values(rows * cols, 0.01f);
  values[3] = 1.0f;
  writer.append_values<float>("blk.0.ffn_up.weight", values);
  writer.finish();
  const auto file = io::gguf_file::open(folder / "in");
  io::pack_gguf(tetromino_test::fastest, file, io::plan_gguf(file, with("nvfp4/amax")), folder / "out");
  CHECK(io::gguf_file::open(folder / "out")["blk.0.ffn_up.scale"].copy_as<float>() ==
        std::vector<float>{tetromino::tensor_scale_for(1.0f, tetromino::scale_rule::amax)});
}

TEST_CASE("an importance matrix weighs the errors of each expert") {
  const temporary_directory folder;
  model source;
  const auto file = source.write(folder / "in");
  std::mt19937_64 random(tetromino_test::seed());
  std::vector<float> sums(3 * 64);
  for (auto& x : sums) x = static_cast<float>(random() % 1000) / 10.0f;
  const std::vector<float> counts{1, 2, 4};
  {
    auto writer = io::gguf_writer::create(
        folder / "imatrix", {},
        std::vector<io::gguf_declaration>{{"blk.0.ffn_up_exps.weight.in_sum2", io::ggml_type::F32, {3, 64}},
                                          {"blk.0.ffn_up_exps.weight.counts", io::ggml_type::F32, {3, 1}}});
    writer.append_values<float>("blk.0.ffn_up_exps.weight.in_sum2", sums);
    writer.append_values<float>("blk.0.ffn_up_exps.weight.counts", counts);
    writer.finish();
  }
  const auto weights = io::imatrix::open(folder / "imatrix");
  std::vector<float> means = sums;
  for (std::size_t i = 0; i < means.size(); ++i) means[i] /= counts[i / 64];

  auto options = with("mxfp4-32/min-error");
  options.column_weights = &weights;
  const auto plan = io::plan_gguf(file, options);
  CHECK(plan.tensors[5].is_weighted);
  CHECK_FALSE(plan.tensors[2].is_weighted);
  const auto report = io::pack_gguf(tetromino_test::fastest, file, plan, folder / "out");
  const auto out = io::gguf_file::open(folder / "out");
  CHECK(decoded(out, "blk.0.ffn_up_exps.weight") ==
        packed_again(file["blk.0.ffn_up_exps.weight"], recipe::parse("mxfp4-32/min-error"), false, means));
  CHECK(decoded(out, "blk.0.ffn_up_exps.weight") !=
        packed_again(file["blk.0.ffn_up_exps.weight"], recipe::parse("mxfp4-32/min-error"), false));
  CHECK(out.metadata().get<std::string_view>("quantize.imatrix.file") == "imatrix");
  CHECK(out.metadata().get<std::uint32_t>("quantize.imatrix.entries_count") == 1);
  CHECK(report[5].weighted_qsnr() > report[5].errors.qsnr());
  CHECK(std::isinf(report[2].weighted_qsnr()));

  options.keep = {"*exps*"};
  CHECK_THAT(io::try_plan_gguf(file, options).error().what(), contains("imatrix knows, found none"));
}

TEST_CASE("keep, pack, rules by pattern and what cannot be asked for") {
  const temporary_directory folder;
  model source;
  source.tensors.push_back({"blk.0.of_tomorrow.weight", io::ggml_type::F32, {4, 64}});
  source.tensors.push_back({"blk.0.ffn_down.weight", io::ggml_type::F32, {4, 48}});
  source.tensors.push_back({"blk.0.ffn_gate.weight", io::ggml_type::Q8_0, {4, 64}});
  const auto file = [&] {
    auto copy = source;
    copy.tensors.pop_back();
    copy.write(folder / "plain");
    const auto plain = io::gguf_file::open(folder / "plain");
    auto writer = io::gguf_writer::create(folder / "in", plain.metadata(), source.tensors);
    for (const auto& tensor : plain) writer.append(tensor.name(), tensor.bytes());
    writer.append("blk.0.ffn_gate.weight", bytes(4 * 2 * 34));
    writer.finish();
    return io::gguf_file::open(folder / "in");
  }();
  const auto planned = [&](const io::gguf_options& options, const std::string& name) {
    for (const auto& tensor : io::plan_gguf(file, options).tensors) {
      if (tensor.source->name() == name) return tensor.is_packed ? tensor.how.name() : tensor.reason;
    }
    return std::string();
  };
  auto options = with("mxfp4-32/floor");
  CHECK(planned(options, "blk.0.of_tomorrow.weight") == "not known to be the weight of a matrix product");
  CHECK(planned(options, "blk.0.ffn_down.weight") == "K = 48 is not whole blocks of 32");
  CHECK(planned(options, "blk.0.ffn_gate.weight") == "it is Q8_0 already");
  options.pack = {"*of_tomorrow*"};
  options.keep = {"*.attn_*"};
  options.rules.push_back({"experts", recipe::parse("nvfp4/amax")});
  options.rules.push_back({"ffn_up.", recipe::parse("mxfp4-32/oas")});
  CHECK(planned(options, "blk.0.of_tomorrow.weight") == "mxfp4-32/floor");
  CHECK(planned(options, "blk.0.attn_q.weight") == "--keep *.attn_*");
  CHECK(planned(options, "blk.0.ffn_up_exps.weight") == "nvfp4/amax");
  CHECK(planned(options, "blk.0.ffn_up.weight") == "mxfp4-32/oas");
  CHECK(planned({.rules = {{"linear", recipe::parse("nvfp4/amax")}}}, "blk.0.ffn_up_exps.weight") ==
        "no recipe is for it");

  const auto refused = [&](const io::gguf_options& asked) {
    const auto plan = io::try_plan_gguf(file, asked);
    REQUIRE_FALSE(plan);
    CHECK(plan.error().code() == errc::invalid_argument);
    CHECK_THROWS_AS(io::plan_gguf(file, asked), tetromino::error);
    return std::string(plan.error().what());
  };
  for (const char* name : {"mxfp4-16/oas", "mxfp4-32/oas/mbs-search", "mxfp4-32/oas/mbs-search@8x2"}) {
    CHECK_THAT(refused(with(name)), contains("expected a recipe of mxfp4-32 or nvfp4 without macro blocks, got mxfp4"));
  }
  CHECK_THAT(refused(with("mxfp4-32/oas/hadamard-32")), contains("llama.cpp does not rotate activations"));
  CHECK_THAT(refused(with("nvfp4/min-error/gptq")), contains("needs statistics of inputs"));
  auto wrong = with("mxfp4-32/oas");
  wrong.keep = {"*.attn_r.*"};
  CHECK_THAT(refused(wrong), contains("--keep '*.attn_r.*': it matches no tensor; the nearest names are"));
  wrong.keep = {"*"};
  CHECK_THAT(refused(wrong), contains("expected a weight to pack, found none in 10 tensors"));
  wrong = with("mxfp4-32/oas");
  wrong.pack = {"*norm*"};
  CHECK_THAT(refused(wrong), contains("--pack *norm*: expected matrices of F32, F16 or BF16, found blk.0.attn_norm"));
  wrong.pack = {"no"};
  CHECK_THAT(refused(wrong), contains("--pack 'no': it matches no tensor"));
  wrong = with("mxfp4-32/oas");
  wrong.rules.push_back({"expert", recipe::parse("nvfp4/amax")});
  CHECK_THAT(refused(wrong), contains("--recipe 'expert': it matches no tensor"));

  model part;
  part.metadata.set("split.count", std::uint16_t{2});
  const auto split = part.write(folder / "split");
  CHECK_THAT(io::try_plan_gguf(split, with("mxfp4-32/oas")).error().what(), contains("llama-gguf-split --merge"));
}

TEST_CASE("a value that cannot be packed names its tensor and row, and leaves nothing behind") {
  const temporary_directory folder;
  const std::vector<io::gguf_declaration> declared{{"blk.0.ffn_up_exps.weight", io::ggml_type::F32, {3, 9000, 64}}};
  {
    auto writer = io::gguf_writer::create(folder / "in", {}, declared);
    std::vector<float> row(64, 0.5f);
    for (std::size_t r = 0; r < 3 * 9000; ++r) {
      row[7] = r == 9000 + 8000 ? std::numeric_limits<float>::infinity() : 0.25f;
      writer.append_values<float>(declared[0].name, row);
    }
    writer.finish();
  }
  const auto file = io::gguf_file::open(folder / "in");
  for (const char* name : {"mxfp4-32/oas", "nvfp4/amax"}) {
    const tetromino::thread_executor threads(2);
    auto options = with(name);
    const auto done =
        io::try_pack_gguf(tetromino_test::fastest.on(threads), file, io::plan_gguf(file, options), folder / "out");
    REQUIRE_FALSE(done);
    CHECK(done.error().code() == errc::non_finite);
    CHECK_THAT(done.error().what(), contains("in: tensor 'blk.0.ffn_up_exps.weight': "));
    CHECK_THAT(done.error().what(), contains("got +infinity at matrix 1, row 8000, column 7"));
    CHECK(files_in(folder.path()) == 1);
    options.special = tetromino::special_values::saturate;
    std::size_t calls = 0, last = 0;
    options.progress = [&](std::size_t) { return ++calls != last; };
    CHECK(io::try_pack_gguf(tetromino_test::fastest, file, io::plan_gguf(file, options), folder / "out"));
    fs::remove(folder / "out");
    last = std::exchange(calls, 0);  // the last time that it is asked, all is written
    CHECK_THAT(
        io::try_pack_gguf(tetromino_test::fastest, file, io::plan_gguf(file, options), folder / "out").error().what(),
        contains("stopped"));
    CHECK(files_in(folder.path()) == 1);
  }
  CHECK_THAT(io::try_pack_gguf(tetromino::scalar, file, io::plan_gguf(file, with("mxfp4-32/oas")), folder / "in")
                 .error()
                 .what(),
             contains("expected another file than the one being read"));
}

TEST_CASE("verifying says what was packed, and catches what a loader would not expect") {
  const temporary_directory folder;
  model source;
  const auto file = source.write(folder / "in");
  auto options = with("nvfp4/amax");
  options.rules.push_back({"ffn_up.", recipe::parse("mxfp4-32/oas")});
  io::pack_gguf(tetromino_test::fastest, file, io::plan_gguf(file, options), folder / "out");
  const auto out = io::gguf_file::open(folder / "out");
  const auto report = io::verify_gguf(tetromino_test::fastest, file, out);
  CHECK(report.packed == 4);
  CHECK(report.kept == 3);
  CHECK(report.recipes == "nvfp4/amax ffn_up.=mxfp4-32/oas");
  CHECK(report.packed_again);
  CHECK(report.errors.qsnr() > 17);
  CHECK(report.errors.count == 64 * 128 * 2 + 3 * 40 * 64 + 40 * 64);

  // The packed file, with `change` done to it.
  struct contents {
    io::gguf_metadata metadata;
    std::vector<io::gguf_declaration> tensors;
    std::map<std::string, bytes> data;
  };
  const auto complaint = [&](const auto& change) {
    contents c{out.metadata(), {}, {}};
    for (const auto& tensor : out) {
      c.tensors.push_back({tensor.name(), tensor.type(), tensor.shape()});
      c.data[tensor.name()] = bytes(tensor.bytes().begin(), tensor.bytes().end());
    }
    change(c);
    auto writer = io::gguf_writer::create(folder / "changed", c.metadata, c.tensors);
    for (const auto& [name, stored] : c.data) writer.append(name, stored);
    writer.finish();
    const auto checked = io::try_verify_gguf(tetromino_test::fastest, file, io::gguf_file::open(folder / "changed"));
    if (checked) return std::string("(accepted)");
    CHECK(checked.error().code() == errc::malformed_file);
    return std::string(checked.error().what());
  };
  const auto at = [](contents& c, const std::string& name) {
    return std::find_if(c.tensors.begin(), c.tensors.end(), [&](const auto& t) { return t.name == name; });
  };
  CHECK(complaint([](contents&) {}) == "(accepted)");
  CHECK_THAT(complaint([&](contents& c) {
               c.tensors.erase(at(c, "blk.0.attn_norm.weight"));
               c.data.erase("blk.0.attn_norm.weight");
             }),
             contains("tensor 'blk.0.attn_norm.weight': expected it as in the original, found none"));
  CHECK_THAT(complaint([&](contents& c) {
               c.tensors.push_back({"more.weight", io::ggml_type::F32, {1}});
               c.data["more.weight"] = bytes(4);
             }),
             contains("tensor 'more.weight': expected no such tensor"));
  CHECK_THAT(complaint([&](contents& c) { c.data["token_embd.weight"][3] ^= 1; }),
             contains("tensor 'token_embd.weight': expected the bytes of the original"));
  CHECK_THAT(complaint([&](contents& c) { c.data["blk.0.ffn_up.weight"][30] ^= 1; }),
             contains("it does not hold what its recipe makes of the original"));
  CHECK_THAT(complaint([&](contents& c) {
               std::reverse(c.data["blk.0.attn_q.weight"].begin(), c.data["blk.0.attn_q.weight"].end());
             }),
             contains("tensor 'blk.0.attn_q.weight': "));
  CHECK_THAT(complaint([&](contents& c) {
               at(c, "blk.0.attn_q.weight")->shape = {64, 128};
             }),
             contains("expected shape [128, 64], found [64, 128]"));
  CHECK_THAT(complaint([&](contents& c) {
               c.tensors.erase(at(c, "blk.0.attn_q.scale"));
               c.data.erase("blk.0.attn_q.scale");
             }),
             contains("tensor 'blk.0.attn_q.weight': what readers decode is not the original: QSNR"));
  CHECK_THAT(complaint([&](contents& c) {
               at(c, "blk.0.ffn_up_exps.scale")->shape.front() = 1;
               c.data["blk.0.ffn_up_exps.scale"].resize(4);
             }),
             contains("expected a scale for each of 3 matrices, found shape [1]"));
  CHECK_THAT(complaint([&](contents& c) { c.data["blk.0.attn_q.scale"] = bytes(4); }),
             contains("expected positive, finite scales, found 0"));
  CHECK_THAT(complaint([&](contents& c) {
               at(c, "blk.0.ffn_gate_inp.weight")->type = io::ggml_type::MXFP4;
               c.data["blk.0.ffn_gate_inp.weight"].resize(3 * 2 * 17);
             }),
             contains("expected F32, since it is a router, found MXFP4"));
  CHECK_THAT(complaint([&](contents& c) {
               at(c, "blk.0.ffn_up.weight")->type = io::ggml_type::Q8_0;
               c.data["blk.0.ffn_up.weight"].resize(40 * 2 * 34);
             }),
             contains("expected F32, MXFP4 or NVFP4, found Q8_0"));
  CHECK_THAT(complaint([](contents& c) { c.metadata.set("general.architecture", "qwen2"); }),
             contains("key 'general.architecture': expected the value of the original"));
  CHECK_THAT(complaint([](contents& c) { c.metadata.set("new", true); }), contains("key 'new': expected no such key"));
  CHECK_THAT(complaint([](contents& c) { c.metadata.set("general.file_type", std::uint32_t{1}); }),
             contains("key 'general.file_type': expected 39, found 1"));
  CHECK_THAT(complaint([](contents& c) { c.metadata.set("tetromino.recipe", "mxfp4-32/oas"); }),
             contains("expected what mxfp4-32/oas makes, found NVFP4"));
  CHECK_THAT(complaint([](contents& c) { c.metadata.set("tetromino.recipe", "nvfp4/none"); }),
             contains("tetromino.recipe: "));
  CHECK_THAT(complaint([](contents& c) { c.metadata.set("tetromino.recipe", "nvfp4/min-error ffn_up.=mxfp4-32/oas"); }),
             contains("it does not hold what its recipe makes"));

  model other;
  other.architecture = "qwen2";
  const auto unscaled = other.write(folder / "qwen2");
  io::pack_gguf(tetromino_test::fastest, unscaled, io::plan_gguf(unscaled, with("nvfp4/amax")), folder / "qwen2.out");
  CHECK(io::verify_gguf(tetromino_test::fastest, unscaled, io::gguf_file::open(folder / "qwen2.out")).packed_again);
  CHECK(io::try_verify_gguf(tetromino_test::fastest, file, file).value().packed == 0);
}
