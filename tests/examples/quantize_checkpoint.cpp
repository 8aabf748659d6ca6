#include "support/model_folder.hpp"

#include "examples/program.hpp"
#include "support/safetensors_files.hpp"

#include <tetromino/io/safetensors.hpp>

#include <cmath>
#include <sstream>

namespace {

namespace io = tetromino::io;
using namespace tetromino_test;

const std::string model = data_file("moe-16x2.safetensors").string();

}  // namespace

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
