#pragma once

#include "detail/macros_off.hpp"

#include "error.hpp"   // error, result
#include "format.hpp"  // any_format

#include <algorithm>    // std::min
#include <array>        // std::array
#include <concepts>     // std::convertible_to
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint32_t
#include <string>       // std::string
#include <string_view>  // std::string_view

namespace TETROMINO_NAMESPACE {

/// How the scale of a block is chosen from its elements; a is the largest magnitude in the block.
enum class scale_rule : std::uint8_t {
  floor,          ///< MX: 2^(floor(log2 a) - 2); the OCP rule
  ceil,           ///< MX: 2^(ceil(log2 a) - 2)
  round_up,       ///< MX: the least power of two with a <= 6 * scale; nothing saturates
  even,           ///< MX: a's mantissa rounded to one bit, then floor
  oas,            ///< MX: the least power of two with a <= 7 * scale (OAS); the default
  min_error,      ///< MX: least squared error of four powers of two. NVFP4: of the E4M3 codes within 8 of amax's
  amax,           ///< NVFP4: E4M3(a / (6 t)), t the tensor scale; the default
  four_over_six,  ///< NVFP4: a mapped to 6 or to 4, whichever errs less; tensor scale with 256 in place of 448
};

/// How the factors of macro blocks are chosen.
///
/// Of 8 bits: elements are multiplied by f = 1 + m / 256, and then packed as if there were no macro blocks.
///
/// Of 2 bits: a closed-form rule gives a block the exponent E that it has without factors. An element x becomes
/// q = E2M1(float(float(x 2^-E) float(1 / f))) with f = 1 + m / 4, and its error is float(float(x 2^-E) - q f). Each
/// group of 8 or 16 elements gets its m by itself, the smaller one on ties. Squared errors are added up in the order of
/// all searches: 16 strided sums (8 of a group of 8), then halves onto halves. Where min_error compares exponents,
/// errors of a block are (g0 + g2) + (g1 + g3) of its groups of 8, g0 + g1 of those of 16. Groups of zeros have m = 0.
enum class macro_rule : std::uint8_t {
  from_amax,   ///< 8 bits: the top 8 mantissa bits of 6 / amax (MBS-S, "mbs-static"), in one pass, for activations.
               ///< 2 bits: the m under which the group's largest element errs least
  search,      ///< 8 bits: least squared error of m = 0, 16, ... 240 (MBS-D, "mbs-search"), for weights.
               ///< 2 bits: least squared error of the group
  search_256,  ///< 8 bits: least squared error of all 256 values ("mbs-search256")
};

/// A format and its rules: everything that names a way to pack, picked at run time.
struct recipe {
  any_format format{};
  scale_rule rule = scale_rule::oas;
  macro_rule macro = macro_rule::search;  ///< used where the format has macro blocks
  std::size_t rotation = 0;               ///< size of the block-Hadamard rotation before packing; 0: none
  bool error_feedback = false;            ///< packed by gptq(), which needs calibration, rather than by quantize()

  /// Reads FORMAT[/RULE][/MACRO][/hadamard-N][/gptq], such as "nvfp4", "mxfp4" (mxfp4-32 by its default rule),
  /// "mxfp4-16/oas/mbs-search", "mxfp4-32/floor", "mxfp4-32/oas/mbs-static@64", "nvfp4/four-over-six" or
  /// "mxfp4-16/min-error/mbs-search256@64/hadamard-16/gptq". Behind @ is how many elements share a factor of 8 bits, or
  /// 8x2 and 16x2 for factors of 2 bits: "mxfp4-32/min-error/mbs-search@8x2". Errors: unknown_name, with the nearest
  /// name and all that exist; invalid_argument for a rule or factors of another format, and for a piece given twice or
  /// in the wrong place.
  TETROMINO_ABI static result<recipe> try_parse(std::string_view name);
  TETROMINO_ABI static recipe parse(std::string_view name) { return try_parse(name).value(); }

  /// The name that parse() reads back.
  [[nodiscard]] TETROMINO_ABI std::string name() const;

