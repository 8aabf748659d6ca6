#include "support/model_folder.hpp"

#include "../../examples/tools/input_statistics.hpp"
#include "examples/large_model.hpp"
#include "examples/program.hpp"
#include "reference/numbers.hpp"
#include "support/safetensors_files.hpp"

#include <tetromino/io/safetensors.hpp>
#include <tetromino/tetromino.hpp>

#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <sstream>

namespace {

namespace io = tetromino::io;
using namespace tetromino_test;

const std::string model = data_file("moe-16x2.safetensors").string();

/// What packing makes of the original tensor, by the library's own round trip.
tetromino::matrix<tetromino::bfloat16> round_trip(const io::safetensors_tensor& tensor, const std::string& name,
                                                  std::span<const float> tensor_scales) {
  const auto& shape = tensor.shape();
  const tetromino::batch_view<const tetromino::bfloat16> in(
      tensor.as<tetromino::bfloat16>().data(), shape.size() == 3 ? shape[0] : 1, shape[shape.size() - 2], shape.back());
  tetromino::matrix<tetromino::bfloat16> out(in.matrices, in.rows, in.cols);
  tetromino::fake_quantize(tetromino::scalar, in, tetromino::recipe::parse(name), out.view(),
                           {.tensor_scales = tensor_scales});
  return out;
}

struct layout_case {
  std::string layout, recipe;
  std::string codes, scales, tensor_scale;  // how the names of the parts end, in place of ".weight"
  std::size_t block;
  std::string scale_dtype;
  std::size_t fine = 0;  // elements with a factor of 2 bits
};

const std::vector<layout_case> layout_cases = {
    {"gpt-oss", "mxfp4-32/oas", "_blocks", "_scales", "", 32, "U8"},
    {"compressed-tensors", "mxfp4-32/even", ".weight_packed", ".weight_scale", "", 32, "U8"},
    {"compressed-tensors", "nvfp4/amax", ".weight_packed", ".weight_scale", ".weight_global_scale", 16, "F8_E4M3"},
    {"modelopt", "nvfp4/four-over-six", ".weight", ".weight_scale", ".weight_scale_2", 16, "F8_E4M3"},
    {"linear", "nvfp4/min-error", ".weight.codes", ".weight.scales", ".weight.tensor_scales", 16, "F8_E4M3"},
    {"linear", "mxfp4-16/floor", ".weight.codes", ".weight.scales", "", 16, "F8_E8M0"},
    {"linear", "mxfp4-32/floor/mbs-search@8x2", ".weight.codes", ".weight.scales", "", 32, "F8_E8M0", 8},
    {"linear", "mxfp4-32/floor/mbs-static@16x2", ".weight.codes", ".weight.scales", "", 32, "F8_E8M0", 16},
};

/// The modules that hold a weight: one for each expert, where readers of a layout want that.
std::vector<std::string> modules_of(const io::safetensors_tensor& tensor, const std::string& layout) {
  const std::string module = tensor.name().substr(0, tensor.name().size() - std::string(".weight").size());
  if (tensor.shape().size() == 2 || layout == "linear" || layout == "gpt-oss") return {module};
  const std::size_t dot = module.rfind('.');
  std::vector<std::string> out;
  for (std::size_t e = 0; e < tensor.shape()[0]; ++e) {
    out.push_back(module.substr(0, dot) + ".experts." + std::to_string(e) + module.substr(dot));
  }
  return out;
}

}  // namespace

