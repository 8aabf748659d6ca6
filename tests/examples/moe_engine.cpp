#include "check.hpp"

#include "examples/program.hpp"

#include <tetromino/io/safetensors.hpp>
#include <tetromino/moe/placement.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <tuple>

namespace {

namespace io = tetromino::io;
using tetromino_test::contains;
using tetromino_test::data_file;
using tetromino_test::outcome;
using tetromino_test::program_path;
using tetromino_test::run_command;
using tetromino_test::temporary_directory;
using words = std::vector<std::string>;

const std::string model = data_file("moe-16x2.safetensors").string();
const std::string text = data_file("moe-16x2.heldout.safetensors").string();

/// Runs a command on some ranks, for two minutes at most: 124 says that it hung.
outcome on_ranks(std::size_t ranks, const words& command, const temporary_directory& folder) {
  for (const auto& [name, value] : {std::pair{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                    {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                                    {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
                                    {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"},
                                    {"OMPI_MCA_mpi_yield_when_idle", "1"},  // other tests run beside this one
                                    {"PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"}}) {
    setenv(name, value, 1);
  }
  words all{"timeout", "-k", "10", "120"};
  if (ranks > 0) all.insert(all.end(), {"mpirun", "-n", std::to_string(ranks)});
  all.insert(all.end(), command.begin(), command.end());
  return run_command(all, folder.path());
}

outcome engine(std::size_t ranks, const words& options, const temporary_directory& folder) {
  words command{program_path("moe_engine"), model, text};
  command.insert(command.end(), options.begin(), options.end());
  return on_ranks(ranks, command, folder);
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The numbers of the line that begins with `label`.
std::vector<std::uint64_t> line_of(const std::string& out, const std::string& label) {
  std::istringstream lines(out);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(label, 0) != 0) continue;
    std::istringstream rest(line.substr(label.size()));
    std::vector<std::uint64_t> numbers;
    for (std::uint64_t n; rest >> n;) numbers.push_back(n);
    return numbers;
  }
  return {};
}

struct setting {
  std::size_t ranks;
  words options;
};
const std::vector<setting> settings{
    {0, {}},
    {1, {"--batch", "300"}},
    {2, {"--nodes", "2"}},
    {4, {"--nodes", "2", "--placement", "balanced", "--replicas", "2"}},
    {4, {"--nodes", "2", "--placement", "local", "--replicas", "1", "--batch", "500"}},
    {4, {"--nodes", "4", "--placement", "local", "--route", "per-expert"}},
    {8, {"--nodes", "2", "--placement", "balanced", "--replicas", "3", "--route", "per-rank"}},
};

std::string name_of(const setting& s) {
  std::string out = std::to_string(s.ranks) + " ranks";
  for (const auto& o : s.options) out += " " + o;
  return out;
}

TEST_CASE("moe_engine: float32 gives the losses of the reference, on any ranks and placement") {
  const auto file = io::safetensors_file::open(text);
  const auto reference = file["reference_nll"].copy_as<float>();
  std::string first;
  for (const setting& s : settings) {
    INFO(name_of(s));
    const temporary_directory folder;
    words options{"--documents", "8", "--losses", (folder / "losses").string()};
    options.insert(options.end(), s.options.begin(), s.options.end());
    const outcome run = engine(s.ranks, options, folder);
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const std::string losses = read(folder / "losses");
    std::istringstream lines(losses);
    std::size_t document = 0, count = 0;
    for (double loss; lines >> document >> loss; ++count) {
      CHECK(loss == Approx(static_cast<double>(reference.at(document))).epsilon(1e-4));
    }
    CHECK(count == 8);
    if (first.empty()) first = losses;
    CHECK(losses == first);
    if (s.ranks < 2) continue;
    const auto measured = line_of(run.out, "measured");
    REQUIRE(measured.size() == 2);
    if (s.options.back() != "per-rank") CHECK(line_of(run.out, "predicted") == measured);
  }
}

/// The 4-bit losses of these settings, which are to be the same to the last bit.
void check_four_bits(const std::string& recipe, const std::vector<setting>& some) {
  std::string first;
  for (const setting& s : some) {
    INFO(recipe << ", " << name_of(s));
    const temporary_directory folder;
    words options{"--documents",   "4",    "--weights", recipe,
                  "--activations", recipe, "--losses",  (folder / "losses").string()};
    options.insert(options.end(), s.options.begin(), s.options.end());
    const outcome run = engine(s.ranks, options, folder);
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const std::string losses = read(folder / "losses");
    if (first.empty()) first = losses;
    CHECK(losses == first);
  }
  CHECK(std::count(first.begin(), first.end(), '\n') == 4);
}

TEST_CASE("moe_engine: 4-bit losses do not depend on ranks and placement, to the last bit") {
  // each setting under one of the recipes
  check_four_bits("nvfp4/four-over-six", {settings[0], settings[2], settings[3], settings[5]});
  check_four_bits("mxfp4-16/oas/mbs-static", {settings[1], settings[4], settings[6]});
}

TEST_CASE("moe_engine: 4-bit losses in every setting under either recipe", "[.slow]") {
  for (const char* recipe : {"nvfp4/four-over-six", "mxfp4-16/oas/mbs-static"}) check_four_bits(recipe, settings);
}

TEST_CASE("moe_engine: weights move between ranks while documents are served, and losses stay to the last bit") {
  const words options{"--documents", "24", "--weights", "nvfp4/four-over-six", "--activations", "nvfp4/four-over-six"};
  std::string plain;
  for (const std::size_t ranks : {std::size_t{0}, std::size_t{4}}) {
    INFO(ranks << " ranks");
    const temporary_directory folder;
    words all = options;
    all.insert(all.end(), {"--losses", (folder / "losses").string(), "--json"});
    if (ranks > 0) {
      all.insert(all.end(), {"--nodes", "2", "--replicas", "3", "--rebalance", "6", "--batch", "500"});
      all.insert(all.end(), {"--drain", "1", "--rejoin"});  // rank 1 leaves after 6 documents, and is back for the last
    }
    const outcome run = engine(ranks, all, folder);
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const std::string losses = read(folder / "losses");
    CHECK(std::count(losses.begin(), losses.end(), '\n') == 24);
    if (plain.empty()) plain = losses;
    CHECK(losses == plain);
    if (ranks == 0) continue;
    const auto report = nlohmann::json::parse(run.out);
    CHECK(report["weights"]["measured"] == report["weights"]["planned"]);
    CHECK(report["weights"]["measured"]["between_nodes"] > 0);
    std::size_t plans = 0, layers = 0, moves = 0;
    for (const auto& window : report["windows"]) {
      plans += window["verdict"] == "new plan" ? 1u : 0u;
      layers += window["layers_switched"].get<std::size_t>();
      moves += window["experts_to_move"].get<std::size_t>();
    }
    CHECK(report["windows"].size() == 4);
    CHECK(plans > 0);
    CHECK(layers > 0);
    const auto moved = report["weights"]["measured"];
    CHECK(moved["between_nodes"].get<std::size_t>() + moved["inside_nodes"].get<std::size_t>() ==
          moves * report["bytes_per_expert"].get<std::size_t>());
    const auto rank_1 = [&](std::size_t window, const char* what) {
      return report["windows"][window][what][1].get<std::size_t>();
    };
    CHECK(report["windows"][0]["verdict"] == "new plan");
    CHECK(rank_1(0, "experts_on_rank") > 0);
    for (const std::size_t window : {1u, 2u}) CHECK(rank_1(window, "documents_on_rank") == 0);
    CHECK(rank_1(2, "experts_on_rank") == 0);
    CHECK(report["windows"][2]["verdict"] == "new plan");
    for (const char* what : {"documents_on_rank", "experts_on_rank"}) {
      for (const std::size_t window : {0u, 3u}) CHECK(rank_1(window, what) > 0);
    }
  }
}

TEST_CASE("moe_engine: a placement can be read from a file") {
  const temporary_directory folder;
  const auto reversed = [](std::size_t layers, std::size_t experts) {
    tetromino::moe::placement p(layers, experts, experts);
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::size_t e = 0; e < experts; ++e) p.layer(l)[e] = static_cast<std::int32_t>(experts - 1 - e);
    }
    return to_text(p);
  };
  const auto write = [&](const std::string& name, const std::string& content) {
    std::ofstream(folder / name) << content;
    return (folder / name).string();
  };
  CHECK(engine(2, {"--documents", "2", "--placement", write("fits", reversed(4, 16))}, folder).exit_code == 0);

  for (const auto& [name, content, says] :
       {std::array<std::string, 3>{"other_model", reversed(3, 16), "expected a placement of 4 layers"},
        {"other_cluster", to_text(tetromino::moe::placement(4, 16, 20)),
         "expected 16 slots as in the topology, got 20"},
        {"incomplete", to_text(tetromino::moe::placement(4, 16, 16)), "expected each expert at least once"},
        {"no_placement", "what is this", "placement: expected"}}) {
    const outcome run = engine(2, {"--placement", write(name, content)}, folder);
    INFO(name << ": " << run.err);
    CHECK(run.exit_code != 0);
    CHECK(run.exit_code != 124);
    CHECK_THAT(run.err, contains(says));
  }
}

/// The message comes once, from one rank; every rank ends.
/// Status 2 is for mistakes in the options alone.
void check_refused(std::size_t ranks, const words& command, const std::string& says, int status = 1) {
  const temporary_directory folder;
  const outcome run = on_ranks(ranks, command, folder);
  INFO(run.err);
  CHECK(run.exit_code == status);
  const std::size_t at = run.err.find("moe_engine: ");
  REQUIRE(at != std::string::npos);
  CHECK(run.err.find("moe_engine: ", at + 1) == std::string::npos);
  CHECK_THAT(run.err, contains(says));
}

TEST_CASE("moe_engine: what cannot be run is refused by one rank, and all end") {
  const temporary_directory folder;
  const std::string program = program_path("moe_engine");
  for (const std::size_t ranks : {0u, 4u}) {
    check_refused(ranks, {program, model, text, "--weights", "nvfp4/floor"}, "nvfp4 has no rule floor", 2);
    check_refused(ranks, {program, model, text, "--activations", "nvfp4/amax"}, "need weights in 4 bits", 2);
    check_refused(ranks,
                  {program, model, text, "--weights", "mxfp4-32/oas", "--activations", "mxfp4-32/oas/hadamard-32"},
                  "rotated alike", 2);
    check_refused(ranks, {program, model, text, "--nodes", "3"}, "--nodes: expected a number that divides", 2);
    check_refused(ranks, {program, (folder / "none").string(), text}, "none");

    const std::string whole = read(model), cut = (folder / "cut").string();
    std::ofstream(cut, std::ios::binary) << whole.substr(0, whole.size() / 2);
    check_refused(ranks, {program, cut, text}, cut);
    check_refused(ranks, {program, text, text}, "not a model of this form");
    check_refused(ranks, {program, model, model}, "expected a tensor");
  }

  const words leaving{program, model, text, "--nodes", "2", "--rebalance", "6", "--drain"};
  for (const auto& [rank, says, status] :
       {std::tuple{"2", "--drain: expected a rank below 2, got 2", 2},
        {"1", "--drain 1: expected slots for 16 experts on the other ranks, got 8", 1}}) {
    words command = leaving;
    command.emplace_back(rank);
    check_refused(2, command, says, status);
  }

  const std::string small = (folder / "small").string();
  io::safetensors_metadata metadata{
      {"architecture", "moe-lm"}, {"layers", "1"},       {"heads", "1"},    {"hidden", "2"},
      {"experts", "2"},           {"top_k", "1"},        {"vocab", "4096"}, {"norm_eps", "1e-5"},
      {"rope_base", "100"},       {"expert_hidden", "2"}};
  auto file = io::safetensors_writer::create(small, {}, metadata);
  file.finish();
  check_refused(3, {program, small, text}, "expected at most 2 ranks, one for each expert of the model, got 3");
}

/// `count` documents of the held-out text, of all domains alike, as a file of their own; those with even numbers.
std::string some_documents(std::size_t count, const std::filesystem::path& path) {
  const auto file = io::safetensors_file::open(text);
  const auto offsets = file["document_offsets"].copy_as<std::int64_t>();
  const auto tokens = file["tokens"].copy_as<std::int16_t>();
  const auto domain = file["domain"].copy_as<std::uint8_t>();
  const auto losses = file["reference_nll"].copy_as<float>();
  std::vector<std::int64_t> part_offsets{0};
  std::vector<std::int16_t> part_tokens;
  std::vector<std::uint8_t> part_domain;
  std::vector<float> part_losses;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t d = i * domain.size() / count / 2 * 2;
    part_tokens.insert(part_tokens.end(), tokens.begin() + offsets[d], tokens.begin() + offsets[d + 1]);
    part_offsets.push_back(static_cast<std::int64_t>(part_tokens.size()));
    part_domain.push_back(domain[d]);
    part_losses.push_back(losses[d]);
  }
  const std::vector<io::tensor_declaration> parts{{"document_offsets", io::dtype::I64, {count + 1}},
                                                  {"reference_nll", io::dtype::F32, {count}},
                                                  {"tokens", io::dtype::I16, {part_tokens.size()}},
                                                  {"domain", io::dtype::U8, {count}}};
  auto out = io::safetensors_writer::create(path, parts, file.metadata());
  out.append_values<std::int64_t>("document_offsets", part_offsets);
  out.append_values<float>("reference_nll", part_losses);
  out.append_values<std::int16_t>("tokens", part_tokens);
  out.append_values<std::uint8_t>("domain", part_domain);
  out.finish();
  return path.string();
}

double sum_of(const std::string& losses) {
  std::istringstream lines(losses);
  double sum = 0;
  std::size_t document = 0;
  for (double loss; lines >> document >> loss;) sum += loss;
  return sum;
}

TEST_CASE("moe_engine: calibrated weights do not depend on ranks and placement, and lose less") {
  const temporary_directory folder;
  // Judged on the documents that it is calibrated with, weights lose less on every CPU; on others, four are too few for
  // that to be sure.
  const std::string part = some_documents(4, folder / "part"), same = some_documents(4, folder / "same");
  const auto losses = [&](std::size_t ranks, const words& more) {
    words command{program_path("moe_engine"), model, same, "--losses", (folder / "losses").string()};
    command.insert(command.end(), more.begin(), more.end());
    const outcome run = on_ranks(ranks, command, folder);
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    return read(folder / "losses");
  };
  const std::string plain = "mxfp4-32/floor", fed = "mxfp4-32/floor/hadamard-32/gptq";
  const words calibrated{"--calibrate", part, "--weights", fed, "--statistics", (folder / "statistics").string()};
  const std::string alone = losses(0, calibrated), statistics = read(folder / "statistics");
  CHECK(!statistics.empty());
  words spread = calibrated;
  spread.insert(spread.end(), {"--nodes", "2", "--placement", "local", "--replicas", "1"});
  CHECK(losses(2, spread) == alone);
  CHECK(read(folder / "statistics") == statistics);
  const double least = sum_of(losses(0, {})), most = sum_of(losses(0, {"--weights", plain}));
  CHECK(sum_of(alone) < most);
  CHECK(sum_of(alone) > least);

  // documents of one file: judged on one half, calibrated on the other
  const words halves{program_path("moe_engine"), model, part, "--calibrate", part, "--weights", "mxfp4-32/min-error"};
  words command = halves;
  command.insert(command.end(), {"--half", "even"});
  CHECK(on_ranks(2, command, folder).exit_code == 0);
  check_refused(2, halves, "--half even or --half odd");
  check_refused(2, {program_path("moe_engine"), model, text, "--weights", fed}, "need --calibrate TEXT", 2);
  check_refused(2, {program_path("moe_engine"), model, some_documents(1, folder / "one"), "--half", "odd"},
                "no documents in this half");
}

TEST_CASE("moe_engine: when a rank dies, the others do not wait for it") {
  const temporary_directory folder;
  // the second rank kills itself after a moment; `exec` keeps the process
  const std::string dies =
      "if [ \"${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-1}}\" = 1 ]; then (sleep 0.7; kill -9 $$) & fi; exec \"$0\" \"$@\"";
  const outcome run = on_ranks(4,
                               {"sh", "-c", dies, program_path("moe_engine"), model, text, "--weights", "mxfp4-32/oas",
                                "--activations", "mxfp4-32/oas"},
                               folder);
  INFO(run.err);
  CHECK(run.exit_code != 0);
  CHECK(run.exit_code != 124);
}

TEST_CASE("moe_engine: ranks that were told different things end with one line, soon") {
  const temporary_directory folder;
  const std::string program = program_path("moe_engine"), other = some_documents(2, folder / "other");
  std::ofstream(folder / "a") << to_text(tetromino::moe::placement(4, 16, 16));
  std::ofstream(folder / "b") << to_text(tetromino::moe::placement(4, 16, 16)) << "\n";
  const std::string a = (folder / "a").string(), b = (folder / "b").string();
  struct disagreement {
    words here, there;
    std::string says;
  };
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<disagreement> all{
      {{"--nodes", "1"}, {"--nodes", "2"}, "--nodes: expected the same on every rank"},
      {{"--placement", "local"}, {"--placement", "balanced"}, "--placement: expected the same on every rank"},
      {{"--placement", a}, {"--placement", b}, "--placement: expected the same on every rank"},
      {{"--weights", "mxfp4-32/oas"}, {"--weights", "mxfp4-32/floor"}, "--weights: expected the same on every rank"},
      {{"--route", "per-rank"}, {"--route", "per-node"}, "--route: expected the same on every rank"},
      {{"--batch", "100"}, {"--batch", "101"}, "--batch: expected the same on every rank"},
      {{"--losses", (folder / "losses").string()}, {}, "--losses: expected the same on every rank"},
      {{"--compare"}, {}, "--compare: expected the same on every rank"}};
  for (const auto& [here, there, says] : all) {
    INFO(says);
    words command{program, model, text};
    command.insert(command.end(), here.begin(), here.end());
    command.insert(command.end(), {":", "-n", "1", program, model, text});
    command.insert(command.end(), there.begin(), there.end());
    check_refused(1, command, says);
  }
  check_refused(1, {program, model, text, ":", "-n", "1", program, model, other}, "HELDOUT: expected the same");
  // one rank's bad argument
  const outcome bad = on_ranks(1, {program, model, text, ":", "-n", "1", program, model, text, "--no-such"}, folder);
  CHECK(bad.exit_code == 2);
  CHECK_THAT(bad.err, contains("--no-such"));
  // mpirun's own start is most of it
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  CHECK(seconds < 10.0 * static_cast<double>(all.size() + 2));
}

TEST_CASE("moe_engine: no output replaces an input, and what cannot be written is refused before the work") {
  const temporary_directory folder;
  const std::string program = program_path("moe_engine"), own = (folder / "model").string();
  std::filesystem::copy_file(model, own);
  const std::string part = some_documents(2, folder / "part"), out = (folder / "out").string();
  std::filesystem::create_symlink("model", folder / "link");
  check_refused(0, {program, own, part, "--losses", own}, "expected another file than MODEL", 2);
  check_refused(2, {program, own, part, "--losses", (folder / "link").string()}, "expected another file than MODEL", 2);
  check_refused(0, {program, own, part, "--losses", part}, "expected another file than HELDOUT", 2);
  check_refused(0, {program, own, text, "--calibrate", part, "--statistics", own}, "expected another file than MODEL",
                2);
  check_refused(0, {program, own, text, "--calibrate", part, "--statistics", part}, "expected another file", 2);
  check_refused(0, {program, own, text, "--calibrate", part, "--statistics", out, "--losses", out},
                "expected another file than --losses", 2);
  check_refused(2, {program, own, part, "--losses", (folder / "none" / "losses").string()}, "none/losses");
  check_refused(0, {program, own, part, "--replicas", "18446744073709551615"}, "--replicas: expected at most 16");
  CHECK(read(own) == read(model));
  CHECK(!std::filesystem::exists(out));
  const outcome full =
      run_command({"sh", "-c", "exec \"$0\" \"$@\" >/dev/full", program, own, part, "--documents", "1"}, folder.path());
  CHECK(full.exit_code == 1);
  CHECK_THAT(full.err, contains("moe_engine: "));
}

TEST_CASE("moe_engine: options are explained, and mistakes in them are told once") {
  const temporary_directory folder;
  const outcome help = engine(2, {"--help"}, folder);
  CHECK(help.exit_code == 0);
  CHECK_THAT(help.out, contains("--placement"));
  const outcome unknown = engine(2, {"--no-such-option"}, folder);
  CHECK(unknown.exit_code != 0);
  CHECK_THAT(unknown.err, contains("--no-such-option"));
}

}  // namespace
