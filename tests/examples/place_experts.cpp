#include "check.hpp"

#include <tetromino/version.hpp>

#include "examples/program.hpp"

#include <nlohmann/json.hpp>
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

/// Routing of a few requests of two domains, or of so many, whose names hold what would act on a terminal.
std::string routing(int domains = 2, int first_layer = 0, int prefill_length = 3) {
  std::string out;
  for (int r = 0; r < 12; ++r) {
    for (int token = 0; token < 6; ++token) {
      for (int layer = 0; layer < 2; ++layer) {
        out += R"({"req_id": ")" + std::to_string(r) + R"(", "token_idx": )" + std::to_string(token) +
               R"(, "layer": )" + std::to_string(first_layer + layer) + R"(, "topk_ids": [)" +
               std::to_string((r + layer) % 4) + ", " +
               std::to_string((r + token) % 4 == (r + layer) % 4 ? (r + token + 1) % 4 : (r + token) % 4) +
               R"(], "prefill_length": )" + std::to_string(prefill_length) + R"(, "domain": ")" +
               (r % domains == 0 ? "plain" : "\\u001b[31mred" + (domains > 2 ? std::to_string(r % domains) : "")) +
               "\"}\n";
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

TEST_CASE("place_experts: options say what they are, and mistakes in them are found before the work") {
  const temporary_directory folder;
  const auto asked = [&](const words& options) { return run_program("place_experts", options, folder.path()); };
  CHECK_THAT(asked({"--version"}).out, contains("place_experts " + std::to_string(TETROMINO_VERSION_MAJOR) + "."));
  const auto help = asked({"--help"});
  CHECK(help.exit_code == 0);
  CHECK_THAT(help.out, contains("Examples:\n  place_experts TRACE") && contains("--report FILE"));
  for (const words& wrong :
       {words{"none", "--nodes", "0"}, words{"none", "--splits", "0"}, words{"none", "--limit", "0"},
        words{"none", "--format", "sglang"}, words{"none", "--json", "--quiet"}, words{}}) {
    const auto run = asked(wrong);
    CHECK(run.exit_code == 2);
    CHECK(run.out.empty());
    CHECK(!run.err.empty());
  }
}

TEST_CASE("place_experts: what loads, a file or a cluster have no use or no room for is found before the work") {
  const temporary_directory folder;
  write(folder / "loads", loads);
  write(folder / "trace", routing());
  const std::string counts = (folder / "loads").string(), trace = (folder / "trace").string(),
                    plan = (folder / "plan").string();
  const words two{"--nodes", "2", "--gpus", "1"};
  const auto refused = [&](const std::string& input, const words& options, const std::string& says) {
    words all{input};
    all.insert(all.end(), options.begin(), options.end());
    CAPTURE(all);
    const auto run = run_program("place_experts", all, folder.path());
    CHECK(run.exit_code == 2);
    CHECK(run.out.find("Plans compared") == std::string::npos);
    CHECK_THAT(run.err, contains(says));
    CHECK(!fs::exists(plan));
  };
  for (const words& option : {words{"--judge", "none"}, words{"--splits", "2"}, words{"--limit", "1.5"},
                              words{"--seed", "2"}, words{"--expert-mb", "4"}}) {
    refused(counts, option, "expected a trace of requests for " + option[0] + ", found CSV of counts");
  }
  refused(counts, {"--slots", "2,3"}, "expected a trace of requests for a second number of --slots");
  refused(trace, {"--judge", trace, "--splits", "2"}, "--judge excludes --splits");
  refused(trace, {"--nodes", "300"}, "expected at most 256");
  refused(counts, {"--rack", "1"}, "expected a trace of requests for --rack");
  refused(trace, {"--rack-cost", "2"}, "--rack-cost requires --rack");
  for (const std::string& input : {counts, trace}) {
    refused(input, {"--nodes", "256", "--gpus", "256"}, "GPUs");
    refused(input, {"--nodes", "2", "--gpus", "1", "--slots", "1"}, "a slot for each of 4 experts, got 2");
    refused(input, {"--nodes", "2", "--gpus", "1", "--slots", "5", "--format", "sglang", "--plan", plan},
            "at most 4 slots per GPU");
  }
}

TEST_CASE("place_experts: plans name the layers of the model") {
  const temporary_directory folder;
  write(folder / "trace", routing(2, 3));
  write(folder / "statistics", "layer,expert,count\n3,0,9\n3,1,1\n3,2,4\n3,3,2\n5,0,1\n5,1,7\n5,2,2\n5,3,2\n");
  const std::string plan = (folder / "plan").string();
  const auto keys = [&](const std::string& input, const words& more) {
    words all{(folder / input).string(), "--nodes", "2", "--gpus", "1", "--plan", plan};
    all.insert(all.end(), more.begin(), more.end());
    const auto run = run_program("place_experts", all, folder.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    return read(plan);
  };
  const words yaml{"--format", "tensorrt-llm"}, map{"--format", "sglang"};
  CHECK_THAT(keys("statistics", yaml), contains("\n  3: [") && contains("\n  5: [") && !contains("\n  0: ["));
  CHECK_THAT(keys("statistics", {"--format", "tensorrt-llm", "--first-layer", "2"}),
             contains("\n  5: [") && contains("\n  7: ["));
  CHECK_THAT(keys("trace", {"--splits", "1", "--format", "tensorrt-llm"}),
             contains("\n  3: [") && contains("\n  4: ["));
  CHECK_THAT(keys("statistics", {"--format", "tensorrt-llm", "--first-layer", "1", "--layer-step", "2"}),
             contains("\n  7: [") && contains("\n  11: ["));
  CHECK(nlohmann::json::parse(keys("statistics", {"--format", "sglang", "--model-layers", "8"}))
            .at("physical_to_logical_map")
            .size() == 8);
  const auto short_model = run_program(
      "place_experts",
      {(folder / "statistics").string(), "--nodes", "2", "--gpus", "1", "--plan", plan, "--model-layers", "5"},
      folder.path());
  CHECK(short_model.exit_code == 2);
  CHECK_THAT(short_model.err, contains("expected more than 5"));
  // a row for each layer of the model; and such a plan is one to start from
  const auto rows = nlohmann::json::parse(keys("statistics", map)).at("physical_to_logical_map");
  REQUIRE(rows.size() == 6);
  for (const std::size_t dense : {0u, 1u, 2u, 4u}) CHECK(rows[dense] == nlohmann::json{0, 1, 2, 3});
  write(folder / "start", read(plan));
  const auto again =
      nlohmann::json::parse(keys("statistics", {"--format", "sglang", "--start", (folder / "start").string()}));
  CHECK(again.at("physical_to_logical_map") == rows);
  const auto wrong = run_program("place_experts",
                                 {(folder / "statistics").string(), "--nodes", "2", "--gpus", "1", "--first-layer", "1",
                                  "--start", (folder / "start").string()},
                                 folder.path());
  CHECK(wrong.exit_code == 1);
  CHECK_THAT(wrong.err, contains("for layer 6 of the model"));
}

TEST_CASE("place_experts: too little to plan from or to judge on") {
  const temporary_directory folder;
  const auto run = [&](const std::string& trace, const words& more) {
    write(folder / "trace", trace);
    words all{(folder / "trace").string(), "--nodes", "2", "--gpus", "1"};
    all.insert(all.end(), more.begin(), more.end());
    return run_program("place_experts", all, folder.path());
  };
  const auto one = run(R"({"req_id":1,"token_idx":0,"layer":0,"topk_ids":[0,1]})", {"--slots", "8"});
  CHECK(one.exit_code == 1);
  CHECK_THAT(one.err, contains("give more requests than 1, another --seed, or a trace to --judge on"));
  const auto prompts = run(routing(2, 0, 6), {});
  CHECK(prompts.exit_code == 1);
  CHECK_THAT(prompts.err, contains("expected decode tokens, for which plans are made, found none"));

  // what cannot be measured is null, and no plan is best
  write(folder / "prompts", routing(2, 0, 6));
  const auto judged = run(routing(), {"--judge", (folder / "prompts").string(), "--json", "--report",
                                      (folder / "report").string(), "--slots", "2,3"});
  INFO(judged.err);
  REQUIRE(judged.exit_code == 0);
  const auto found = nlohmann::json::parse(judged.out);
  for (const auto& plan : found.at("plans")) {
    CHECK(!plan.at("best").get<bool>());
    for (const char* key : {"remote_pairs", "nodes_per_token", "node_imbalance", "gpu_imbalance", "bytes_per_token"}) {
      CHECK(plan.at(key).at("mean").is_null());
    }
  }
  for (const auto& limit : found.at("limits")) CHECK(limit.at("nodes_per_token").is_null());
  const auto answers = nlohmann::json::parse(run(routing(2, 0, 0), {"--splits", "1", "--json"}).out).at("routing");
  CHECK(answers.at("cosine_same_request").is_null());
  CHECK(answers.at("cosine_other_requests").is_null());
  CHECK_THAT(run(routing(), {"--judge", (folder / "prompts").string()}).out,
             contains("no decode tokens: plans cannot be compared") && !contains("instead of"));
  CHECK_THAT(run(routing(2, 3), {"--judge", (folder / "prompts").string()}).err, contains("expected the layers of"));
}

TEST_CASE("place_experts: what it finds as JSON, or nothing") {
  const temporary_directory folder;
  write(folder / "trace", routing(5));
  const auto run = run_program("place_experts", on_two_nodes((folder / "trace").string(), {"--slots", "2,3", "--json"}),
                               folder.path());
  REQUIRE(run.exit_code == 0);
  const auto found = nlohmann::json::parse(run.out);
  CHECK(found.at("routing").at("requests") == 12);
  CHECK(found.at("routing").at("divergence_bits").size() == 5);
  REQUIRE(found.at("plans").size() == 8);
  int best = 0;
  double fewest = 1e9, of_best = 0;
  for (const auto& plan : found.at("plans")) {
    fewest = std::min(fewest, plan.at("nodes_per_token").at("mean").get<double>());
    if (!plan.at("best").get<bool>()) continue;
    ++best;
    of_best = plan.at("nodes_per_token").at("mean").get<double>();
  }
  CHECK(best == 1);
  CHECK(of_best == fewest);
  CHECK(found.at("limits").size() == 24);
  CHECK(found.at("drift").size() == 25);
  CHECK(found.at("migration").at("from") == "contiguous");
  CHECK(
      run_program("place_experts", on_two_nodes((folder / "trace").string(), {"--quiet"}), folder.path()).out.empty());
}

TEST_CASE("place_experts: between racks, a copy costs what it is told") {
  const temporary_directory folder;
  write(folder / "trace", routing());
  const auto asked = [&](const std::string& more) {
    return run_program("place_experts",
                       on_two_nodes((folder / "trace").string(), {"--rack", "1", "--rack-cost", "2.5", more}),
                       folder.path());
  };
  const auto run = asked("--json");
  REQUIRE(run.exit_code == 0);
  const auto found = nlohmann::json::parse(run.out);
  CHECK(found.at("cluster").at("nodes_per_rack") == 1);
  CHECK(found.at("cluster").at("rack_cost") == 2.5);
  for (const auto& plan : found.at("plans")) {
    const double nodes = plan.at("nodes_per_token").at("mean").get<double>();
    CHECK(plan.at("cost_per_token").at("mean").get<double>() == Approx(2.5 * nodes));
  }
  CHECK_THAT(asked("--threads=1").out, contains("cost/token"));
}

TEST_CASE("place_experts: of many domains, the extremes have names and the others a picture") {
  const temporary_directory folder;
  write(folder / "trace", routing(12));
  const auto run = run_program("place_experts", on_two_nodes((folder / "trace").string(), {}), folder.path());
  REQUIRE(run.exit_code == 0);
  const std::string seen = run.out.substr(0, run.out.find("Plans compared"));
  CHECK_THAT(seen, contains("the domains most alike: ") && contains("the domains least alike: ") && contains("█"));
  CHECK(std::count(seen.begin(), seen.end(), '\n') < 35);
  CHECK_THAT(run.out, contains("(best)") && contains("On requests that were not planned with, a token visits "));
}

TEST_CASE("place_experts: the report in a browser, on a phone, by keyboard and by touch") {
  const temporary_directory folder;
  write(folder / "trace", routing(4));
  const std::string report = (folder / "report.html").string();
  REQUIRE(run_program("place_experts", on_two_nodes((folder / "trace").string(), {"--report", report}), folder.path())
              .exit_code == 0);
  const std::string page = read(report);
  CHECK_THAT(page, contains("<title>Where the experts of trace live</title>") &&
                       contains("prefers-color-scheme:dark") && contains("--nodes 2") && contains("2 or more") &&
                       contains("<tr class=\"best\">") && contains("<th scope=\"col\">") &&
                       contains("Divergence of domains"));

  const std::string probe = R"(<script>onload = () => {
  const svg = document.querySelectorAll("svg")[1];
  svg.focus();
  for (const key of ["ArrowRight", "ArrowDown"]) svg.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
  const cell = document.querySelector("svg rect title").parentNode;
  cell.dispatchEvent(new PointerEvent("pointerdown", {bubbles: true}));
  parent.postMessage({fits: document.documentElement.scrollWidth <= innerWidth, inner: innerWidth,
                      focused: document.activeElement === svg, keys: svg.nextElementSibling.textContent,
                      touch: document.querySelector("output").textContent}, "*");
}</script></body>)";
  const std::size_t end = page.rfind("</body>");
  write(folder / "probe.html", page.substr(0, end) + probe + page.substr(end + 7));
  write(folder / "phone.html",
        R"(<iframe src="probe.html" style="width:360px;height:900px;border:0"></iframe><pre></pre>
<script>onmessage = e => document.querySelector("pre").textContent = "said " + JSON.stringify(e.data)</script>)");
  outcome browser;
  for (const char* name : {"chromium", "chromium-browser", "google-chrome"}) {
    browser = run_command({name, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
                           "--allow-file-access-from-files", "--user-data-dir=" + (folder / "profile").string(),
                           "--dump-dom", "file://" + (folder / "phone.html").string()},
                          folder.path());
    if (browser.exit_code == 0) break;
  }
  if (browser.exit_code != 0) {
    WARN("skipped: no Chromium that runs is installed");
    return;
  }
  const std::size_t said = browser.out.find("said {");
  REQUIRE(said != std::string::npos);
  const auto found = nlohmann::json::parse(browser.out.substr(said + 5, browser.out.find("</pre>") - said - 5));
  CHECK(found.at("inner") == 360);
  CHECK(found.at("fits") == true);
  CHECK(found.at("focused") == true);
  CHECK_THAT(found.at("keys").get<std::string>(), contains("layer 1, GPU 0: ") && contains("(load / mean)"));
  CHECK_THAT(found.at("touch").get<std::string>(), contains("plain, plain: 0 (bits)"));
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
    words all{trace, "--nodes", "2", "--gpus", "1"};
    all.insert(all.end(), options.begin(), options.end());
    const auto run = run_program("place_experts", all, folder.path());
    CHECK(run.exit_code == 2);
    CHECK_THAT(run.err, contains(says));
  };
  refused({"--judge", judge, "--plan", judge}, "expected another file than --judge");
  refused({"--start", judge, "--report", judge}, "expected another file than --start");
  refused({"--plan", out, "--report", out}, "expected another file than --plan");
  fs::create_symlink("out", folder / "to_out");  // which is not there yet
  refused({"--plan", out, "--report", (folder / "to_out").string()}, "expected another file than --plan");
  refused({"--plan", (folder / "to_out").string(), "--report", out}, "expected another file than --plan");
  CHECK(fs::is_symlink(folder / "to_out"));
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

TEST_CASE("place_experts: names that are no UTF-8 are replaced in JSON") {
  const temporary_directory folder;
  write(folder / "trace\xff", routing());
  const words command =
      on_two_nodes((folder / "trace\xff").string(), {"--json", "--plan", (folder / "p\xff").string()});
  const auto run = run_program("place_experts", command, folder.path());
  CAPTURE(run.err);
  CHECK(run.exit_code == 0);
  CHECK(nlohmann::json::parse(run.out).is_object());
}

TEST_CASE("place_experts: a replaced output keeps its mode and its links, and is whole or as it was") {
  const temporary_directory folder;
  write(folder / "loads", loads);
  write(folder / "plan", "before");
  ::chmod((folder / "plan").c_str(), 0600);
  fs::create_symlink("plan", folder / "link");
  const words command{(folder / "loads").string(), "--nodes", "2", "--gpus", "1", "--plan", (folder / "link").string()};
  REQUIRE(run_program("place_experts", command, folder.path()).exit_code == 0);
  CHECK(fs::is_symlink(folder / "link"));
  CHECK_THAT(read(folder / "plan"), contains("slot_to_expert"));
  CHECK(fs::status(folder / "plan").permissions() == (fs::perms::owner_read | fs::perms::owner_write));

  write(folder / "plan", "before");
  // without a TMPDIR the thread sanitizer's runtime writes no file of its own, which the limit would stop first
  const auto run = run_command({"sh", "-c", "\"$0\" \"$@\" 2>&1 | cat >\"" + (folder / "said").string() + "\"", "sh",
                                "-c", "ulimit -f 0; TMPDIR=/dev/null exec \"$0\" \"$@\"", program_path("place_experts"),
                                command[0], "--nodes", "2", "--gpus", "1", "--plan", (folder / "link").string()},
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