TEST_CASE("each layout is read back by an independent reader, bit for bit") {
  const auto original = io::safetensors_file::open(model);
  for (const auto& c : layout_cases) {
    CAPTURE(c.layout, c.recipe);
    const temporary_directory folder;
    const std::string out = (folder / "out.safetensors").string();
    const auto run =
        run_program("quantize_checkpoint", {model, out, "--recipe", c.recipe, "--layout", c.layout}, folder.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const auto written = reference::read_safetensors(out);
    CHECK(written.metadata.at("format") == "pt");
    CHECK(written.metadata.at("tetromino.recipe") == c.recipe);
    CHECK(written.metadata.count("quantization_config") == (c.layout == "linear" ? 0 : 1));

    std::size_t packed = 0, kept = 0;
    for (const auto& tensor : original) {
      const std::string& name = tensor.name();
      const bool keep = name.find("norm") != name.npos || name.find("embed") != name.npos ||
                        name.find("router") != name.npos || (c.layout == "gpt-oss" && name.find("attn") != name.npos);
      if (keep) {
        const auto& copy = written.tensors.at(name);
        CHECK(copy.dtype == "BF16");
        CHECK(std::equal(copy.bytes.begin(), copy.bytes.end(), tensor.bytes().begin(), tensor.bytes().end()));
        ++kept;
        continue;
      }
      std::vector<float> scales, decoded;
      for (const auto& module : modules_of(tensor, c.layout)) {
        const auto& codes = written.tensors.at(module + c.codes);
        const auto& block_scales = written.tensors.at(module + c.scales);
        CHECK(codes.dtype == "U8");
        CHECK(block_scales.dtype == c.scale_dtype);
        std::vector<float> own;
        if (!c.tensor_scale.empty()) {
          const auto& stored = written.tensors.at(module + c.tensor_scale);
          own.resize(stored.bytes.size() / 4);
          std::memcpy(own.data(), stored.bytes.data(), stored.bytes.size());
          for (float& scale : own) scale = c.layout == "compressed-tensors" ? 1.0f / scale : scale;
        }
        const auto factor = [&](std::size_t i) {  // rows are whole bytes of factors
          if (c.fine == 0) return 1.0f;
          const unsigned four = written.tensors.at(module + ".weight.macros").bytes[i / c.fine / 4];
          return 1.0f + static_cast<float>(four >> (i / c.fine % 4 * 2) & 3) / 4.0f;
        };
        for (std::size_t i = 0; i < codes.bytes.size() * 2; ++i) {
          const std::uint8_t scale = block_scales.bytes[i / c.block];
          decoded.push_back(
              e2m1_value(codes.bytes[i / 2], i) * factor(i) *
              (own.empty() ? e8m0_value(scale) : own[i / (codes.bytes.size() * 2 / own.size())] * e4m3_value(scale)));
        }
        scales.insert(scales.end(), own.begin(), own.end());
      }
      const auto expected = round_trip(tensor, c.recipe, scales);
      std::size_t wrong = 0;
      REQUIRE(decoded.size() == expected.data.size());
      for (std::size_t i = 0; i < decoded.size(); ++i) {
        wrong += tetromino::bfloat16(decoded[i]) != expected.data[i];
      }
      CHECK(wrong == 0);
      ++packed;
    }
    CHECK(packed == (c.layout == "gpt-oss" ? 12 : 28));
    CHECK(packed + kept == 42);

    const auto verified = run_program("verify_checkpoint", {model, out}, folder.path());
    INFO(verified.err);
    CHECK(verified.exit_code == 0);
    CHECK_THAT(verified.out, contains(std::to_string(packed) + " tensors packed as " + c.recipe));
  }
}

TEST_CASE("the second program finds a changed byte") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  REQUIRE(run_program("quantize_checkpoint", {model, out, "--recipe", "mxfp4-16/oas/mbs-search"}, folder.path())
              .exit_code == 0);
  const auto size = static_cast<long>(std::filesystem::file_size(out));
  for (const long position : {size / 3, size - 1}) {
    std::fstream file(out, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(position);
    const char byte = static_cast<char>(file.get() ^ 0x11);
    file.seekp(position);
    file.put(byte);
  }
  const auto run = run_program("verify_checkpoint", {model, out}, folder.path());
  CHECK(run.exit_code == 1);
  CHECK_THAT(run.err, contains("tensor '"));
}

TEST_CASE("recipes side by side: one line each, with bits and QSNR") {
  const temporary_directory folder;
  const auto run = run_program("quantize_checkpoint",
                               {model, "--compare", "--recipe", "mxfp4-32/floor", "--recipe", "nvfp4/amax", "--recipe",
                                "mxfp4-16/oas/mbs-search"},
                               folder.path());
  REQUIRE(run.exit_code == 0);
  std::istringstream lines(run.out);
  std::map<std::string, std::pair<double, double>> rows;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name;
    double bits = 0, qsnr = 0;
    if (words >> name >> bits >> qsnr) rows[name] = {bits, qsnr};
  }
  // Figures of an independent implementation.
  CHECK(rows.at("mxfp4-32/floor").first == 4.25);
  CHECK(std::abs(rows.at("mxfp4-32/floor").second - 18.66) < 0.03);
  CHECK(std::abs(rows.at("nvfp4/amax").second - 20.46) < 0.03);
  CHECK(std::abs(rows.at("mxfp4-16/oas/mbs-search").second - 20.12) < 0.03);
}

TEST_CASE("every way to call it says the same as JSON, or nothing") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  const auto said = [&](std::vector<std::string> arguments, const char* how) {
    arguments.insert(arguments.begin(), model);
    arguments.emplace_back(how);
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    INFO(run.err);
    CHECK(run.exit_code == 0);
    if (std::string(how) == "--quiet") CHECK((run.out + run.err).empty());
    return run.out;
  };
  const std::vector<std::string> compared = {"--compare", "--recipe", "nvfp4/amax", "--recipe", "mxfp4-32/floor"};
  const auto recipes = nlohmann::json::parse(said(compared, "--json"));
  CHECK(recipes.at("input") == model);
  CHECK(recipes.at("tensors").get<int>() > 0);
  CHECK(recipes.at("weights").get<int>() > 0);
  REQUIRE(recipes.at("recipes").size() == 2);
  CHECK(recipes["recipes"][1].at("recipe") == "mxfp4-32/floor");
  CHECK(recipes["recipes"][1].at("bits") == 4.25);
  CHECK(std::abs(recipes["recipes"][1].at("qsnr_db").get<double>() - 18.66) < 0.03);
  said(compared, "--quiet");

  const std::vector<std::string> planned = {out, "--dry-run", "--recipe", "mxfp4-32/oas"};
  const auto plan = nlohmann::json::parse(said(planned, "--json"));
  CHECK(plan.at("output") == out);
  CHECK(!plan.contains("bytes_written"));
  said(planned, "--quiet");
  CHECK_FALSE(std::filesystem::exists(out));

  const auto written = nlohmann::json::parse(said({out, "--recipe", "mxfp4-32/oas"}, "--json"));
  CHECK(written.at("layout") == "linear");
  CHECK(written.at("bytes_written").get<std::size_t>() > std::filesystem::file_size(out) / 2);
  CHECK(written.at("files_left").empty());
  REQUIRE(written.at("tensors").size() == plan.at("tensors").size());
  bool some_kept = false, some_packed = false;
  for (const auto& tensor : written["tensors"]) {
    const bool is_packed = tensor.at("packed").get<bool>();
    some_kept = some_kept || !is_packed;
    some_packed = some_packed || is_packed;
    CHECK(is_packed == (tensor.contains("recipe") && tensor.contains("qsnr_db") && tensor.contains("values_kept")));
    CHECK(is_packed != tensor.contains("why"));
    CHECK((tensor.contains("name") && tensor.contains("role") && tensor.contains("shape")));
  }
  CHECK(some_kept);
  CHECK(some_packed);
}