  friend TETROMINO_ABI bool operator==(const recipe&, const recipe&) = default;
};

inline namespace TETROMINO_ISA {

/// True where the rule picks scales of this kind.
[[nodiscard]] constexpr bool has_rule(scale_type scale, scale_rule rule) noexcept {
  if (rule == scale_rule::min_error) return true;
  return (rule == scale_rule::amax || rule == scale_rule::four_over_six) == (scale == scale_type::e4m3);
}

/// True where the rule picks factors of this format.
[[nodiscard]] constexpr bool has_rule(const any_format& format, macro_rule rule) noexcept {
  return format.macro_bits == 8 || rule != macro_rule::search_256;
}

/// The rule that a format uses unless told otherwise: oas for MX formats, amax for NVFP4.
[[nodiscard]] constexpr scale_rule default_rule(const any_format& format) noexcept {
  return format.scale == scale_type::e8m0 ? scale_rule::oas : scale_rule::amax;
}

/// NVFP4's tensor scale (decode sense) for the largest magnitude of a tensor: amax / (6 * 448), or amax / (6 * 256) for
/// four_over_six, which needs headroom above the block scale that maps to 4. At least 2^-126, so that it has an inverse
/// and is no subnormal number; 0 for amax = 0. `invertible`: 1 for amax = 0, otherwise that scale or a neighbour of it
/// which is the inverse of its inverse.
[[nodiscard]] TETROMINO_HD constexpr float tensor_scale_for(float amax, scale_rule rule,
                                                            bool invertible = false) noexcept {
  const float codes = rule == scale_rule::four_over_six ? 6.0f * 256.0f : 6.0f * 448.0f;
  const float scale = amax > 0.0f && amax < codes * 0x1p-126f ? 0x1p-126f : amax / codes;
  if (!invertible) return scale;
  return scale == 0.0f ? 1.0f : 1.0f / (1.0f / scale);
}

/// The macro-block byte of macro_rule::from_amax: bits 22..15 of float(6 / amax), 0 for amax = 0.
[[nodiscard]] TETROMINO_HD constexpr std::uint8_t macro_from_amax(float amax) noexcept {
  return amax == 0.0f ? std::uint8_t{0} : static_cast<std::uint8_t>(detail::bit_cast<std::uint32_t>(6.0f / amax) >> 15);
}

/// The factor of a macro-block byte, by which elements are multiplied before they are packed: f = 1 + m / 256.
[[nodiscard]] TETROMINO_HD constexpr float macro_factor(std::uint8_t m) noexcept {
  return detail::bit_cast<float>(0x3F800000u | static_cast<std::uint32_t>(m) << 15);
}

/// A factor of 2 bits, by which elements are multiplied when they are unpacked: f = 1 + m / 4, for m = 0 ... 3.
[[nodiscard]] TETROMINO_HD constexpr float fine_factor(unsigned m) noexcept {
  return detail::bit_cast<float>(0x3F800000u | m << 21);
}
/// What elements are multiplied by instead of a division by that factor.
[[nodiscard]] TETROMINO_HD constexpr float fine_inverse(unsigned m) noexcept { return 1.0f / fine_factor(m); }
/// The m of column k of a row that has these bytes of factors of 2 bits, each for so many elements.
[[nodiscard]] TETROMINO_HD constexpr unsigned fine_bits(const std::uint8_t* macros, std::size_t elements,
                                                        std::size_t k) noexcept {
  const std::size_t i = k / elements;
  return static_cast<unsigned>(macros[i / 4]) >> (i % 4 * 2) & 3u;
}

/// What a closed-form MX rule adds to the bits of a block's largest magnitude a before it takes the exponent. All five
/// rules are floor(log2 a) - 2, or one more where the mantissa passes a threshold: adding what the threshold lacks to
/// the next power of two carries into the exponent field exactly then.
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t carry_of(scale_rule rule) noexcept {
  switch (rule) {
    case scale_rule::ceil:
      return 0x7FFFFFu;  // mantissa above 1
    case scale_rule::round_up:
      return 0x3FFFFFu;  // mantissa above 1.5
    case scale_rule::even:
      return 0x200000u;  // mantissa 1.75 or more
    case scale_rule::oas:
      return 0x1FFFFFu;  // mantissa above 1.75
    default:
      return 0;  // never
  }
}

/// The E8M0 exponent that a closed-form MX rule gives a finite magnitude a, before clamping to [-127, 127]. Below
/// 2^-126, where a is subnormal, the result is too small, but clamps like the true one.
[[nodiscard]] TETROMINO_HD constexpr int mx_exponent(float a, std::uint32_t carry) noexcept {
  return static_cast<int>((detail::bit_cast<std::uint32_t>(a) + carry) >> 23) - 127 - 2;
}

static_assert(fine_factor(0) == 1.0f && fine_factor(1) == 1.25f && fine_factor(3) == 1.75f);
static_assert(tensor_scale_for(0x1p-130f, scale_rule::amax) == 0x1p-126f && tensor_scale_for(0, scale_rule::amax) == 0);
static_assert(mx_exponent(7.0f, carry_of(scale_rule::oas)) == 0);
static_assert(mx_exponent(7.000001f, carry_of(scale_rule::oas)) == 1);
static_assert(mx_exponent(7.0f, carry_of(scale_rule::even)) == 1);
static_assert(mx_exponent(6.0f, carry_of(scale_rule::round_up)) == 0);
static_assert(mx_exponent(4.0f, carry_of(scale_rule::ceil)) == 0 && mx_exponent(4.1f, carry_of(scale_rule::ceil)) == 1);

}  // namespace TETROMINO_ISA

namespace detail::inline TETROMINO_ISA {

/// A rule and its name in recipes.
struct named_rule {
  std::string_view name;
  scale_rule rule;
};
inline constexpr std::array<named_rule, 8> rule_names{{{"floor", scale_rule::floor},
                                                       {"ceil", scale_rule::ceil},
                                                       {"round-up", scale_rule::round_up},
                                                       {"even", scale_rule::even},
                                                       {"oas", scale_rule::oas},
                                                       {"min-error", scale_rule::min_error},
                                                       {"amax", scale_rule::amax},
                                                       {"four-over-six", scale_rule::four_over_six}}};

/// A macro rule and its name in recipes.
struct named_macro {
  std::string_view name;
  macro_rule rule;
};
inline constexpr std::array<named_macro, 3> macro_names{{{"mbs-static", macro_rule::from_amax},
                                                         {"mbs-search", macro_rule::search},
                                                         {"mbs-search256", macro_rule::search_256}}};

/// How many letters have to be added, dropped or changed to make the word b, of small letters, of a, in capitals or
/// not; 3 where that is more than 2.
[[nodiscard]] TETROMINO_COLD inline std::size_t edits_between(std::string_view a, std::string_view b) {
  constexpr std::size_t longest = 24, many = 3;
  if (a.size() > longest || b.size() > longest) return many;
  std::array<std::size_t, longest + 1> row{};
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    const char c = a[i - 1], lower = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t changed = diagonal + (lower != b[j - 1] ? 1 : 0);
      diagonal = row[j];
      row[j] = std::min({changed, row[j] + 1, row[j - 1] + 1});
    }
  }
  return std::min(row[b.size()], many);
}

