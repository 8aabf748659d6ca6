#pragma once

/// The options that the example programs have in common, and what they do about mistakes in them.

#include <tetromino/version.hpp>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace ui {

inline std::string version() {
  return fmt::format("{}.{}.{}", TETROMINO_VERSION_MAJOR, TETROMINO_VERSION_MINOR, TETROMINO_VERSION_PATCH);
}

/// Numbers from `low` to `high`. Without CLI11's description, which help would show as "UINT:UINT in [1 - 1024]".
template <class Number>
[[nodiscard]] CLI::Validator within(Number low, Number high) {
  return CLI::Range(low, high).description("");
}

/// Bytes of a model that a thread works on at a time, so that many threads need little more memory than few.
[[nodiscard]] inline std::size_t slice_bytes(unsigned threads) {
  return std::clamp<std::size_t>((16u << 20) / threads, 1u << 18, 2u << 20);
}

/// What is printed: tables for people, JSON for programs, or nothing but errors.
struct output_options {
  bool json = false, quiet = false;
};

/// A program's options: --help with examples and --version are there already.
class command_line : public CLI::App {
 public:
  /// `examples` are arguments to call the program with.
  command_line(const std::string& program, const std::string& description, const std::vector<std::string>& examples)
      : CLI::App(description, program) {
    set_version_flag("--version", fmt::format("{} {}", program, ui::version()));
    std::string text = "Examples:\n";
    for (const std::string& example : examples) text += fmt::format("  {} {}\n", program, example);
    footer(text);
  }

  /// An option, or an argument, that names a file.
  CLI::Option* add_file(const std::string& name, std::string& to, const std::string& help) {
    return add_option(name, to, help)->type_name("FILE");
  }
  void add_threads(unsigned& to) {
    add_option("--threads", to, "threads to use")->capture_default_str()->check(within(1u, 1024u));
  }
  void add_output(output_options& to) {
    auto* const as_json = add_flag("--json", to.json, "print the report as JSON");
    add_flag("--quiet", to.quiet, "print nothing but errors")->excludes(as_json);
  }

  /// Reads the arguments. What it returns, if it holds anything, is to be called and its result to be left with, before
  /// any work: it says what --help and --version ask for (status 0), or what is wrong (2).
  [[nodiscard]] std::function<int()> read(int argc, char** argv) {
    try {
      parse(argc, argv);
      return {};
    } catch (const CLI::ParseError& e) {
      return [this, e] { return exit(e) == 0 ? 0 : 2; };
    }
  }
};

}  // namespace ui