TEST_CASE("what cannot be done is said in one line, and leaves no file") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  const auto fails = [&](int exit_code, const std::vector<std::string>& arguments, const std::string& message) {
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    CAPTURE(run.out, run.err);
    CHECK(run.exit_code == exit_code);
    CHECK_THAT(run.err, contains(message));
    CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
    CHECK_FALSE(std::filesystem::exists(out));
  };
  fails(2, {model, out, "--recipe", "mxfp4-64/oas"}, "unknown format \"mxfp4-64\"");
  fails(2, {model, out, "--recipe", "mxfp4-16/oas", "--layout", "gpt-oss"},
        "layout gpt-oss stores mxfp4-32, not mxfp4-16");
  fails(2, {model, out, "--layout", "gguf"}, "unknown layout \"gguf\"; there are linear, gpt-oss");
  fails(2, {model}, "expected OUT");
  fails(2, {model, out, "--keep", "*.attention.*"}, "--keep '*.attention.*': it matches no tensor");
  fails(2, {model, out, "--pack", "*norm*"}, "--pack *norm*: expected matrices");
  fails(2, {model, out, "--recipe", "mlp=nvfp4/amax"}, "--recipe 'mlp': it matches no tensor");
  fails(2,
        {model, out, "--recipe", "attn.q=nvfp4/amax", "--layout", "compressed-tensors", "--recipe",
         "attn.k=mxfp4-32/oas", "--recipe", "attn.v=mxfp4-32/oas"},
        "expected one recipe, since readers run them as one matrix");
  fails(1, {(folder / "none").string(), out}, "none");
  fails(1, {model, (folder / "no/such/place").string()}, "could not create");
  fails(2, {model, model}, "expected another file than the one being read");
  fails(2, {model, out, "--imatrix", model}, "--imatrix is for GGUF files");
  fails(2, {"in.gguf", out, "--layout", "modelopt"}, "--layout is for safetensors");
  fails(2, {"in.gguf", "--compare"}, "--compare is for safetensors");
  fails(2, {model, (folder / "out.gguf").string()}, "GGUF files are written from GGUF files");
  CHECK_FALSE(std::filesystem::exists(folder / "out.gguf"));
  store_text(folder / "rules.json", "[]");
  fails(2, {model, out, "--recipe", (folder / "rules.json").string()}, "found none in it");
  fails(2, {model, out, "--recipe", (folder / "none.json").string()}, "No such file");
  fails(2, {model, "--compare", "--recipe", "nvfp4/amax/gptq"}, "needs --statistics FILE");
  fails(1, {model, (folder / (std::string(250, 'x') + ".safetensors")).string()}, "File name too long");
  CHECK(std::filesystem::file_size(model) > 7'000'000);

  const std::string bad = (folder / "bad.safetensors").string(), name = "layers.0.mlp.up_proj.weight";
  std::vector<float> values(64 * 32, 1.0f);
  values[5 * 32 + 7] = NAN;
  auto writer =
      io::safetensors_writer::create(bad, std::vector<io::tensor_declaration>{{name, io::dtype::F32, {64, 32}}});
  writer.append_values<float>(name, values);
  writer.finish();
  fails(1, {bad, out}, "tensor '" + name + "': expected finite values, got NaN at row 5, column 7");
  for (const std::string special : {"poison", "saturate"}) {
    const std::string made = (folder / special).string();
    CHECK(run_program("quantize_checkpoint", {bad, made, "--on-special", special}, folder.path()).exit_code == 0);
    const auto verified = run_program("verify_checkpoint", {bad, made}, folder.path());
    INFO(verified.err);
    CHECK(verified.exit_code == 0);
  }
}

