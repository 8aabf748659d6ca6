/// Feeds any bytes to the reader of routing logs. What it accepts must be valid. Built and run as
/// tests/fuzz/safetensors.cpp.

#include <tetromino/moe/trace_io.hpp>

#include "fuzz/replay.hpp"

#include <sstream>      // std::istringstream
#include <string>       // std::string
#include <string_view>  // std::string_view

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace moe = tetromino::moe;
  const std::string text(reinterpret_cast<const char*>(data), size);

  std::istringstream lines(text);
  const auto trace = moe::try_read_trace_json_lines(lines, "input");
  if (trace) {
    require(moe::try_validate(trace->view()).has_value(), "a valid trace");
    require(trace->tokens() > 0 && trace->view().tokens() == trace->tokens(), "requests that cover the tokens");
  } else {
    require(trace.error().code() == tetromino::errc::malformed_file ||
                trace.error().code() == tetromino::errc::invalid_argument,
            "the kind of the error");
    require(std::string_view(trace.error().what()).size() < 1000, "an error that fits on a screen");
  }
  return 0;
}
