#include "check.hpp"

#include "examples/program.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <string>

namespace {

namespace fs = std::filesystem;
using tetromino_test::contains;
using tetromino_test::outcome;
using tetromino_test::program_path;
using tetromino_test::run_command;
using tetromino_test::run_program;
using tetromino_test::temporary_directory;
using words = std::vector<std::string>;

void write(const fs::path& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }
std::string read(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Counts of four experts in two layers.
const std::string loads = "layer,expert,count\n0,0,9\n0,1,1\n0,2,4\n0,3,2\n1,0,1\n1,1,7\n1,2,2\n1,3,2\n";

/// Routing of a few requests of two domains, whose names hold what would act on a terminal.
std::string routing() {
  std::string out;
  for (int r = 0; r < 12; ++r) {
    for (int token = 0; token < 6; ++token) {
      for (int layer = 0; layer < 2; ++layer) {
        out += R"({"req_id": ")" + std::to_string(r) + R"(", "token_idx": )" + std::to_string(token) +
               R"(, "layer": )" + std::to_string(layer) + R"(, "topk_ids": [)" + std::to_string((r + layer) % 4) +
               ", " + std::to_string((r + token) % 4 == (r + layer) % 4 ? (r + token + 1) % 4 : (r + token) % 4) +
               R"(], "prefill_length": 3, "domain": ")" + (r % 2 == 0 ? "plain" : "\\u001b[31mred") + "\"}\n";
      }
    }
  }
  return out;
}

words on_two_nodes(const std::string& trace, words more) {
  words out{trace, "--nodes", "2", "--gpus", "1", "--splits", "1"};
  out.insert(out.end(), more.begin(), more.end());
  return out;
}

/// The files of a folder but for what run_command leaves.
std::size_t files_in(const fs::path& folder) {
  return static_cast<std::size_t>(std::count_if(fs::directory_iterator(folder), {}, [](const auto& entry) {
    return entry.path().filename() != "stdout" && entry.path().filename() != "stderr";
  }));
}

}  // namespace

TEST_CASE("place_experts: a trace becomes a plan and a report, and names act on no terminal") {
  const temporary_directory folder;
  write(folder / "trace", routing());
  const auto run = run_program("place_experts",
                               on_two_nodes((folder / "trace").string(), {"--plan", (folder / "plan").string(),
                                                                          "--report", (folder / "report").string()}),
                               folder.path());
  INFO(run.err);
  REQUIRE(run.exit_code == 0);
  CHECK_THAT(read(folder / "plan"), contains("slot_to_expert"));
  CHECK_THAT(read(folder / "report"), contains("</html>"));
  CHECK_THAT(run.out, contains("\\x1b[31mred"));
  CHECK(run.out.find('\033') == std::string::npos);
  CHECK(files_in(folder.path()) == 3);
}

TEST_CASE("place_experts: no output replaces an input or another output, by whatever name") {
  const temporary_directory folder;
  write(folder / "loads", loads);
  write(folder / "judge", loads);
  const std::string trace = (folder / "loads").string();
  fs::create_hard_link(folder / "loads", folder / "hard");
  fs::create_symlink("loads", folder / "soft");
  for (const auto& name : {"loads", "hard", "soft", "./loads", "../"}) {
    const std::string path = std::string(name) == "../"
                                 ? (folder.path() / ".." / folder.path().filename() / "loads").string()
                                 : (folder / name).string();
    for (const char* option : {"--plan", "--report"}) {
      INFO(option << ' ' << path);
      const auto run = run_program("place_experts", on_two_nodes(trace, {option, path}), folder.path());
      CHECK(run.exit_code == 2);
      CHECK_THAT(run.err, contains("expected another file than TRACE"));
      CHECK(read(folder / "loads") == loads);
    }
  }
  const std::string judge = (folder / "judge").string(), out = (folder / "out").string();
  const auto refused = [&](const words& options, const char* says) {
    const auto run = run_program("place_experts", on_two_nodes(trace, options), folder.path());
    CHECK(run.exit_code == 2);
    CHECK_THAT(run.err, contains(says));
  };
  refused({"--judge", judge, "--plan", judge}, "expected another file than --judge");
  refused({"--start", judge, "--report", judge}, "expected another file than --start");
  refused({"--plan", out, "--report", out}, "expected another file than --plan");
  CHECK(read(folder / "judge") == loads);
  CHECK(!fs::exists(out));
}

TEST_CASE("place_experts: outputs that cannot be written are refused before the work") {
  const temporary_directory folder;
  write(folder / "trace", routing());
  for (const std::string& path : {(folder / "none" / "plan").string(), (folder / std::string(300, 'n')).string(),
                                  folder.path().string(), std::string("/dev/null")}) {
    for (const char* option : {"--plan", "--report"}) {
      INFO(option << ' ' << path);
      const auto run =
          run_program("place_experts", on_two_nodes((folder / "trace").string(), {option, path}), folder.path());
      CHECK(run.exit_code == 1);
      CHECK(run.out.empty());
      CHECK_THAT(run.err, contains(path));
    }
  }
  // so is a plan in force that is none, or is another cluster's
  write(folder / "plan", R"({"experts":4,"layers":2,"slot_to_expert":[[0,1,2,3,0],[0,1,2,3,0]],"slots":5})");
  const auto run =
      run_program("place_experts", on_two_nodes((folder / "trace").string(), {"--start", (folder / "plan").string()}),
                  folder.path());
  CHECK(run.exit_code == 1);
  CHECK_THAT(run.err, contains("5"));
  CHECK(run.out.find("Plans compared") == std::string::npos);
  CHECK(files_in(folder.path()) == 2);
}

TEST_CASE("place_experts: a replaced output keeps its mode and its links, and is whole or as it was") {
  const temporary_directory folder;
  write(folder / "loads", loads);
  write(folder / "plan", "before");
  ::chmod((folder / "plan").c_str(), 0600);
  fs::create_symlink("plan", folder / "link");
  const words command = on_two_nodes((folder / "loads").string(), {"--plan", (folder / "link").string()});
  REQUIRE(run_program("place_experts", command, folder.path()).exit_code == 0);
  CHECK(fs::is_symlink(folder / "link"));
  CHECK_THAT(read(folder / "plan"), contains("slot_to_expert"));
  CHECK(fs::status(folder / "plan").permissions() == (fs::perms::owner_read | fs::perms::owner_write));

  write(folder / "plan", "before");
  const auto run = run_command({"sh", "-c", "\"$0\" \"$@\" 2>&1 | cat >\"" + (folder / "said").string() + "\"", "sh",
                                "-c", "ulimit -f 0; exec \"$0\" \"$@\"", program_path("place_experts"), command[0],
                                "--nodes", "2", "--gpus", "1", "--plan", (folder / "link").string()},
                               folder.path());
  CHECK_THAT(read(folder / "said"), contains("File too large"));
  CHECK(read(folder / "plan") == "before");
  CHECK(files_in(folder.path()) == 4);  // loads, plan, link, said
}

TEST_CASE("place_experts: standard output that cannot be written is an error") {
  const temporary_directory folder;
  write(folder / "loads", loads);
  for (const char* where : {">/dev/full", ">&-"}) {
    INFO(where);
    const auto run = run_command({"sh", "-c", std::string("exec \"$0\" \"$@\" ") + where, program_path("place_experts"),
                                  (folder / "loads").string(), "--nodes", "2", "--gpus", "1"},
                                 folder.path());
    CHECK(run.exit_code == 1);
    CHECK_THAT(run.err, contains("place_experts: "));
  }
}

TEST_CASE("place_experts: a signal leaves nothing behind") {
  const temporary_directory folder;
  write(folder / "trace", routing());
  const auto run = run_command({"timeout", "-s", "TERM", "0.3", program_path("place_experts"),
                                (folder / "trace").string(), "--nodes", "2", "--gpus", "1", "--splits", "100000",
                                "--plan", (folder / "plan").string(), "--report", (folder / "report").string()},
                               folder.path());
  CHECK(run.exit_code == 124);
  CHECK(files_in(folder.path()) == 1);
}
