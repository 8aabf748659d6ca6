#include "check.hpp"

#include <tetromino/scaling.hpp>

#include "reference/floats.hpp"
#include "reference/generators.hpp"
#include "reference/scaling.hpp"

#include <cmath>        // std::ldexp
#include <string>       // std::string
#include <string_view>  // std::string_view

namespace {

using tetromino::any_format;
using tetromino::carry_of;
using tetromino::errc;
using tetromino::macro_rule;
using tetromino::mx_exponent;
using tetromino::recipe;
using tetromino::scale_rule;
using tetromino::scale_type;

struct closed_rule {
  scale_rule rule;
  reference::mx_rule expected;
};
constexpr closed_rule closed_rules[] = {{scale_rule::floor, reference::mx_rule::floor},
                                        {scale_rule::ceil, reference::mx_rule::ceil},
                                        {scale_rule::round_up, reference::mx_rule::round_up},
                                        {scale_rule::even, reference::mx_rule::even},
                                        {scale_rule::oas, reference::mx_rule::oas}};

constexpr double smallest_normal = 0x1p-126;

errc code_of(const std::string& name) {
  const auto parsed = recipe::try_parse(name);
  REQUIRE(!parsed);
  return parsed.error().code();
}

}  // namespace

TEST_CASE("each E8M0 rule around every power of two times 1, 1.25, 1.5, 1.75") {
  for (const closed_rule& entry : closed_rules) {
    reference::disagreements found;
    for (int exponent = -126; exponent < 128; ++exponent) {
      for (const double mantissa : {1.0, 1.25, 1.5, 1.75, 2.0}) {
        reference::near(std::ldexp(mantissa, exponent), 64, [&](float a) {
          if (!(static_cast<double>(a) >= smallest_normal) || std::isinf(a)) return;
          const int expected = reference::exponent_of_amax(entry.expected, static_cast<double>(a));
          found.compare(reference::bits_of(a), static_cast<std::uint32_t>(expected),
                        static_cast<std::uint32_t>(mx_exponent(a, carry_of(entry.rule))));
        });
      }
    }
    INFO(tetromino::name_of(entry.rule) << ": " << found);
    CHECK(found.none());
  }
}

TEST_CASE("each E8M0 rule puts the largest magnitude where it promises") {
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 100000; ++i) {
    const float a = reference::float_of(static_cast<std::uint32_t>(0x00800000 + random.below(0x7F000000)));
    const auto at = [&](scale_rule rule) {
      return std::ldexp(static_cast<double>(a), -mx_exponent(a, carry_of(rule)));
    };
    const double floor = at(scale_rule::floor);
    const double ceil = at(scale_rule::ceil);
    const double up = at(scale_rule::round_up);
    const double even = at(scale_rule::even);
    const double oas = at(scale_rule::oas);
    REQUIRE((floor >= 4 && floor < 8));
    REQUIRE((ceil > 2 && ceil <= 4));
    REQUIRE((up > 3 && up <= 6));
    REQUIRE((even >= 3.5 && even < 7));
    REQUIRE((oas > 3.5 && oas <= 7));
  }
}

TEST_CASE("even and oas differ at mantissa 1.75 only") {
  for (int exponent = -126; exponent < 128; ++exponent) {
    reference::near(std::ldexp(1.75, exponent), 8, [&](float a) {
      if (a < 0) return;
      const int even = mx_exponent(a, carry_of(scale_rule::even));
      const int oas = mx_exponent(a, carry_of(scale_rule::oas));
      CHECK(even - oas == (static_cast<double>(a) == std::ldexp(1.75, exponent) ? 1 : 0));
    });
  }
}

