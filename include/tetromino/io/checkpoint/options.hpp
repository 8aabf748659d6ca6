#pragma once

#include "../../detail/macros_off.hpp"

#include "../../metrics.hpp"   // error_report
#include "../../options.hpp"   // special_values
#include "../safetensors.hpp"  // safetensors_metadata
#include "inputs.hpp"          // input_knowledge
#include "layouts.hpp"         // checkpoint_layout

#include <cstddef>     // std::size_t
#include <functional>  // std::function
#include <string>      // std::string
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What a caller may choose about packing, besides the plan.
struct pack_options {
  special_values special = special_values::reject;
  /// Text for the metadata of the files, besides that of the source.
  safetensors_metadata metadata{};
  std::size_t shard_bytes = 5'000'000'000;
  /// Bytes of values that a thread works on at a time; a few times as many are in memory.
  std::size_t slice_bytes = 2u << 20;
  /// Bytes of values that all threads share where weights are stored [.., K, outputs].
  std::size_t window_bytes = 32u << 20;
  /// Called from any thread with bytes of the source that are done; an answer of false stops the work.
  std::function<bool(std::size_t)> progress{};
};

/// What packing made of a parameter.
struct packed_parameter {
  error_report errors{};           ///< of the rows that were looked at: one slice in `sampled_one_in`
  std::size_t bits = 0;            ///< stored for it, the scale of its activations aside
  std::size_t rounded_blocks = 0;  ///< of a cast: blocks that are not the same values
};

/// What packing made of a model; `parameters` are in the order of the plan.
struct pack_report {
  std::vector<packed_parameter> parameters{};
  std::size_t sampled_one_in = 1;
  std::size_t bytes_read = 0;
  std::size_t bytes_written = 0;
  std::size_t files = 0;
  std::vector<std::string> files_left{};  ///< weights in other forms that lie beside the model and were not copied
};

/// What a caller may choose about verifying.
struct verify_options {
  const input_knowledge* inputs = nullptr;  ///< what the model was packed with, to pack it again
  std::size_t slice_bytes = 2u << 20;
  std::function<bool(std::size_t)> progress{};  ///< as in pack_options
};

/// What verifying has seen.
struct verify_report {
  checkpoint_layout layout = checkpoint_layout::linear;
  std::string recipes{};      ///< as the files say; empty if they do not
  std::size_t packed = 0;     ///< parameters
  std::size_t kept = 0;       ///< parameters, decoded ones among them
  error_report errors{};      ///< of all packed values, as readers decode them
  bool packed_again = false;  ///< all of them gave the same bytes again
};

}  // namespace TETROMINO_NAMESPACE::io

#include "../../detail/macros_back.hpp"