TEST_CASE("names that are no UTF-8 are replaced in JSON, after the work as before it") {
  const temporary_directory folder;
  const std::string in = (folder / "in\xff").string(), out = (folder / "out\xff").string();
  write_model(in, {{"hidden_size", 64}}, {{"model.layers.0.mlp.up_proj.weight", {64, 64}}}, 1);
  store_text(in + "/left\xff.bin", "weights of another form");
  for (const std::vector<std::string>& more : {std::vector<std::string>{out}, {out, "--dry-run"}, {"--compare"}}) {
    std::vector<std::string> arguments{in, "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    CAPTURE(run.err);
    CHECK(run.exit_code == 0);
    const auto said = nlohmann::json::parse(run.out);
    if (more.size() != 1 || more[0] != out) continue;
    CHECK(said["files_left"] == nlohmann::json{"left\xEF\xBF\xBD.bin"});
    CHECK(run_program("verify_checkpoint", {in, out, "--json"}, folder.path()).exit_code == 0);
  }
}

TEST_CASE("a tensor of the least magnitudes has a scale that its reader can invert") {
  const temporary_directory folder;
  const std::string in = (folder / "in.safetensors").string(), name = "layers.0.mlp.up_proj.weight";
  std::vector<float> values(64 * 32, 1e-43f);
  auto writer =
      io::safetensors_writer::create(in, std::vector<io::tensor_declaration>{{name, io::dtype::F32, {64, 32}}});
  writer.append_values<float>(name, values);
  writer.finish();
  for (const std::string layout : {"linear", "modelopt", "compressed-tensors"}) {
    const std::string out = (folder / layout).string();
    const auto run =
        run_program("quantize_checkpoint", {in, out, "--recipe", "nvfp4/amax", "--layout", layout}, folder.path());
    INFO(run.err);
    CHECK(run.exit_code == 0);
  }
  const auto written = read_model(folder / "compressed-tensors");
  CHECK(first_float(written.at("layers.0.mlp.up_proj.weight_global_scale")) == 0x1p126f);
}

TEST_CASE("valid files that are unusual pack as usual ones do: data at odd places, metadata that are null") {
  const temporary_directory folder;
  const std::string name = "layers.0.mlp.up_proj.weight";
  const auto values = model_values({name, {64, 32}});
  std::string weights;
  for (const float value : values) {
    const auto bits = tetromino::bfloat16(value).bits;
    weights += {static_cast<char>(bits & 0xFF), static_cast<char>(bits >> 8)};
  }
  const auto tensor = [&](std::size_t begin) {
    return '"' + name + R"(":{"dtype":"BF16","shape":[64,32],"data_offsets":[)" + std::to_string(begin) + ',' +
           std::to_string(begin + weights.size()) + "]}";
  };
  const std::string flag = R"("flag":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]},)";
  const auto save = [&](const char* file, std::string header, const std::string& data, std::size_t multiple) {
    while ((8 + header.size()) % 8 != multiple) header += ' ';
    store_text(folder / file, length_prefix(header.size()) + header + data);
    return (folder / file).string();
  };
  const auto packed = [&](const std::string& in, const std::string& recipe) {
    const std::string out = in + "." + recipe.substr(0, recipe.find('/'));
    for (const auto& [program, arguments] : std::vector<std::pair<std::string, std::vector<std::string>>>{
             {"quantize_checkpoint", {in, out, "--recipe", recipe}}, {"verify_checkpoint", {in, out}}}) {
      const auto run = run_program(program, arguments, folder.path());
      INFO(in << ": " << run.err);
      CHECK(run.exit_code == 0);
    }
    auto tensors = read_model(out);
    tensors.erase("flag");
    return tensors;
  };
  for (const std::string recipe : {"mxfp4-32/oas", "nvfp4/min-error"}) {
    const auto bytes_of = [&](const std::string& in) {
      std::map<std::string, std::vector<std::uint8_t>> out;
      for (const auto& [part, stored] : packed(in, recipe)) out[part] = stored.bytes;
      return out;
    };
    const auto expected = bytes_of(save("usual", "{" + tensor(0) + "}", weights, 0));
    CHECK(expected.size() >= 2);
    CHECK(bytes_of(save("header_of_74", "{" + tensor(0) + "}", weights, 2)) == expected);
    CHECK(bytes_of(save("header_of_75", "{" + tensor(0) + "}", weights, 3)) == expected);
    CHECK(bytes_of(save("after_a_flag", "{" + flag + tensor(1) + "}", "\1" + weights, 0)) == expected);
    CHECK(bytes_of(save("null", R"({"__metadata__":null,)" + tensor(0) + "}", weights, 0)) == expected);
  }
}

TEST_CASE("output that cannot be written is an error, and an old file keeps its mode") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  const std::string program = program_path("quantize_checkpoint");
  const auto full = run_command({"sh", "-c", program + " " + model + " " + out + " > /dev/full"}, folder.path());
  CHECK(full.exit_code == 1);
  CHECK_THAT(full.err, contains("could not write to standard output"));
  std::filesystem::permissions(out, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  std::filesystem::create_symlink(out, folder / "link.safetensors");
  CHECK(run_program("quantize_checkpoint", {model, (folder / "link.safetensors").string()}, folder.path()).exit_code ==
        0);
  CHECK(std::filesystem::is_symlink(folder / "link.safetensors"));
  CHECK((std::filesystem::status(out).permissions() & std::filesystem::perms::all) ==
        (std::filesystem::perms::owner_read | std::filesystem::perms::owner_write));

  // ulimit -f counts blocks of 512 bytes in some shells and 1024 in others: less than a megabyte in both
  const std::string limited = "ulimit -f 900; exec " + program + " " + model + " " + (folder / "small").string();
  const auto run = run_command({"sh", "-c", limited}, folder.path());
  CHECK(run.exit_code == 1);
  CHECK_THAT(run.err, contains("File too large"));
  CHECK_FALSE(std::filesystem::exists(folder / "small"));
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    CHECK(entry.path().string().find(".part-") == std::string::npos);
  }
}

TEST_CASE("statistics of the weights' inputs make products err less") {
  const temporary_directory folder;
  const auto path = [&](const char* name) { return (folder / name).string(); };
  std::mt19937_64 random(tetromino_test::seed());
  std::normal_distribution<float> normal;
  const auto numbers = [&](std::size_t n) {
    std::vector<float> out(n);
    for (float& v : out) v = normal(random);
    return out;
  };
  constexpr std::size_t experts = 3, rows = 32, cols = 64;
  auto writer = io::safetensors_writer::create(
      path("in"), std::vector<io::tensor_declaration>{{"moe.up.weight", io::dtype::F32, {experts, rows, cols}},
                                                      {"attn.o.weight", io::dtype::F32, {rows, cols}}});
  writer.append_values<float>("moe.up.weight", numbers(experts * rows * cols));
  writer.append_values<float>("attn.o.weight", numbers(rows * cols));
  writer.finish();

  input_statistics seen;
  seen.name("moe.up.weight", "moe");
  seen.name("attn.o.weight", "attn");
  const std::vector<float> mix = numbers(8 * cols);
  const auto inputs = [&](std::size_t n) {  // eight causes and noise
    std::vector<float> x = numbers(n * cols);
    for (std::size_t r = 0; r < n; ++r) {
      for (std::size_t c = 0; c < 8; ++c) {
        const float cause = normal(random);
        for (std::size_t k = 0; k < cols; ++k) x[r * cols + k] += 2 * cause * mix[c * cols + k];
      }
    }
    return x;
  };
  for (std::size_t e = 0; e < experts; ++e) seen.input("moe", experts, cols).add(e, inputs(e == 0 ? 0 : 300));
  const std::vector<float> original = inputs(300);
  std::vector<float> met = original;  // the layers before are packed
  for (float& v : met) v *= 0.995f;
  seen.input("attn", 1, cols).add(0, original, met);
  seen.save(path("statistics"));
  const auto read = input_statistics::load(path("statistics"));
  CHECK(read.column_weights("moe.up.weight", 1, experts, cols, 16) ==
        seen.column_weights("moe.up.weight", 1, experts, cols, 16));
  CHECK(read.of("attn.o.weight", 0, 1, cols).drift() == seen.of("attn.o.weight", 0, 1, cols).drift());
  CHECK(read.of("moe.up.weight", 0, experts, cols).drift().size() == 0);
  CHECK(read.of("moe.up.weight", 0, experts, cols).rows() == input_statistics::borrowed_rows(cols));

  for (const char* name : {"mxfp4-32/min-error/mbs-search@32/gptq", "nvfp4/min-error/hadamard-16"}) {
    CAPTURE(name);
    const auto run = run_program(
        "quantize_checkpoint",
        {path("in"), path("out.safetensors"), "--recipe", name, "--statistics", path("statistics")}, folder.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const auto again = run_program(
        "verify_checkpoint", {path("in"), path("out.safetensors"), "--statistics", path("statistics")}, folder.path());
    CHECK_THAT(again.out, contains("packing again gives the same bytes"));
    CHECK(run_program("verify_checkpoint", {path("in"), path("out.safetensors")}, folder.path()).exit_code == 0);
  }

  // weights and products, in dB
  const auto compared = run_program("quantize_checkpoint",
                                    {path("in"), "--compare", "--statistics", path("statistics"), "--recipe",
                                     "mxfp4-32/oas", "--recipe", "mxfp4-32/oas/gptq"},
                                    folder.path());
  std::istringstream lines(compared.out);
  std::map<std::string, double> products;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string recipe;
    double bits = 0, qsnr = 0;
    if (words >> recipe >> bits >> qsnr) words >> products[recipe];
  }
  CHECK(products.at("mxfp4-32/oas/gptq") > products.at("mxfp4-32/oas") + 3);

  const auto fails = [&](const std::vector<std::string>& arguments, const std::string& message) {
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    CHECK(run.exit_code != 0);
    CHECK_THAT(run.err, contains(message));
  };
  fails({path("in"), path("none"), "--recipe", "mxfp4-32/oas/gptq"}, "needs --statistics FILE");
  fails({path("in"), path("statistics"), "--statistics", path("statistics")},
        "expected another file than the statistics");
  fails({model, path("none"), "--statistics", path("statistics")},
        "no calibration statistics for the weights layers.0");
  fails({path("in"), path("none"), "--statistics", path("in")}, "no statistics in it");
}

TEST_CASE("statistics of a directory weigh errors and give activations their scales, expert by expert") {
  constexpr std::size_t cols = 64;
  const temporary_directory folder;
  const auto path = [&](const char* name) { return (folder / name).string(); };
  const std::string layer = "model.layers.0.", experts = layer + "mlp.experts.";
  std::vector<model_tensor> tensors = {{layer + "self_attn.q_proj.weight", {32, cols}},
                                       {layer + "mlp.gate.weight", {2, cols}}};
  for (const std::string expert : {"0.", "1."}) {
    for (const char* part : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
      tensors.push_back({experts + expert + part, {cols, cols}});
    }
  }
  write_model(folder / "in", {{"hidden_size", cols}, {"num_experts", 2}}, tensors);
  std::mt19937_64 random(tetromino_test::seed());
  std::normal_distribution<float> normal;
  input_statistics seen;
  const auto add = [&](const std::string& input, std::size_t which, std::size_t matrices, float largest) {
    std::vector<float> rows(cols * 100);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = (i % cols < 4 ? 0.1f : 0.001f) * normal(random);
    rows.front() = -largest;
    seen.input(input, matrices, cols).add(which, rows);
  };
  seen.name(layer + "self_attn.q_proj.weight", "q");
  add("q", 0, 1, 3.0f);
  for (const char* part : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {  // of the stack
    seen.name(experts + part, std::string(part) == "down_proj.weight" ? "down" : "in");
  }
  for (std::size_t e = 0; e < 2; ++e) {
    add("in", e, 2, 5.0f + static_cast<float>(e));
    add("down", e, 2, 7.0f + static_cast<float>(e));
  }
  seen.save(path("statistics"));
  const std::map<std::string, float> largest = {{layer + "self_attn.q_proj", 3.0f},
                                                {experts + "0.gate_proj", 5.0f},
                                                {experts + "1.up_proj", 6.0f},
                                                {experts + "0.down_proj", 7.0f},
                                                {experts + "1.down_proj", 8.0f}};
  for (const auto& [layout, end] : std::map<std::string, std::string>{{"modelopt", ".input_scale"},
                                                                      {"compressed-tensors", ".input_global_scale"}}) {
    CAPTURE(layout);
    const std::string out = layout, fed = layout + "-fed";
    const auto pack = [&](const char* to, const std::string& recipe) {
      return run_program(
          "quantize_checkpoint",
          {path("in"), path(to), "--recipe", recipe, "--layout", out, "--statistics", path("statistics")},
          folder.path());
    };
    for (const auto& [to, recipe] :
         std::map<std::string, std::string>{{out, "nvfp4/min-error"}, {fed, "nvfp4/min-error/gptq"}}) {
      const auto run = pack(to.c_str(), recipe);
      INFO(run.err);
      REQUIRE(run.exit_code == 0);
      const auto verified = run_program(
          "verify_checkpoint", {path("in"), path(to.c_str()), "--statistics", path("statistics")}, folder.path());
      CAPTURE(verified.err);
      CHECK_THAT(verified.out, contains("packing again gives the same bytes"));
    }
    const auto written = read_model(folder / out);
    for (const auto& [module, amax] : largest) {
      CAPTURE(module);
      const float stored = first_float(written.at(module + end));
      const float scale = layout == "modelopt" ? stored : 1.0f / stored;
      CHECK(std::abs(scale / (amax / (6.0f * 448.0f)) - 1) < 1e-6f);
    }
    CHECK(written.count(layer + "mlp.gate.input_scale") == 0);
    const std::string codes = layout == "modelopt" ? ".weight" : ".weight_packed";
    CHECK(written.at(experts + "1.up_proj" + codes).bytes !=
          read_model(folder / fed).at(experts + "1.up_proj" + codes).bytes);
  }
  CHECK(read_json(folder / "modelopt/config.json")["quantization_config"]["quant_algo"] == "NVFP4");

  const auto chosen =
      run_program("quantize_checkpoint",
                  {path("in"), path("chosen"), "--bits", "5.5", "--candidates", "nvfp4/amax,nvfp4/amax/gptq,keep",
                   "--layout", "modelopt", "--statistics", path("statistics"), "--json"},
                  folder.path());
  INFO(chosen.err);
  REQUIRE(chosen.exit_code == 0);
  // by products with the inputs, error feedback wins wherever a weight is packed
  const auto tensors_chosen = nlohmann::json::parse(chosen.out).at("tensors");
  std::set<std::string> recipes;
  for (const auto& tensor : tensors_chosen) {
    if (tensor["packed"].get<bool>()) recipes.insert(tensor["recipe"].get<std::string>());
  }
  CHECK(recipes == std::set<std::string>{"nvfp4/amax/gptq"});
  const auto again =
      run_program("verify_checkpoint", {path("in"), path("chosen"), "--statistics", path("statistics")}, folder.path());
  CHECK_THAT(again.out, contains("packing again gives the same bytes"));

  rewrite(folder / "statistics",
          [](reference::stored_file& f) { f.metadata.erase("model.layers.0.self_attn.q_proj.weight"); });
  const auto unknown = run_program(
      "quantize_checkpoint",
      {path("in"), path("none"), "--recipe", "nvfp4/amax", "--layout", "modelopt", "--statistics", path("statistics")},
      folder.path());
  CHECK(unknown.exit_code == 1);
  CHECK_THAT(unknown.err, contains("no calibration statistics for the weights model.layers.0.self_attn.q_proj.weight"));
  CHECK_FALSE(std::filesystem::exists(folder / "none"));
}

TEST_CASE("bits where they matter: candidates for every weight within a budget") {
  const temporary_directory folder;
  const auto run = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), model);
    const auto ran = run_program("quantize_checkpoint", arguments, folder.path());
    CAPTURE(ran.err);
    REQUIRE(ran.exit_code == 0);
    return ran.out;
  };
  double before = 1e300;
  for (const std::string bits : {"4.26", "4.4", "4.6", "5"}) {
    CAPTURE(bits);
    const std::string out = (folder / (bits + ".safetensors")).string();
    const std::vector<std::string> wanted = {out, "--bits", bits, "--candidates", "mxfp4-32/oas,nvfp4/amax,keep"};
    auto dry = wanted;
    dry.insert(dry.end(), {"--dry-run", "--json", "--threads", "1"});
    const auto planned = nlohmann::json::parse(run(dry));
    CHECK_FALSE(std::filesystem::exists(out));
    auto as_json = wanted;
    as_json.push_back("--json");
    const auto written = nlohmann::json::parse(run(as_json));
    CHECK(planned["budget"] == written["budget"]);
    CHECK(written["budget"]["bits"] == std::stod(bits));
    CHECK(written["budget"]["candidates"] == nlohmann::json{"mxfp4-32/oas", "nvfp4/amax", "keep"});
    CHECK(written["budget"]["weights"] == 3407872);
    CHECK(written["budget"]["noise_to_signal"].get<double>() < before);
    before = written["budget"]["noise_to_signal"].get<double>();

    std::set<std::string> recipes;
    std::size_t stored = 0, weights = 0;
    for (std::size_t i = 0; i < written["tensors"].size(); ++i) {
      const auto &tensor = written["tensors"][i], &plan = planned["tensors"][i];
      for (const char* key : {"packed", "recipe", "why", "bits"})
        CHECK(tensor.value(key, nlohmann::json()) == plan.value(key, nlohmann::json()));
      const bool is_chosen = tensor["packed"].get<bool>() || tensor["why"] == "chosen, within the budget of bits";
      if (!is_chosen) continue;
      recipes.insert(tensor.value("recipe", "keep"));
      stored += tensor["bits"].get<std::size_t>();
      std::size_t elements = 1;
      for (const auto& size : tensor["shape"]) elements *= size.get<std::size_t>();
      weights += elements;
    }
    CHECK(weights == 3407872);
    CHECK(static_cast<double>(stored) / static_cast<double>(weights) == written["budget"]["reached"].get<double>());
    CHECK(static_cast<double>(stored) <= std::stod(bits) * static_cast<double>(weights));
    CHECK(recipes.size() > 1);
    const auto verified = run_program("verify_checkpoint", {model, out}, folder.path());
    CAPTURE(verified.err);
    CHECK(verified.exit_code == 0);
    CHECK_THAT(verified.out, contains("packing again gives the same bytes"));
  }
  const auto factors = nlohmann::json::parse(
      run({"--dry-run", "--json", "--bits", "4.4", "--candidates", "mxfp4-32/floor,mxfp4-32/floor/mbs-search@8x2"}));
  CHECK(factors["budget"]["reached"].get<double>() <= 4.4);
  CHECK(factors["budget"]["reached"].get<double>() > 4.35);
  const auto table = run({"--dry-run", "--bits", "5", "--candidates", "mxfp4-32/oas,keep"});
  CHECK_THAT(table, contains("--bits 5: 4.9"));
  CHECK_THAT(table, contains("kept       13   212992       16.000"));
}

