/// Feeds any bytes to the reader of routing files, which tells safetensors, NumPy, JSON, CSV, YAML and text by their
/// contents. What it accepts must hold together. Built and run as tests/fuzz/safetensors.cpp.

#include <tetromino/moe/trace_io.hpp>

#include "fuzz/replay.hpp"

#include <sys/mman.h>  // ::memfd_create
#include <unistd.h>    // ::write, ::close

#include <cmath>        // std::isfinite
#include <string>       // std::string, std::to_string
#include <string_view>  // std::string_view
#include <variant>      // std::get_if

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace moe = tetromino::moe;
  const int memory = ::memfd_create("input", 0);
  require(memory >= 0 && ::write(memory, data, size) == static_cast<ssize_t>(size), "room for the input");
  const std::string path = "/proc/self/fd/" + std::to_string(memory);
  for (const auto& options :
       {moe::trace_read_options{}, moe::trace_read_options{.experts = 8, .layers = 2, .experts_per_token = 2}}) {
    const auto read = moe::try_read_routing(path, options);
    if (!read) {
      require(read.error().code() != tetromino::errc::io, "an error of the contents");
      require(std::string_view(read.error().what()).size() < 2000, "an error that fits on a screen");
      continue;
    }
    require(!read->format.empty(), "a name for what was read");
    if (const auto* t = std::get_if<moe::trace>(&read->content)) {
      require(moe::try_validate(t->view()).has_value(), "a valid trace");
      require(t->tokens() == 0 || read->layers.size() == t->shape().layers, "a number for each layer");
      require(t->view().tokens() <= t->tokens(), "requests inside the tokens");
    } else if (const auto* loads = std::get_if<moe::load_table>(&read->content)) {
      require(read->layers.size() == loads->layers, "a number for each layer");
      require(loads->values.size() == loads->layers * loads->experts && loads->experts > 0, "a load for each expert");
      for (const double load : loads->values) require(std::isfinite(load) && load >= 0, "loads that are finite");
    } else {
      const auto& plan = std::get<moe::placement>(read->content);
      require(moe::placement_from_text(moe::to_text(plan)) == plan, "the same plan as text");
    }
  }
  ::close(memory);
  return 0;
}
