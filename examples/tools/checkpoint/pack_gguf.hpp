#pragma once

/// GGUF files through quantize_checkpoint: F16, BF16 or F32 in, MXFP4 or NVFP4 blocks out, all keys as they were.

#include "../ui.hpp"

#include <tetromino/cpu.hpp>
#include <tetromino/io/gguf/pack.hpp>
#include <tetromino/io/imatrix.hpp>

#include <fmt/format.h>

#include <filesystem>
#include <map>
#include <string>
#include <utility>

namespace checkpoint {

/// What is packed and what is kept, with the reasons; with a report, also what it did to the values.
inline void print_gguf(const tetromino::io::gguf_plan& plan, const tetromino::io::gguf_report* report) {
  struct group {
    std::size_t tensors = 0, elements = 0;
    tetromino::error_report errors;
    std::string example;
  };
  std::map<std::pair<bool, std::string>, group> groups;  // packed by recipe, kept by reason
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    const auto& planned = plan.tensors[i];
    auto& one = groups[{!planned.is_packed, planned.is_packed ? planned.how.name() : planned.reason}];
    ++one.tensors;
    one.elements += planned.source->elements();
    if (report != nullptr) one.errors.add((*report)[i].errors);
    if (one.example.empty()) one.example = planned.source->name();
  }
  ui::table table({"what", "recipe, or why not", "tensors", "values", "QSNR dB", "such as"});
  for (const auto& [key, one] : groups) {
    table.add({key.first ? "kept" : "packed", ui::printable(key.second), fmt::format("{}", one.tensors),
               fmt::format("{}", one.elements), one.errors.count == 0 ? "-" : fmt::format("{:.3f}", one.errors.qsnr()),
               ui::printable(one.example)});
  }
  table.print();
}

/// Packs a GGUF file; an empty `output` only prints what would be packed.
inline int pack_gguf(const tetromino::io::gguf_file& file, tetromino::io::gguf_options options,
                     const std::string& output, bool is_quiet, const tetromino::cpu_t& policy) {
  namespace io = tetromino::io;
  const ui::stop_signals signals;
  std::size_t bytes = 0;
  for (const auto& tensor : file) bytes += tensor.bytes().size();
  ui::progress progress("packing", bytes, is_quiet || output.empty());
  options.progress = [&](std::size_t done) {
    progress.add(done);
    return ui::stop_signals::seen() == 0;
  };
  const auto plan = io::plan_gguf(file, std::move(options));
  if (output.empty()) {
    print_gguf(plan, nullptr);
    return 0;
  }
  const auto report = io::pack_gguf(policy, file, plan, output);
  if (!is_quiet) {
    print_gguf(plan, &report);
    fmt::print("\n{}: {} -> {}\n", output, ui::bytes(bytes), ui::bytes(std::filesystem::file_size(output)));
  }
  return 0;
}

}  // namespace checkpoint