TEST_CASE("each E8M0 rule for every normal float", "[.slow]") {
  for (const closed_rule& entry : closed_rules) {
    reference::disagreements found;
    const std::uint32_t carry = carry_of(entry.rule);
    for (std::uint32_t bits = 0x00800000; bits < reference::infinity_bits; ++bits) {
      const float a = reference::float_of(bits);
      // Each interval of the table above, looked up by the exponent that the library gave: exact in double.
      const int got = mx_exponent(a, carry);
      const double y = std::ldexp(static_cast<double>(a), -got);
      bool right = false;
      switch (entry.expected) {
        case reference::mx_rule::floor:
          right = y >= 4 && y < 8;
          break;
        case reference::mx_rule::ceil:
          right = y > 2 && y <= 4;
          break;
        case reference::mx_rule::round_up:
          right = y > 3 && y <= 6;
          break;
        case reference::mx_rule::even:
          right = y >= 3.5 && y < 7;
          break;
        default:
          right = y > 3.5 && y <= 7;
          break;
      }
      found.compare(bits, 1, right ? 1 : 0);
    }
    INFO(tetromino::name_of(entry.rule) << ": " << found);
    CHECK(found.none());
  }
}

TEST_CASE("NVFP4 tensor scales are one rounded division") {
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 100000; ++i) {
    const float a = reference::float_of(static_cast<std::uint32_t>(random.below(reference::infinity_bits)));
    REQUIRE(tetromino::tensor_scale_for(a, scale_rule::amax) == reference::tensor_scale(reference::nv_rule::amax, a));
    REQUIRE(tetromino::tensor_scale_for(a, scale_rule::min_error) ==
            reference::tensor_scale(reference::nv_rule::min_error, a));
    REQUIRE(tetromino::tensor_scale_for(a, scale_rule::four_over_six) ==
            reference::tensor_scale(reference::nv_rule::four_over_six, a));
  }
  CHECK(tetromino::tensor_scale_for(2688.0f, scale_rule::amax) == 1.0f);
  CHECK(tetromino::tensor_scale_for(1536.0f, scale_rule::four_over_six) == 1.0f);
  CHECK(tetromino::tensor_scale_for(0.0f, scale_rule::amax) == 0.0f);
}

TEST_CASE("static macro-block bytes are the upper mantissa bits of 6 / amax") {
  reference::disagreements found;
  const auto compare = [&](float a) {
    if (a < 0 || std::isinf(a)) return;
    found.compare(reference::bits_of(a), reference::static_macro(a), tetromino::macro_from_amax(a));
  };
  for (std::uint64_t bits = 0; bits < reference::infinity_bits; bits += 4999) {
    compare(reference::float_of(static_cast<std::uint32_t>(bits)));
  }
  for (int exponent = -149; exponent < 128; ++exponent) {
    // Where the byte changes: 6 / amax = 1 + m/256.
    for (unsigned m = 0; m < 256; m += 15)
      reference::near(std::ldexp(6.0 / (1.0 + m / 256.0), exponent - 3), 8, compare);
  }
  for (const std::uint32_t bits : {0u, 1u, 2u, 0x7FFFFFu, 0x800000u, 0x7F7FFFFFu}) compare(reference::float_of(bits));
  INFO(found);
  CHECK(found.none());
  CHECK(tetromino::macro_from_amax(6.0f) == 0);
  CHECK(tetromino::macro_from_amax(4.0f) == 128);
  CHECK(tetromino::macro_from_amax(0.0f) == 0);
}

TEST_CASE("macro-block factors") {
  for (unsigned m = 0; m < 256; ++m) {
    CHECK(tetromino::macro_factor(static_cast<std::uint8_t>(m)) == reference::macro_factor(m));
  }
  for (unsigned m = 0; m < 4; ++m) {
    CHECK(tetromino::fine_factor(m) == reference::fine_factor(m));
    CHECK(tetromino::fine_inverse(m) == reference::quotient(1, reference::fine_factor(m)));
  }
  const std::uint8_t bytes[] = {0b11100100, 0b00011011};
  for (std::size_t k = 0; k < 64; ++k) {
    CHECK(tetromino::fine_bits(bytes, 8, k) == (k < 32 ? k / 8 : 7 - k / 8));
  }
}

