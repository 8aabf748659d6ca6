#include "check.hpp"

#include "examples/large_model.hpp"
#include "examples/program.hpp"
#include "support/model_folder.hpp"

#include <tetromino/io/safetensors.hpp>

#include <map>

/// Models that memory does not hold.

namespace {

namespace io = tetromino::io;
using namespace tetromino_test;

/// Packs, measures and verifies two matrices of `rows` rows of 32 KiB, and is stopped in between.
void pass_in_bounded_memory(std::size_t rows) {
  const temporary_directory folder;
  const std::string in = (folder / "in.safetensors").string(), out = (folder / "out.safetensors").string();
  constexpr std::size_t cols = 1 << 14, tensors = 2;
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

}  // namespace

TEST_CASE("half a gigabyte passes through bounded memory, and stops at a signal") { pass_in_bounded_memory(1 << 13); }

TEST_CASE("a whole gigabyte passes through bounded memory, and stops at a signal", "[.slow]") {
  pass_in_bounded_memory(1 << 14);
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