/// The word of the recipes' language that a misspelt one is closest to, in capitals or not; empty where none is near.
[[nodiscard]] TETROMINO_COLD inline std::string_view nearest_recipe_word(std::string_view misspelt) {
  std::string_view nearest;
  std::size_t least = misspelt.size() < 4 ? 2 : 3;  // short words have many neighbours
  const auto consider = [&](std::string_view candidate) {
    if (const std::size_t edits = edits_between(misspelt, candidate); edits < least) nearest = candidate, least = edits;
  };
  for (const std::string_view format : {"nvfp4", "mxfp4", "mxfp4-32", "mxfp4-16"}) consider(format);
  for (const auto& rule : rule_names) consider(rule.name);
  for (const auto& macro : macro_names) consider(macro.name);
  for (const std::string_view step : {"gptq", "hadamard-16", "hadamard-32", "hadamard-64", "hadamard-128"}) {
    consider(step);
  }
  return nearest;
}

/// The size of a rotation by its name in recipes; 0 where there is none.
[[nodiscard]] constexpr std::size_t rotation_named(std::string_view piece) noexcept {
  return piece == "hadamard-16"    ? 16
         : piece == "hadamard-32"  ? 32
         : piece == "hadamard-64"  ? 64
         : piece == "hadamard-128" ? 128
                                   : 0;
}