TEST_CASE("every recipe has a name that reads back") {
  int count = 0;
  for (const std::string format : {"mxfp4-32", "mxfp4-16"}) {
    for (const std::string rule : {"floor", "ceil", "round-up", "even", "oas", "min-error"}) {
      const recipe plain = recipe::parse(format + "/" + rule);
      CHECK(plain.name() == format + "/" + rule);
      CHECK(plain.format.block == (format == "mxfp4-32" ? 32u : 16u));
      CHECK(plain.format.macro_block == 0);
      CHECK(plain.format.scale == scale_type::e8m0);
      for (const std::string macro : {"mbs-static", "mbs-search", "mbs-search256"}) {
        for (const std::string size : {"", "@32", "@64", "@128", "@256"}) {
          const recipe r = recipe::parse(format + "/" + rule + "/" + macro + size);
          CHECK(r.format.macro_block == (size.empty() ? 128u : std::stoul(size.substr(1))));
          CHECK(recipe::parse(r.name()) == r);
          ++count;
        }
      }
    }
  }
  CHECK(count == 2 * 6 * 3 * 5);
  for (const std::string macro : {"mbs-static", "mbs-search"}) {
    for (const unsigned elements : {8u, 16u}) {
      const std::string name = "mxfp4-32/min-error/" + macro + "@" + std::to_string(elements) + "x2";
      const recipe r = recipe::parse(name);
      CHECK(r.name() == name);
      CHECK(tetromino::elements_per_factor(r.format) == elements);
      CHECK(r.format.macro_block == 4 * elements);
      CHECK(r.format.macro_bits == 2);
      CHECK(r.format.block == 32);
    }
  }
  for (const std::string rule : {"amax", "four-over-six", "min-error"}) {
    const recipe r = recipe::parse("nvfp4/" + rule);
    CHECK(r.name() == "nvfp4/" + rule);
    CHECK(r.format == any_format(tetromino::nvfp4{}));
  }
  CHECK(recipe::parse("mxfp4-16/oas/mbs-search").name() == "mxfp4-16/oas/mbs-search");
  CHECK(recipe::parse("mxfp4-32/oas/mbs-static@64").name() == "mxfp4-32/oas/mbs-static@64");
}

TEST_CASE("a name that is no recipe gets an error that lists what exists") {
  for (const std::string name : {"",
                                 "/",
                                 "mxfp5",
                                 "mxfp4-64/floor",
                                 "mxfp4-32/",
                                 "mxfp4-32/flor",
                                 "MXFP4-32/floor",
                                 "mxfp4-32/floor/",
                                 "mxfp4-32/floor/mbs",
                                 "mxfp4-32/oas/mbs-search@",
                                 " mxfp4-32/oas",
                                 "mxfp4-32/oas/mbs-search@48",
                                 "mxfp4-32/oas/mbs-search@0128",
                                 "mxfp4-32/oas/mbs-search@128x",
                                 "mxfp4-32/oas/mbs-search/mbs-search",
                                 "mxfp4-32/oas@64",
                                 "nvfp4/oass",
                                 "mxfp4-32/oas/mbs-search@-64",
                                 "mxfp4-32/oas/mbs-search@8",
                                 "mxfp4-32/oas/mbs-search@32x2",
                                 "mxfp4-32/oas/mbs-search@8x4",
                                 "mxfp4-32/oas/mbs-search@8x2x",
                                 "mxfp4-32/oas/mbs-search@99999999999999999999"}) {
    INFO("\"" << name << "\"");
    const auto parsed = recipe::try_parse(name);
    REQUIRE(!parsed);
    CHECK_THAT(parsed.error().what(), tetromino_test::contains("nvfp4"));
    CHECK_THAT(parsed.error().what(), tetromino_test::contains("mxfp4-16"));
    CHECK_THAT(parsed.error().what(), tetromino_test::contains("four-over-six"));
    CHECK_THROWS_AS(recipe::parse(name), tetromino::error);
  }
  CHECK(code_of("int4/floor") == errc::unknown_name);
  CHECK(std::string(recipe::try_parse(std::string(5000, 'x')).error().what()).size() < 1000);
  CHECK(code_of("mxfp4-32/flor") == errc::unknown_name);
  const auto said = [](const char* name) { return std::string(recipe::try_parse(name).error().what()); };
  CHECK_THAT(said("mxfp4-32/flor"), tetromino_test::contains("unknown rule \"flor\", did you mean \"floor\"?"));
  CHECK_THAT(said("mxfp-4"), tetromino_test::contains("unknown format \"mxfp-4\", did you mean \"mxfp4\"?"));
  CHECK_THAT(said("nvfp4/amax/gptg"), tetromino_test::contains("did you mean \"gptq\"?"));
  CHECK(said("nvfp4/simulated-annealing").find("did you mean") == std::string::npos);
  CHECK_THAT(said("NVFP4"), tetromino_test::contains("unknown format \"NVFP4\", did you mean \"nvfp4\"?"));
  CHECK_THAT(said("mxfp4/OAS"), tetromino_test::contains("unknown rule \"OAS\", did you mean \"oas\"?"));
  CHECK_THAT(said("mxfp4/hadamard-3"),
             tetromino_test::contains("unknown rotation \"hadamard-3\", did you mean \"hadamard-32\"?"));
  CHECK_THAT(said("mxfp4/mbs-serch"),
             tetromino_test::contains("unknown macro rule \"mbs-serch\", did you mean \"mbs-search\"?"));
}

