/// Packs the expert and linear weights of a safetensors checkpoint into 4-bit blocks:
///   quantize_checkpoint IN.safetensors OUT.safetensors --recipe mxfp4-16/oas/mbs-search
///   quantize_checkpoint IN.safetensors OUT.safetensors --recipe nvfp4/min-error/gptq --statistics
///   STATISTICS.safetensors quantize_checkpoint IN.safetensors --compare
/// Routers, norms and embeddings stay as they are. Memory stays bounded whatever the file's size; with statistics,
/// which `moe_engine --calibrate TEXT --statistics FILE` writes for the bundled model, by those and by the largest
/// matrix.

#include "checkpoint.hpp"
#include "ui.hpp"

#include <CLI/CLI.hpp>

#include <cmath>
#include <filesystem>
#include <map>
#include <optional>

namespace {

using namespace checkpoint;
using tetromino::recipe;

struct settings {
  std::string input;
  std::string output;
  std::vector<std::string> recipes;
  std::string layout = "linear";
  std::vector<std::string> keep;
  std::string statistics;
  unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  bool compare = false;
};

const std::vector<std::string> compared_recipes = {"mxfp4-32/floor",
                                                   "mxfp4-32/ceil",
                                                   "mxfp4-32/round-up",
                                                   "mxfp4-32/even",
                                                   "mxfp4-32/oas",
                                                   "mxfp4-32/min-error",
                                                   "mxfp4-32/oas/mbs-static",
                                                   "mxfp4-32/oas/mbs-search",
                                                   "mxfp4-16/floor",
                                                   "mxfp4-16/oas",
                                                   "mxfp4-16/min-error",
                                                   "mxfp4-16/oas/mbs-static",
                                                   "mxfp4-16/oas/mbs-search",
                                                   "mxfp4-16/oas/mbs-search@64",
                                                   "mxfp4-16/oas/mbs-search@32",
                                                   "nvfp4/amax",
                                                   "nvfp4/four-over-six",
                                                   "nvfp4/min-error"};
const std::vector<std::string> compared_with_statistics = {"mxfp4-32/oas/gptq", "mxfp4-32/min-error/mbs-search@32",
                                                           "mxfp4-32/min-error/mbs-search@32/gptq",
                                                           "nvfp4/four-over-six/gptq", "nvfp4/min-error/gptq"};

/// Names the rejected value by its row in the tensor rather than in the slice.
error at_row(const error& e, std::size_t first_row, const weights& w) {
  if (e.code() != errc::non_finite) return e;
  return error(e.code(), fmt::format("{} (counting from row {} of {})", e.what(), first_row, w.matrices * w.rows));
}

/// Squares of products with the activations that statistics describe: of the weights, and of what packing errs.
struct product_report {
  double signal = 0, noise = 0;

