#pragma once

/// GGUF files through quantize_checkpoint: F16, BF16 or F32 in, MXFP4 or NVFP4 blocks out, all keys as they were.

#include "../command_line.hpp"
#include "../ui.hpp"

#include <tetromino/cpu.hpp>
#include <tetromino/io/gguf/pack.hpp>
#include <tetromino/io/imatrix.hpp>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <map>
#include <optional>
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

/// Every tensor, as --list prints it.
inline void list_gguf(const tetromino::io::gguf_plan& plan) {
  for (const auto& planned : plan.tensors) {
    fmt::print("{}  {}\n", ui::printable(planned.source->name()),
               planned.is_packed ? planned.how.name() : fmt::format("kept: {}", ui::printable(planned.reason)));
  }
}

/// The same for programs: one JSON object.
inline nlohmann::ordered_json gguf_json(const tetromino::io::gguf_plan& plan,
                                        const tetromino::io::gguf_report* report) {
  nlohmann::ordered_json tensors = nlohmann::ordered_json::array();
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    const auto& planned = plan.tensors[i];
    nlohmann::ordered_json one = {{"name", planned.source->name()}, {"shape", planned.source->shape()}};
    one["packed"] = planned.is_packed;
    if (planned.is_packed) {
      one["recipe"] = planned.how.name();
      if (report != nullptr) one["qsnr_db"] = (*report)[i].errors.qsnr();
    } else {
      one["why"] = planned.reason;
    }
    tensors.push_back(std::move(one));
  }
  return tensors;
}

/// A GGUF file to pack, and what to say of it.
struct gguf_job {
  std::string input, output;  ///< an empty output: only what would be packed
  ui::output_options print;
  bool list = false;  ///< every tensor, too
};

inline int pack_gguf(const gguf_job& job, tetromino::io::gguf_options options, const tetromino::cpu_t& policy) {
  namespace io = tetromino::io;
  const auto file = io::gguf_file::open(job.input);
  const ui::stop_signals signals;
  std::size_t bytes = 0;
  for (const auto& tensor : file) bytes += tensor.bytes().size();
  ui::progress progress("packing", bytes, job.print.quiet || job.output.empty());
  options.progress = [&](std::size_t done) {
    progress.add(done);
    return ui::stop_signals::seen() == 0;
  };
  const auto plan = io::plan_gguf(file, std::move(options));
  std::optional<io::gguf_report> report;
  if (!job.output.empty()) {
    auto done = io::try_pack_gguf(policy, file, plan, job.output);
    if (!done && ui::stop_signals::seen() != 0) {
      throw tetromino::error(tetromino::errc::io, "stopped by a signal; nothing was written");
    }
    report = std::move(done).value();
    ui::say_if_too_late(job.output);
  }
  if (job.print.quiet) return 0;
  const io::gguf_report* const made = report ? &*report : nullptr;
  const std::size_t written = report ? std::filesystem::file_size(job.output) : 0;
  if (job.print.json) {
    nlohmann::ordered_json out = {{"input", job.input}, {"output", job.output}, {"layout", "gguf"}};
    if (report) out["bytes_read"] = bytes, out["bytes_written"] = written;
    out["tensors"] = gguf_json(plan, made);
    ui::print_json(out);
    return 0;
  }
  if (job.list) list_gguf(plan);
  print_gguf(plan, made);
  if (report) fmt::print("\n{}: {} -> {}\n", job.output, ui::bytes(bytes), ui::bytes(written));
  return 0;
}

}  // namespace checkpoint