TEST_CASE("a piece of a recipe given twice or too late is named, and is no unknown one") {
  const auto said = [](const char* name) {
    CAPTURE(name);
    CHECK(code_of(name) == errc::invalid_argument);
    const std::string what = recipe::try_parse(name).error().what();
    CHECK(what.find("unknown") == std::string::npos);
    CHECK(what.find("did you mean") == std::string::npos);
    return what;
  };
  CHECK_THAT(said("nvfp4/amax/amax"), tetromino_test::contains("rule \"amax\" is a second one"));
  CHECK_THAT(said("nvfp4/amax/min-error"), tetromino_test::contains("rule \"min-error\" is a second one"));
  CHECK_THAT(said("mxfp4/hadamard-16/oas"), tetromino_test::contains("rule \"oas\" comes too late"));
  CHECK_THAT(said("mxfp4/oas/mbs-search/mbs-static@64"),
             tetromino_test::contains("macro rule \"mbs-static\" is a second one"));
  CHECK_THAT(said("mxfp4/hadamard-16/mbs-search"), tetromino_test::contains("\"mbs-search\" comes too late"));
  CHECK_THAT(said("nvfp4/gptq/mbs-search"), tetromino_test::contains("\"mbs-search\" comes too late"));
  CHECK_THAT(said("nvfp4/hadamard-16/hadamard-32"),
             tetromino_test::contains("rotation \"hadamard-32\" is a second one"));
  CHECK_THAT(said("nvfp4/gptq/hadamard-32"), tetromino_test::contains("rotation \"hadamard-32\" comes too late"));
  CHECK_THAT(said("nvfp4/gptq/gptq"), tetromino_test::contains("step \"gptq\" is a second one"));
}

TEST_CASE("what a recipe's name leaves out has a default") {
  CHECK(recipe::parse("nvfp4") == recipe::parse("nvfp4/amax"));
  CHECK(recipe::parse("mxfp4") == recipe::parse("mxfp4-32/oas"));
  CHECK(recipe::parse("mxfp4/floor") == recipe::parse("mxfp4-32/floor"));
  CHECK(recipe::parse("mxfp4-16/mbs-search@64/gptq") == recipe::parse("mxfp4-16/oas/mbs-search@64/gptq"));
  CHECK(recipe::parse("nvfp4/hadamard-16").name() == "nvfp4/amax/hadamard-16");
}

TEST_CASE("a rule of another format is an invalid argument") {
  CHECK(code_of("nvfp4/floor") == errc::invalid_argument);
  CHECK(code_of("nvfp4/oas") == errc::invalid_argument);
  CHECK(code_of("mxfp4-32/amax") == errc::invalid_argument);
  CHECK(code_of("mxfp4-16/four-over-six") == errc::invalid_argument);
  CHECK(code_of("nvfp4/amax/mbs-search") == errc::invalid_argument);
  const auto said = [](const char* name) {
    CHECK(code_of(name) == errc::invalid_argument);
    return std::string(recipe::try_parse(name).error().what());
  };
  CHECK_THAT(said("mxfp4-16/oas/mbs-search@8x2"), tetromino_test::contains("mxfp4-16 has no factors of 2 bits"));
  CHECK_THAT(said("mxfp4/oas/mbs-search256@16x2"),
             tetromino_test::contains("mbs-search256 is for factors of 8 bits, not 16x2"));
}