  template <class T>
  void add(const tetromino::matrix_view<const T>& x, const tetromino::matrix<float>& y,
           const tetromino::calibration& seen) {
    tetromino::eigen_matrix<double> values(static_cast<Eigen::Index>(x.rows), static_cast<Eigen::Index>(x.cols));
    tetromino::eigen_matrix<double> errors = values;
    for (std::size_t r = 0; r < x.rows; ++r) {
      for (std::size_t k = 0; k < x.cols; ++k) {
        const auto i = static_cast<Eigen::Index>(r), j = static_cast<Eigen::Index>(k);
        values(i, j) = static_cast<double>(tetromino::detail::to_float(x(r, k)));
        errors(i, j) = values(i, j) - static_cast<double>(y(r, k));
      }
    }
    const auto moments = seen.moments().selfadjointView<Eigen::Lower>();
    signal += (values * moments).cwiseProduct(values).sum() / seen.rows();
    noise += (errors * moments).cwiseProduct(errors).sum() / seen.rows();
  }
  [[nodiscard]] double qsnr() const { return 10 * std::log10(signal / noise); }
};

int compare(const settings& s, const io::safetensors_file& file, std::span<const weights> all,
            const input_statistics* seen, const tetromino::cpu_t& policy) {
  std::vector<recipe> recipes;
  for (const auto& name : s.recipes.empty() ? compared_recipes : s.recipes) recipes.push_back(recipe::parse(name));
  for (const auto& name : compared_with_statistics) {
    if (seen != nullptr && s.recipes.empty()) recipes.push_back(recipe::parse(name));
  }

  std::vector<tetromino::error_report> reports(recipes.size());
  std::vector<product_report> products(recipes.size());
  std::vector<double> bits(recipes.size());
  std::size_t elements = 0;
  for (const auto& w : all) elements += w.elements();
  {
    ui::progress progress("comparing", elements);
    for (const auto& w : all) {
      naming(w, [&] {
        std::map<std::size_t, float> amax;  // by rotation
        for (const recipe& r : recipes) {
          if (r.format.scale == tetromino::scale_type::e4m3 && !amax.contains(r.rotation)) {
            amax[r.rotation] = amax_of(file, w, policy, r.rotation);
          }
        }
        const auto pack_all = [&]<class T>(const tetromino::batch_view<const T>& slice, std::size_t row) {
          for (std::size_t i = 0; i < recipes.size(); ++i) {
            const recipe& r = recipes[i];
            const bool scaled = r.format.scale == tetromino::scale_type::e4m3;
            const float scale = scaled ? tensor_scale_for(layout::linear, amax.at(r.rotation), r.rule) : 1.0f;
            const auto packed = pack_slice(policy, slice, row, w, r, {&scale, scaled ? 1u : 0u}, seen);
            if (!packed) throw at_row(packed.error(), row, w);
            const auto values = unpacked(policy, *packed, r);
            reports[i].add(tetromino::compare(slice, values));
            if (seen == nullptr) continue;
            products[i].add(slice[0], values, seen->of(w.tensor->name(), row / w.rows, w.matrices, w.cols));
          }
          progress.add(slice.rows * slice.cols);
        };
        for_each_slice(file, w, pack_all, seen != nullptr);
      });
      for (std::size_t i = 0; i < recipes.size(); ++i) {
        for (const auto& part : store_as(layout::linear, recipes[i].format, w).parts()) {
          std::size_t entries = 1;
          for (const std::size_t n : part.shape) entries *= n;
          bits[i] += static_cast<double>(entries * io::bits_per_element(part.dtype));
        }
      }
    }
  }
  std::vector<std::string> header{"recipe", "bits/weight", "QSNR dB"};
  if (seen != nullptr) header.emplace_back("of products dB");
  ui::table table(std::move(header));
  for (std::size_t i = 0; i < recipes.size(); ++i) {
    std::vector<std::string> line{recipes[i].name(), fmt::format("{:.3f}", bits[i] / static_cast<double>(elements)),
                                  fmt::format("{:.3f}", reports[i].qsnr())};
    if (seen != nullptr) line.push_back(fmt::format("{:.3f}", products[i].qsnr()));
    table.add(std::move(line));
  }
  table.print();
  fmt::print("{} tensors, {} weights\n", all.size(), elements);
  return 0;
}

/// Packs one tensor into the file being written; returns what that did to its values.
tetromino::error_report pack(const io::safetensors_file& file, const weights& w, const recipe& r, layout where,
                             const stored& parts, const input_statistics* seen, const tetromino::cpu_t& policy,
                             io::safetensors_writer& writer, ui::progress& progress) {
  tetromino::error_report report;
  std::vector<float> tensor_scales;
  if (r.format.scale == tetromino::scale_type::e4m3) {
    const float tensor_scale = tensor_scale_for(where, amax_of(file, w, policy, r.rotation), r.rule);
    tensor_scales.push_back(tensor_scale);
    const float value = stored_scale(where, tensor_scale);
    writer.append_values<float>(parts.tensor_scale.name, {&value, 1});
  }
  const auto pack_one = [&]<class T>(const tetromino::batch_view<const T>& slice, std::size_t row) {
    const auto packed = pack_slice(policy, slice, row, w, r, tensor_scales, seen);
    if (!packed) throw at_row(packed.error(), row, w);
    writer.append(parts.codes.name, packed->codes);
    writer.append(parts.scales.name, packed->scales);
    if (!parts.macros.name.empty()) writer.append(parts.macros.name, packed->macros);
    report.add(tetromino::compare(slice, unpacked(policy, *packed, r)));
    progress.add(slice.rows * slice.cols * sizeof(T));
  };
  for_each_slice(file, w, pack_one, seen != nullptr);
  return report;
}

int write(const settings& s, const io::safetensors_file& file, std::span<const weights> all,
          const input_statistics* seen, const tetromino::cpu_t& policy) {
  if (s.output.empty()) throw error(errc::invalid_argument, "expected OUT.safetensors, or --compare");
  if (s.recipes.size() > 1) throw error(errc::invalid_argument, "expected one --recipe; --compare takes several");
  const recipe r = recipe::parse(s.recipes.empty() ? "mxfp4-16/oas/mbs-search" : s.recipes.front());
  const layout where = layout_named(s.layout);
  expect_fit(where, r);
  if (r.error_feedback && seen == nullptr) {
    throw error(errc::invalid_argument, fmt::format("recipe {} needs --statistics FILE", r.name()));
  }

  // The header comes first: every tensor is declared, packed ones by their parts, in the order of the input.
  std::vector<io::tensor_declaration> declarations;
  std::vector<const io::safetensors_tensor*> kept;
  std::vector<std::string> kept_modules;
  std::vector<stored> parts;
  nlohmann::json shapes = nlohmann::json::object();
  std::size_t next = 0, input_bytes = 0;
  for (const auto& tensor : file) {
    input_bytes += tensor.bytes().size();
    if (next < all.size() && all[next].tensor == &tensor) {
      parts.push_back(store_as(where, r.format, all[next++]));
      for (const auto& part : parts.back().parts()) declarations.push_back(part);
      shapes[tensor.name()] = tensor.shape();
    } else {
      kept.push_back(&tensor);
      declarations.push_back({tensor.name(), tensor.dtype(), tensor.shape()});
      if (tensor.name().ends_with(".weight")) kept_modules.push_back(tensor.name().substr(0, tensor.name().size() - 7));
    }
  }
  auto metadata = file.metadata();
  metadata["format"] = "pt";
  metadata["tetromino.recipe"] = r.name();
  metadata["tetromino.layout"] = s.layout;
  metadata["tetromino.shapes"] = shapes.dump();
  if (seen != nullptr) metadata["tetromino.statistics"] = std::filesystem::path(s.statistics).filename().string();
  const nlohmann::json config = quantization_config(where, r.format, kept_modules);
  if (!config.is_null()) metadata["quantization_config"] = config.dump();

  auto writer = io::safetensors_writer::create(s.output, io::aligned_order(declarations), metadata, &file);
  ui::table table({"tensor", "shape", "bits/weight", "QSNR dB"});
  tetromino::error_report total;
  std::size_t total_bits = 0, kept_bytes = 0;
  {
    ui::progress progress("packing", input_bytes);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const weights& w = all[i];
      tetromino::error_report report;
      naming(w, [&] { report = pack(file, w, r, where, parts[i], seen, policy, writer, progress); });
      std::size_t bits = 0;
      for (const auto& part : parts[i].parts()) {
        std::size_t entries = 1;
        for (const std::size_t n : part.shape) entries *= n;
        bits += entries * io::bits_per_element(part.dtype);
      }
      total.add(report);
      total_bits += bits;
      table.add({w.tensor->name(), fmt::format("{}", fmt::join(w.tensor->shape(), "x")),
                 fmt::format("{:.3f}", static_cast<double>(bits) / static_cast<double>(w.elements())),
                 fmt::format("{:.3f}", report.qsnr())});
    }
    for (const auto* tensor : kept) {
      for (auto rest = tensor->bytes(); !rest.empty();) {
        const auto piece = rest.first(std::min<std::size_t>(rest.size(), 4u << 20));
        writer.append(tensor->name(), piece);
        file.done_with(piece);
        progress.add(piece.size());
        rest = rest.subspan(piece.size());
      }
      kept_bytes += tensor->bytes().size();
    }
    writer.finish();
  }
  if (!all.empty()) {
    table.add({"total", fmt::format("{} weights", total.count),
               fmt::format("{:.3f}", static_cast<double>(total_bits) / static_cast<double>(total.count)),
               fmt::format("{:.3f}", total.qsnr())});
  }
  table.print();
  fmt::print("{}: {} packed as {} in layout {}, {} tensors kept as they were ({})\n", s.output, all.size(), r.name(),
             s.layout, kept.size(), ui::bytes(kept_bytes));
  fmt::print("{} -> {}\n", ui::bytes(input_bytes), ui::bytes(kept_bytes + total_bits / 8));
  if (!config.is_null()) {
    fmt::print("readers of {} look for this in config.json, as \"quantization_config\":\n{}\n", s.layout,
               config.dump());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  settings s;
  CLI::App app("Packs the expert and linear weights of a safetensors checkpoint into 4-bit blocks");
  app.add_option("IN", s.input, "checkpoint to read (.safetensors)")->required();
  app.add_option("OUT", s.output, "checkpoint to write (.safetensors)");
  app.add_option("--recipe", s.recipes, std::string(tetromino::detail::recipe_help));
  app.add_option("--layout", s.layout, "linear, gpt-oss, compressed-tensors or modelopt")->capture_default_str();
  app.add_option("--keep", s.keep,
                 "leave tensors whose name matches this pattern (* and ?) as they are; may be repeated");
  app.add_option("--statistics", s.statistics,
                 "calibration statistics of the weights' inputs: they weigh errors in searches, and gptq needs them");
  app.add_option("--threads", s.threads, "threads to use")->capture_default_str()->check(CLI::Range(1u, 1024u));
  app.add_flag("--compare", s.compare, "print the recipes side by side and write nothing");
  CLI11_PARSE(app, argc, argv);

  return ui::run("quantize_checkpoint", [&] {
    const auto file = io::safetensors_file::open(s.input);
    const std::vector<weights> all = find_weights(file, s.keep);
    const tetromino::thread_executor threads(s.threads);
    const auto policy = tetromino::cpu.on(threads);
    std::optional<input_statistics> read;
    if (!s.statistics.empty()) read = input_statistics::load(s.statistics);
    const input_statistics* const seen = read ? &*read : nullptr;
    return s.compare ? compare(s, file, all, seen, policy) : write(s, file, all, seen, policy);
  });
}
