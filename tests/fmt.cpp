#include "check.hpp"

#include <tetromino/fmt.hpp>

#include <string>

TEST_CASE("types print as their names and figures") {
  using namespace tetromino;
  CHECK(fmt::format("{}", recipe::parse("mxfp4-32/oas/mbs-static@64")) == "mxfp4-32/oas/mbs-static@64");
  CHECK(fmt::format("[{:<10}]", scale_rule::four_over_six) == "[four-over-six]");
  CHECK(fmt::format("[{:>6}]", scale_rule::oas) == "[   oas]");
  CHECK(fmt::format("{}", any_format(mbs<mxfp4_16>{})) == "mxfp4-16 mbs@128 (4.562 bits)");
  CHECK(fmt::format("{}", packed_shape{nvfp4{}, 16, 128, 100}) == "[16, 128, 100] of nvfp4 (4.5 bits)");
  const error_report report{4, 100.0, 1.0, 2.0, 0.5};
  CHECK(fmt::format("{}", report) == "20.000 dB over 4 values, relative error 0.1, largest 0.5");
}
