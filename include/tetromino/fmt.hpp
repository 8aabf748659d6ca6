#pragma once

#include "detail/macros_off.hpp"

/// Opt-in: prints the library's types with fmt. `fmt::print("{}: {}", recipe, report)`.

#include "metrics.hpp"  // error_report
#include "packed.hpp"   // packed_shape
#include "scaling.hpp"  // recipe

#include <fmt/format.h>  // fmt::formatter

#include <string>       // std::string
#include <string_view>  // std::string_view

/// A recipe by its name, such as mxfp4-16/oas/mbs-search; takes string options ({:<28}).
template <>
struct fmt::formatter<tetromino::recipe> : fmt::formatter<std::string> {
  template <class Context>
  auto format(const tetromino::recipe& r, Context& context) const {
    return fmt::formatter<std::string>::format(r.name(), context);
  }
};

/// A rule by its name, such as oas; takes string options.
template <>
struct fmt::formatter<tetromino::scale_rule> : fmt::formatter<std::string_view> {
  template <class Context>
  auto format(tetromino::scale_rule rule, Context& context) const {
    return fmt::formatter<std::string_view>::format(tetromino::name_of(rule), context);
  }
};

/// A format as its name and bits, such as "mxfp4-32 (4.25 bits)"; takes string options.
template <>
struct fmt::formatter<tetromino::any_format> : fmt::formatter<std::string> {
  template <class Context>
  auto format(const tetromino::any_format& f, Context& context) const {
    const std::string bits = f.macro_bits == 8 ? "" : fmt::format("x{}", f.macro_bits);
    const std::string macro =
        f.macro_block == 0 ? "" : fmt::format(" mbs@{}{}", tetromino::elements_per_factor(f), bits);
    return fmt::formatter<std::string>::format(
        fmt::format("{}{} ({:.4g} bits)", tetromino::name_of(f), macro, tetromino::bits_per_weight(f)), context);
  }
};

/// The shape and format of packed storage, such as "[16, 128, 128] of mxfp4-32 (4.25 bits)"; takes string options.
template <>
struct fmt::formatter<tetromino::packed_shape> : fmt::formatter<std::string> {
  template <class Context>
  auto format(const tetromino::packed_shape& s, Context& context) const {
    return fmt::formatter<std::string>::format(fmt::format("[{}, {}, {}] of {}", s.matrices, s.rows, s.cols, s.format),
                                               context);
  }
};

/// An error report as one line: QSNR, relative and largest error; takes string options.
template <>
struct fmt::formatter<tetromino::error_report> : fmt::formatter<std::string> {
  template <class Context>
  auto format(const tetromino::error_report& r, Context& context) const {
    return fmt::formatter<std::string>::format(
        fmt::format("{:.3f} dB over {} values, relative error {:.4g}, largest {:.4g}", r.qsnr(), r.count,
                    r.relative_error(), r.max_abs_error),
        context);
  }
};

#include "detail/macros_back.hpp"