/// What a piece that no recipe has seems to be meant as.
[[nodiscard]] constexpr std::string_view kind_of_piece(std::string_view piece, bool is_first) noexcept {
  if (piece.starts_with("hadamard")) return "rotation";
  if (piece.starts_with("mbs")) return "macro rule";
  return is_first ? "rule" : "piece";
}

inline constexpr std::string_view recipe_help =
    "a recipe is FORMAT[/RULE][/MACRO][/hadamard-N][/gptq]: mxfp4-32 (or mxfp4) or mxfp4-16 with floor, ceil, "
    "round-up, even, oas "
    "or min-error, then "
    "optionally mbs-static, mbs-search or mbs-search256, with @32, @64, @128 (default) or @256 for the macro block, or "
    "with @8x2 or @16x2 for factors of 2 bits (mxfp4-32, not mbs-search256); or "
    "nvfp4 with amax, four-over-six or min-error; then optionally hadamard-16, -32, -64 or -128, then optionally gptq";

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// The rule's name in recipes.
[[nodiscard]] constexpr std::string_view name_of(scale_rule rule) noexcept {
  for (const auto& [name, value] : detail::rule_names) {
    if (value == rule) return name;
  }
  return "?";
}

/// The format's name in recipes, without its macro block.
[[nodiscard]] constexpr std::string_view name_of(const any_format& format) noexcept {
  return format.scale == scale_type::e4m3 ? "nvfp4" : format.block == 16 ? "mxfp4-16" : "mxfp4-32";
}

}  // namespace TETROMINO_ISA

TETROMINO_COLD inline std::string recipe::name() const {
  std::string_view factors;
  for (const auto& [name, value] : detail::macro_names) {
    if (value == macro && format.macro_block != 0) factors = name;
  }
  const bool has_size = format.macro_block != 0 && format.macro_block != 128;
  const bool has_bits = format.macro_block != 0 && format.macro_bits != 8;
  const auto number_if = [](bool shown, std::size_t n) {
    return shown ? detail::text_piece(n) : detail::text_piece("");
  };
  return detail::joined({name_of(format), '/', name_of(rule), factors.empty() ? "" : "/", factors, has_size ? "@" : "",
                         number_if(has_size, elements_per_factor(format)), has_bits ? "x" : "",
                         number_if(has_bits, format.macro_bits), rotation != 0 ? "/hadamard-" : "",
                         number_if(rotation != 0, rotation), error_feedback ? "/gptq" : ""});
}

namespace detail::inline TETROMINO_ISA {

/// What can be wrong with the name of a recipe.
struct recipe_errors {
  static constexpr std::size_t shown = 60;  // characters of a wrong name that a message repeats
  std::string_view name;

