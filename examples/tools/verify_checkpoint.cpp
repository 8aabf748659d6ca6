/// Reads a packed checkpoint back beside the one it was made from:
///   verify_checkpoint ORIGINAL.safetensors PACKED.safetensors
/// Every packed tensor is unpacked and compared with the original, and packed again to the same bytes; every other
/// tensor must be there unchanged. What was packed with statistics is packed again where --statistics gives them.

#include "checkpoint.hpp"
#include "ui.hpp"

#include <CLI/CLI.hpp>

#include <map>
#include <optional>

namespace {

using namespace checkpoint;

/// The metadata entry that quantize_checkpoint wrote.
const std::string& entry(const io::safetensors_file& file, const char* key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) {
    throw error(
        errc::malformed_file,
        fmt::format("{}: expected a file by quantize_checkpoint, but its metadata has no {}", file.path(), key));
  }
  return found->second;
}

std::span<const std::uint8_t> bytes_of(const io::safetensors_file& file, const io::tensor_declaration& part) {
  const auto& tensor = file[part.name];
  if (tensor.dtype() != part.dtype || tensor.shape() != part.shape) {
    throw error(errc::malformed_file,
                fmt::format("tensor \"{}\": expected {} [{}], found {} [{}]", part.name, io::name(part.dtype),
                            fmt::join(part.shape, ", "), io::name(tensor.dtype()), fmt::join(tensor.shape(), ", ")));
  }
  return tensor.bytes();
}

/// Compares one packed tensor with its original, slice by slice; throws where packing again gives other bytes.
tetromino::error_report verify(const io::safetensors_file& original, const io::safetensors_file& packed,
                               const weights& w, const tetromino::recipe& r, layout where, bool pack_again,
                               const input_statistics* seen, const tetromino::cpu_t& policy) {
  const stored parts = store_as(where, r.format, w);
  const auto codes = bytes_of(packed, parts.codes), scales = bytes_of(packed, parts.scales);
  const auto macros = parts.macros.name.empty() ? std::span<const std::uint8_t>{} : bytes_of(packed, parts.macros);
  std::vector<float> tensor_scales;
  if (!parts.tensor_scale.name.empty()) {
    bytes_of(packed, parts.tensor_scale);
    tensor_scales.push_back(loaded_scale(where, packed[parts.tensor_scale.name].copy_as<float>().front()));
  }

  tetromino::error_report report;
  const auto compare_slice = [&]<class T>(const tetromino::batch_view<const T>& slice, std::size_t row) {
    const tetromino::packed_shape shape{r.format, 1, slice.rows, slice.cols};
    const auto part = [&](std::span<const std::uint8_t> all, std::size_t bytes_per_row) {
      return all.subspan(row * bytes_per_row, slice.rows * bytes_per_row);
    };
    const tetromino::packed_view<> view{r.format,
                                        1,
                                        slice.rows,
                                        slice.cols,
                                        part(codes, shape.code_bytes_per_row()),
                                        part(scales, shape.blocks_per_row()),
                                        part(macros, shape.macros_per_row()),
                                        tensor_scales};
    report.add(tetromino::compare(slice, unpacked(policy, view, r)));

    const auto differs = [&](const tetromino::packed<>& again) {
      return !std::ranges::equal(again.codes, view.codes) || !std::ranges::equal(again.scales, view.scales) ||
             !std::ranges::equal(again.macros, view.macros);
    };
    if (pack_again && differs(pack_slice(policy, slice, row, w, r, tensor_scales, seen).value())) {
      throw error(errc::malformed_file, fmt::format("rows {} to {} do not hold what {} makes of the original", row,
                                                    row + slice.rows - 1, r.name()));
    }
    for (const auto& bytes : {view.codes, view.scales, view.macros}) packed.done_with(bytes);
  };
  for_each_slice(original, w, compare_slice, seen != nullptr);
  return report;
}

int verify_all(const std::string& original_path, const std::string& packed_path, const std::string& statistics,
               unsigned threads) {
  const auto original = io::safetensors_file::open(original_path);
  const auto packed = io::safetensors_file::open(packed_path);
  const auto r = tetromino::recipe::parse(entry(packed, "tetromino.recipe"));
  const layout where = layout_named(entry(packed, "tetromino.layout"));
  const bool calibrated = packed.metadata().contains("tetromino.statistics");
  std::optional<input_statistics> read;
  if (calibrated && !statistics.empty()) read = input_statistics::load(statistics);
  const bool pack_again = !calibrated || read;
  const auto shapes = nlohmann::json::parse(entry(packed, "tetromino.shapes"), nullptr, false);
  if (!shapes.is_object()) throw error(errc::malformed_file, packed_path + ": tetromino.shapes is not a JSON object");

  std::map<std::string, weights> candidates;
  for (const auto& w : find_weights(original, {})) candidates.emplace(w.tensor->name(), w);

  const tetromino::thread_executor executor(threads);
  const auto policy = tetromino::cpu.on(executor);
  tetromino::error_report total;
  std::size_t kept = 0;
  ui::progress progress("verifying", original.size());
  for (const auto& tensor : original) {
    if (!shapes.contains(tensor.name())) {
      const auto& copy = packed[tensor.name()];
      if (copy.dtype() != tensor.dtype() || copy.shape() != tensor.shape() ||
          !std::ranges::equal(copy.bytes(), tensor.bytes())) {
        throw error(errc::malformed_file,
                    fmt::format("tensor \"{}\" was kept, but differs from the original", tensor.name()));
      }
      original.done_with(tensor.bytes());
      packed.done_with(copy.bytes());
      ++kept;
    } else {
      const auto w = candidates.find(tensor.name());
      if (w == candidates.end() || shapes[tensor.name()] != nlohmann::json(tensor.shape())) {
        throw error(
            errc::malformed_file,
            fmt::format("tensor \"{}\": the packed file gives it another shape than the original", tensor.name()));
      }
      naming(w->second, [&] {
        total.add(verify(original, packed, w->second, r, where, pack_again, read ? &*read : nullptr, policy));
      });
    }
    progress.add(1);
  }
  fmt::print("{}: {} tensors packed as {} in layout {}, {} kept\n", packed_path, shapes.size(), r.name(),
             name_of(where), kept);
  fmt::print("unpacked QSNR {:.3f} dB over {} weights; {}; kept tensors are unchanged\n", total.qsnr(), total.count,
             pack_again
                 ? "packing again gives the same bytes"
                 : fmt::format("not packed again, which needs --statistics {}", entry(packed, "tetromino.statistics")));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::string original, packed, statistics;
  unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  CLI::App app("Reads a packed checkpoint back and compares it with the one it was made from");
  app.add_option("ORIGINAL", original, "checkpoint that was packed (.safetensors)")->required();
  app.add_option("PACKED", packed, "what quantize_checkpoint wrote (.safetensors)")->required();
  app.add_option("--statistics", statistics, "what the file was packed with, to pack it again");
  app.add_option("--threads", threads, "threads to use")->capture_default_str()->check(CLI::Range(1u, 1024u));
  CLI11_PARSE(app, argc, argv);
  return ui::run("verify_checkpoint", [&] { return verify_all(original, packed, statistics, threads); });
}