TEST_CASE("bits where they matter: what cannot be chosen is said before any work") {
  const temporary_directory folder;
  const std::string out = (folder / "out").string();
  const auto fails = [&](std::vector<std::string> arguments, const std::string& message) {
    arguments.insert(arguments.begin(), {model, out});
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    CAPTURE(run.out, run.err);
    CHECK(run.exit_code == 2);
    CHECK_THAT(run.err, contains(message));
    CHECK_FALSE(std::filesystem::exists(out));
  };
  fails({"--bits", "4.2", "--candidates", "mxfp4-32/oas,nvfp4/amax"},
        "--bits 4.2: expected a budget of at least 4.25 bits for each weight");
  fails({"--bits", "4.5"}, "--bits requires --candidates");
  fails({"--candidates", "mxfp4-32/oas"}, "--candidates requires --bits");
  fails({"--bits", "0", "--candidates", "mxfp4-32/oas"}, "--bits");
  fails({"--bits", "4.5", "--candidates", "keep"}, "--candidates: expected a recipe besides keep");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas,nvfp5"}, "unknown format \"nvfp5\"");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas,nvfp4/amax", "--layout", "modelopt"},
        "layout modelopt stores nvfp4, not mxfp4-32");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas,nvfp4/amax", "--layout", "gpt-oss"},
        "layout gpt-oss stores mxfp4-32, not nvfp4");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas/mbs-search@8x2", "--layout", "gpt-oss"},
        "layout gpt-oss stores mxfp4-32, not mxfp4-32 with macro blocks");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas/gptq,nvfp4/amax"}, "needs --statistics FILE");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas", "--recipe", "nvfp4/amax"},
        "--recipe nvfp4/amax is for all weights: with --bits, give it to --candidates");
  const auto compared = run_program(
      "quantize_checkpoint", {model, "--compare", "--bits", "4.5", "--candidates", "mxfp4-32/oas"}, folder.path());
  CHECK(compared.exit_code == 2);
  CHECK_THAT(compared.err, contains("excludes"));
  const auto gguf = run_program("quantize_checkpoint",
                                {"in.gguf", out, "--bits", "4.5", "--candidates", "mxfp4-32/oas"}, folder.path());
  CHECK(gguf.exit_code == 2);
  CHECK_THAT(gguf.err, contains("--bits is for safetensors"));
}

