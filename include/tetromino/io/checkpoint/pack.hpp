#pragma once

#include "../../detail/macros_off.hpp"

#include "../../detail/float_state.hpp"  // default_float_state
#include "detail/beside.hpp"             // file_metadata, write_beside
#include "detail/slice_packer.hpp"       // slice_packer
#include "detail/slice_runner.hpp"       // slice_runner
#include "options.hpp"                   // pack_options, pack_report
#include "plan.hpp"                      // pack_plan

#include <cstddef>     // std::size_t
#include <filesystem>  // std::filesystem::path
#include <optional>    // std::optional
#include <utility>     // std::move
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Runs the slices of a model over the policy's executor, batch by batch: first those that tensor scales need, then
/// all.
template <class Policy>
class packer {
 public:
  packer(const Policy& policy, const io::checkpoint& from, const io::pack_plan& plan, const io::pack_options& options,
         shard_writer& to)
      : schedule_(plan, options),
        runner_(policy.executor, from, plan, schedule_, options, memory_),
        slices_(policy, from, plan, options, to) {}

  [[nodiscard]] result<io::pack_report> run() {
    for (const auto& batch : schedule_.batches()) {
      if (auto done = run_batch(batch); !done) return done.error();
    }
    io::pack_report out;
    out.parameters = slices_.take_report();
    out.sampled_one_in = schedule_.sampled_one_in();
    return out;
  }

 private:
  [[nodiscard]] result<void> run_batch(const std::vector<std::size_t>& batch) {
    std::vector<pack_task> measured, all;
    for (const std::size_t i : batch) {
      schedule_.add_tasks(i, all);
      if (slices_.scales().needs_measure(i)) schedule_.add_measuring_tasks(i, measured);
    }
    auto run = runner_.run_all(measured, [this](const pack_task& t, const stored_window* window, slice_buffers& b) {
      return slices_.measure(t, window, b);
    });
    if (!run) return run;
    for (const std::size_t i : batch) {
      if (auto written = slices_.write_scales(i); !written) return written;
    }
    return runner_.run_all(all, [this](const pack_task& t, const stored_window* window, slice_buffers& b) {
      return slices_.work(t, window, b);
    });
  }

  pack_schedule schedule_;
  slice_memory memory_;
  slice_runner runner_;
  slice_packer<Policy> slices_;
};

/// What comes between slices asks too whether to go on: writing back a large model takes a while.
inline result<void> check_stop(const io::pack_options& options) {
  return options.progress && !options.progress(0) ? result<void>(error(errc::io, "stopped")) : result<void>();
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

/// Packs a model as planned. `to` becomes a directory that readers of the layout open, with config.json and the other
/// files of the model; or a single file, if its name ends with .safetensors. Work is split over the policy's executor;
/// each thread has a few slices in memory, whatever the size of the model. Nothing has its final name before all of it
/// is whole. Errors: those of the tensors' values and files, with their names; io, if `to` exists and is no empty
/// directory, leads to a file of the source, or cannot be written, or if progress says to stop.
template <class Policy>
[[nodiscard]] result<pack_report> try_pack(const Policy& policy, const checkpoint& from, const pack_plan& plan,
                                           const std::filesystem::path& to, const pack_options& options = {}) {
  const detail::default_float_state usual;
  const bool is_file = to.extension() == ".safetensors";
  for (std::size_t i = 0; i < from.file_count(); ++i) {
    if (detail::identity_of(to) != from.identity(i)) continue;
    return error(errc::invalid_argument,
                 {to.string(), ": expected another file than the one being read, ", from.file(i).string()});
  }
  if (!from.is_single_file() && detail::is_within(to, from.folder())) {
    return error(errc::invalid_argument, {to.string(), ": expected a place outside of the model being read"});
  }
  std::optional<detail::pending_directory> folder;
  if (!is_file) {
    auto created = detail::pending_directory::try_create(to);
    if (!created) return created.error();
    folder.emplace(std::move(*created));
  }
  std::vector<std::string> left;
  if (folder) {  // before the work, so that what cannot be copied does not cost it
    auto written = detail::write_beside(from, plan, folder->temporary());
    if (!written) return written.error();
    left = std::move(*written);
  }
  const detail::file_metadata metadata(from, plan, options, is_file);
  auto writer =
      detail::shard_writer::try_create(is_file ? to : folder->temporary(), is_file, detail::declared_tensors(plan),
                                       options.shard_bytes, [&](const auto& tensors) { return metadata.of(tensors); });
  if (!writer) return writer.error();
  auto report = detail::packer(policy, from, plan, options, *writer).run();
  if (!report) return report;
  if (auto same = from.try_unchanged(); !same) return same.error();
  if (auto on = detail::check_stop(options); !on) return on.error();
  if (auto done = writer->try_finish(); !done) return done.error();
  report->bytes_written = writer->total_bytes();
  report->files = writer->shard_count();
  for (const auto& tensor : from.tensors()) report->bytes_read += tensor.bytes;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    report->parameters[i].bits = stored_bits(plan.parameters[i]);
  }
  report->files_left = std::move(left);
  if (folder) {
    if (auto on = detail::check_stop(options); !on) return on.error();
    if (auto done = folder->try_commit(); !done) return done.error();
  }
  return report;
}

/// try_pack, throwing its error.
template <class Policy>
pack_report pack(const Policy& policy, const checkpoint& from, const pack_plan& plan, const std::filesystem::path& to,
                 const pack_options& options = {}) {
  return try_pack(policy, from, plan, to, options).value();
}
}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