  [[nodiscard]] TETROMINO_COLD error unknown(std::string_view what, std::string_view piece) const {
    const std::string_view meant = nearest_recipe_word(piece);
    return error(errc::unknown_name,
                 {"recipe \"", name.substr(0, shown), "\": unknown ", what, " \"", piece.substr(0, shown),
                  meant.empty() ? "\"; " : "\", did you mean \"", meant, meant.empty() ? "" : "\"? ", recipe_help});
  }
  [[nodiscard]] TETROMINO_COLD error invalid(std::string_view subject, std::string_view piece,
                                             std::string_view why) const {
    return error(errc::invalid_argument,
                 {"recipe \"", name.substr(0, shown), "\": ", subject, piece, why, "; ", recipe_help});
  }
  [[nodiscard]] error misplaced(std::string_view kind, std::string_view piece, bool is_second) const {
    return invalid(kind, piece, is_second ? "\" is a second one" : "\" comes too late");
  }
};

/// Reads MACRO[@SIZE] into `out`, which has what is before it. `format` is the format's name, `kind` what the piece is
/// where no macro rule has its name.
TETROMINO_COLD inline result<void> read_macro(const recipe_errors& wrong, std::string_view format,
                                              std::string_view kind, std::string_view piece, recipe& out) {
  const std::size_t at = piece.find('@');
  bool found = false;
  for (const auto& [macro_name, value] : macro_names) {
    if (macro_name == piece.substr(0, at)) out.macro = value, found = true;
  }
  if (!found) return wrong.unknown(kind, piece);
  if (out.format.macro_block != 0 || out.rotation != 0 || out.error_feedback) {
    return wrong.misplaced("macro rule \"", piece.substr(0, at), out.format.macro_block != 0);
  }
  if (out.format.scale == scale_type::e4m3) return wrong.invalid(format, " has no macro blocks", "");
  const std::string_view size = at == std::string_view::npos ? "128" : piece.substr(at + 1);
  if (size == "8x2" || size == "16x2") {
    if (out.format.block != 32) return wrong.invalid(format, " has no factors of 2 bits", "");
    if (out.macro == macro_rule::search_256) {
      return wrong.invalid("mbs-search256 is for factors of 8 bits, not ", size, "");
    }
    out.format = size == "8x2" ? any_format(mbs<mxfp4, 8, 2>{}) : any_format(mbs<mxfp4, 16, 2>{});
    return {};
  }
  out.format.macro_block = size == "32" ? 32 : size == "64" ? 64 : size == "128" ? 128 : size == "256" ? 256 : 0;
  if (out.format.macro_block == 0) return wrong.unknown("macro-block size", size);
  return {};
}

}  // namespace detail::inline TETROMINO_ISA

TETROMINO_COLD inline result<recipe> recipe::try_parse(std::string_view name) {
  const detail::recipe_errors wrong{name};
  // The pieces still to be read; an empty piece is none of the names below.
  std::string_view rest = name;
  bool more = true;
  const auto next_piece = [&] {
    const std::size_t slash = rest.find('/');
    const std::string_view piece = rest.substr(0, slash);
    more = slash != std::string_view::npos;
    rest = more ? rest.substr(slash + 1) : std::string_view{};
    return piece;
  };

  recipe out;
  const std::string_view format = next_piece();
  if (format == "nvfp4") {
    out.format = nvfp4{};
  } else if (format == "mxfp4-16") {
    out.format = mxfp4_16{};
  } else if (format != "mxfp4-32" && format != "mxfp4") {
    return wrong.unknown("format", format);
  }
  out.rule = default_rule(out.format);

  bool is_first = more;  // only the first piece can be a rule
  bool has_own_rule = false;
  while (more) {
    const std::string_view piece = next_piece();
    bool is_rule = false;
    for (const auto& [rule_name, value] : detail::rule_names) {
      if (rule_name != piece) continue;
      if (!is_first) return wrong.misplaced("rule \"", piece, has_own_rule);
      out.rule = value, is_rule = has_own_rule = true;
    }
    if (is_rule && !has_rule(out.format.scale, out.rule)) return wrong.invalid(format, " has no rule ", piece);
    const std::string_view kind = detail::kind_of_piece(piece, is_first);
    is_first = false;
    if (is_rule) continue;
    if (const std::size_t size = detail::rotation_named(piece); size != 0) {
      if (out.rotation != 0 || out.error_feedback) return wrong.misplaced("rotation \"", piece, out.rotation != 0);
      out.rotation = size;
    } else if (piece == "gptq") {
      if (out.error_feedback) return wrong.misplaced("step \"", piece, true);
      out.error_feedback = true;
    } else if (auto read = detail::read_macro(wrong, format, kind, piece, out); !read) {
      return read.error();
    }
  }
  return out;
}

/// A recipe, or the name of one: what the calls that pack take.
class named_recipe : public result<recipe> {
 public:
  TETROMINO_ABI named_recipe(const recipe& r) : result<recipe>(r) {}
  template <std::convertible_to<std::string_view> Name>
  TETROMINO_ABI named_recipe(const Name& name) : result<recipe>(recipe::try_parse(name)) {}
};

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
