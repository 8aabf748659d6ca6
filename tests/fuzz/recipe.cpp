/// Feeds any text to the recipe parser. What it accepts must be a format with a rule of its own, and must come out the
/// same after its name is read again. Built and run as tests/fuzz/safetensors.cpp.

#include <tetromino/hadamard.hpp>  // check_rotation
#include <tetromino/packed.hpp>    // check_format
#include <tetromino/scaling.hpp>   // recipe

#include "fuzz/replay.hpp"

#include <string_view>  // std::string_view

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tetromino;
  const auto parsed = recipe::try_parse(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!parsed) {
    const errc code = parsed.error().code();
    require(code == errc::unknown_name || code == errc::invalid_argument, "the kind of the error");
    require(std::string_view(parsed.error().what()).size() < 1000, "an error that fits on a screen");
    return 0;
  }
  require(detail::check_format(parsed->format).has_value(), "a format");
  require(has_rule(parsed->format.scale, parsed->rule), "a rule of the format");
  require(has_rule(parsed->format, parsed->macro), "a macro rule of the format");
  require(parsed->rotation == 0 || detail::check_rotation(hadamard{parsed->rotation}).has_value(), "a rotation");
  const auto again = recipe::try_parse(parsed->name());
  require(again.has_value() && again->name() == parsed->name(), "the same name");
  require(*again == *parsed, "the same recipe");
  return 0;
}