TEST_CASE("a model with a shard missing or cut is refused in one line") {
  const temporary_directory folder;
  const auto refused = [&](const std::string& message, const auto& change) {
    std::filesystem::remove_all(folder / "in");
    write_model(folder / "in", {{"hidden_size", 64}},
                {{"model.layers.0.mlp.up_proj.weight", {64, 64}}, {"model.layers.0.mlp.down_proj.weight", {64, 64}}});
    change(folder / "in/model-00002-of-00002.safetensors");
    for (const char* more : {"--quiet", "--dry-run"}) {
      const auto run = run_program("quantize_checkpoint", {(folder / "in").string(), (folder / "out").string(), more},
                                   folder.path());
      CHECK(run.exit_code == 1);
      CHECK_THAT(run.err, contains("model-00002-of-00002.safetensors"));
      CHECK_THAT(run.err, contains(message));
      CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
      CHECK_FALSE(std::filesystem::exists(folder / "out"));
    }
  };
  refused("No such file", [](const fs::path& shard) { fs::remove(shard); });
  refused("cut short", [](const fs::path& shard) { fs::resize_file(shard, fs::file_size(shard) - 1); });
  refused("found", [](const fs::path& shard) { fs::resize_file(shard, 4); });
  refused("found a directory", [](const fs::path& shard) {
    fs::remove(shard);
    fs::create_directory(shard);
  });
}

