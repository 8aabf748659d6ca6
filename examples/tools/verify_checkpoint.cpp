/// Reads a packed model back beside the one it was made from, as a reader of its layout would:
///   verify_checkpoint MODEL PACKED
///   verify_checkpoint model-f16.gguf model-nvfp4.gguf
/// Every packed weight is decoded with the scales that readers take and compared with the original, and packed again to
/// the same bytes; every other tensor must be there unchanged, and nothing else. What was packed with statistics is
/// packed again where --statistics gives them.

#include <tetromino/io/checkpoint/verify.hpp>

#include "checkpoint/settings.hpp"
#include "command_line.hpp"

#include <tetromino/io/gguf/verify.hpp>
#include <tetromino/thread_executor.hpp>

#include <memory>
#include <optional>
#include <thread>

namespace {

using namespace checkpoint;

struct settings {
  std::string original, packed, statistics, imatrix;
  unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  ui::output_options print;
};

/// GGUF files, by what llama.cpp reads.
int verify_gguf(const settings& s) {
  if (!s.statistics.empty()) throw ui::usage_error("--statistics is for safetensors; GGUF files take --imatrix");
  const auto original = io::gguf_file::open(s.original), packed = io::gguf_file::open(s.packed);
  std::optional<io::imatrix> weights;
  if (!s.imatrix.empty()) weights = io::imatrix::open(s.imatrix);
  std::size_t bytes = 0;
  for (const auto& tensor : original) bytes += tensor.bytes().size();
  const tetromino::thread_executor threads(s.threads);
  io::gguf_verify_report report;
  {
    const ui::stop_signals signals;
    ui::progress progress("verifying", bytes, s.print.quiet);
    io::gguf_verify_options options{weights ? &*weights : nullptr};
    options.progress = [&](std::size_t done) {
      progress.add(done);
      return ui::stop_signals::seen() == 0;
    };
    report = io::verify_gguf(tetromino::cpu.on(threads), original, packed, options);
  }
  if (s.print.quiet) return 0;
  if (s.print.json) {
    const nlohmann::ordered_json out = {{"layout", "gguf"},
                                        {"recipes", report.recipes},
                                        {"packed", report.packed},
                                        {"kept", report.kept},
                                        {"qsnr_db", report.errors.qsnr()},
                                        {"weights", report.errors.count},
                                        {"packed_again", report.packed_again}};
    ui::print_json(out);
    return 0;
  }
  fmt::print("{}: {} tensors packed{}, {} kept\n", s.packed, report.packed,
             report.recipes.empty() ? "" : fmt::format(" as {}", ui::printable(report.recipes)), report.kept);
  fmt::print("unpacked QSNR {:.3f} dB over {} weights; {}; kept tensors and keys are unchanged\n", report.errors.qsnr(),
             report.errors.count,
             report.packed_again      ? "packing again gives the same bytes"
             : report.recipes.empty() ? "not packed again, since the file does not say how"
                                      : "not packed again, which needs the --imatrix it was packed with");
  return 0;
}

int verify_all(const settings& s) {
  if (s.original.ends_with(".gguf")) return verify_gguf(s);
  if (!s.imatrix.empty()) throw ui::usage_error("--imatrix is for GGUF files; safetensors take --statistics");
  const auto original = io::checkpoint::open(s.original), packed = io::checkpoint::open(s.packed);
  std::unique_ptr<gathered_inputs> inputs;
  if (!s.statistics.empty()) inputs = std::make_unique<gathered_inputs>(input_statistics::load(s.statistics));
  std::size_t bytes = 0;
  for (const auto& tensor : original.tensors()) bytes += tensor.bytes;
  const tetromino::thread_executor threads(s.threads);
  io::verify_report report;
  {
    const ui::stop_signals signals;
    ui::progress progress("verifying", bytes, s.print.quiet);
    io::verify_options options{inputs.get(), ui::slice_bytes(s.threads)};
    options.progress = [&](std::size_t done) {
      progress.add(done);
      return ui::stop_signals::seen() == 0;
    };
    report = io::verify(tetromino::cpu.on(threads), original, packed, options);
  }
  if (s.print.quiet) return 0;
  if (s.print.json) {
    const nlohmann::ordered_json out = {{"layout", io::name(report.layout)},
                                        {"recipes", report.recipes},
                                        {"packed", report.packed},
                                        {"kept", report.kept},
                                        {"qsnr_db", report.errors.qsnr()},
                                        {"weights", report.errors.count},
                                        {"packed_again", report.packed_again}};
    ui::print_json(out);
    return 0;
  }
  fmt::print("{}: {} tensors packed{} in layout {}, {} kept\n", s.packed, report.packed,
             report.recipes.empty() ? "" : fmt::format(" as {}", report.recipes), io::name(report.layout), report.kept);
  const auto statistics = packed.metadata().find("tetromino.statistics");
  fmt::print("unpacked QSNR {:.3f} dB over {} weights; {}; kept tensors are unchanged\n", report.errors.qsnr(),
             report.errors.count,
             report.packed_again ? "packing again gives the same bytes"
             : statistics != packed.metadata().end()
                 ? fmt::format("not packed again, which needs --statistics {}", ui::printable(statistics->second))
                 : "not packed again, since the files do not say how");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  settings s;
  ui::command_line app("verify_checkpoint", "Reads a packed model back and compares it with the one it was made from",
                       {"MODEL PACKED", "MODEL PACKED --statistics statistics.safetensors --json",
                        "model.gguf packed.gguf --imatrix imatrix.gguf"});
  app.add_file("MODEL", s.original, "model that was packed: a directory, an index, a .safetensors or a .gguf file")
      .required();
  app.add_file("PACKED", s.packed, "what quantize_checkpoint wrote, or another packer").required();
  app.add_file("--statistics", s.statistics, "what the model was packed with, to pack it again");
  app.add_file("--imatrix", s.imatrix, "what a GGUF file was packed with, to pack it again");
  app.add_threads(s.threads);
  app.add_output(s.print);
  if (const auto leave = app.read(argc, argv)) return leave();
  return ui::run("verify_checkpoint", [&] { return verify_all(s); });
}