TEST_CASE("patterns keep tensors as they are") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  REQUIRE(run_program("quantize_checkpoint", {model, out, "--keep", "*.attn.*"}, folder.path()).exit_code == 0);
  const auto written = reference::read_safetensors(out);
  CHECK(written.tensors.count("layers.0.attn.q.weight") == 1);
  CHECK(written.tensors.count("layers.0.moe.up.weight") == 0);
}

TEST_CASE("a gigabyte passes through bounded memory, and stops at a signal") {
  const temporary_directory folder;
  const std::string in = (folder / "in.safetensors").string(), out = (folder / "out.safetensors").string();
  constexpr std::size_t rows = 1 << 14, cols = 1 << 14, tensors = 2;  // 512 MiB of bfloat16 each
  {
    std::vector<io::tensor_declaration> declarations;
    for (std::size_t t = 0; t < tensors; ++t)
      declarations.push_back({"layers." + std::to_string(t) + ".mlp.fc1.weight", io::dtype::BF16, {rows, cols}});
    auto writer = io::safetensors_writer::create(in, declarations);
    std::vector<tetromino::bfloat16> piece(cols * 128);
    std::uint64_t state = tetromino_test::seed();
    for (auto& value : piece) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      value = tetromino::bfloat16(static_cast<float>(static_cast<std::int64_t>(state) >> 40) * 0x1p-23f);
    }
    for (const auto& d : declarations) {
      for (std::size_t r = 0; r < rows; r += 128) writer.append_values<tetromino::bfloat16>(d.name, piece);
    }
    writer.finish();
  }
  std::filesystem::create_directories(folder / "m");
  std::filesystem::create_hard_link(in, folder / "m/model.safetensors");
  store_text(folder / "m/config.json", "{}");
  const auto is_clean = [&] {
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
      const std::string name = entry.path().filename().string();
      if (name != "in.safetensors" && name != "m" && name != "stdout" && name != "stderr") return false;
    }
    return true;
  };
  const std::vector<std::vector<std::string>> works = {{in, out}, {(folder / "m").string(), (folder / "out").string()}};
  for (const auto& work : works) {
    for (const auto& [signal, number] : std::map<std::string, int>{{"TERM", 15}, {"HUP", 1}, {"INT", 2}}) {
      for (const std::string after : {"0.05", "0.3"}) {
        CAPTURE(signal, after, work.front());
        const auto stopped =
            run_command({"timeout", "--preserve-status", "-s", signal, after, program_path("quantize_checkpoint"),
                         work.front(), work.back(), "--recipe", "nvfp4/min-error", "--threads", "1"},
                        folder.path());  // which takes longer than that
        // before it is at work, a signal ends it at once
        CHECK(stopped.exit_code == 128 + number);
        if (after == "0.3") CHECK_THAT(stopped.err, contains("stopped by a signal; nothing was written"));
        CHECK(is_clean());
      }
    }
    const std::string limited = "ulimit -f 900; exec " + program_path("quantize_checkpoint") + " " + work.front() +
                                " " + work.back() + " --recipe mxfp4-32/oas";
    const auto full = run_command({"sh", "-c", limited}, folder.path());
    CHECK(full.exit_code == 1);
    CHECK_THAT(full.err, contains("File too large"));
    CHECK(is_clean());
  }
  // more threads than most machines have cores, each of which needs memory of its own
  const auto run =
      run_program("quantize_checkpoint", {in, out, "--recipe", "mxfp4-32/oas", "--threads", "32"}, folder.path());
  INFO(run.err);
  REQUIRE(run.exit_code == 0);
  constexpr std::size_t slice = 4u << 20;  // what the program converts at a time
  CAPTURE(run.peak_bytes);
  if (tetromino_test::measures_memory) CHECK(run.peak_bytes < (64u << 20) + 2 * slice);
  CHECK(std::filesystem::file_size(out) > (tensors * rows * cols) * 17 / 32);
  const auto measured = run_program(
      "quantize_checkpoint",
      {in, "--dry-run", "--bits", "4.4", "--candidates", "mxfp4-32/oas,nvfp4/amax", "--threads", "32"}, folder.path());
  CHECK(measured.exit_code == 0);
  CAPTURE(measured.peak_bytes);
  if (tetromino_test::measures_memory) CHECK(measured.peak_bytes < (64u << 20) + 2 * slice);
  const auto verified = run_program("verify_checkpoint", {in, out, "--threads", "32"}, folder.path());
  CHECK(verified.exit_code == 0);
  CAPTURE(verified.peak_bytes);
  if (tetromino_test::measures_memory) CHECK(verified.peak_bytes < (64u << 20) + 2 * slice);
}

TEST_CASE("matrices of two gigabytes, beside cp", "[.slow]") {
  const temporary_directory folder;
  write_large_model(folder / "in", 15, false);
  beside_cp(folder, false, 3);
}

TEST_CASE("stacks of two gigabytes, stored against the grain, beside cp", "[.slow]") {
  const temporary_directory folder;
  write_large_model(folder / "in", 4, true);
  beside_cp(folder, true, 3);
}

TEST_CASE("twenty gigabytes in shards, beside cp", "[.slow]") {
  const temporary_directory folder;
  write_large_model(folder / "in", 150, false);
  beside_cp(folder, false, 1);
}
