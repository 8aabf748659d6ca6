#pragma once

/// The options that the example programs have in common, and what they do about mistakes in them. CLI11 reads them, in
/// command_line.cpp alone: it takes the compiler longer than most of what programs do with their options.

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace ui {

/// Tetromino's version: "1.2.3".
[[nodiscard]] std::string version();

/// Bytes of a model that a thread works on at a time, so that many threads need little more memory than few.
[[nodiscard]] inline std::size_t slice_bytes(unsigned threads) {
  return std::clamp<std::size_t>((16u << 20) / threads, 1u << 18, 2u << 20);
}

/// What is printed: tables for people, JSON for programs, or nothing but errors.
struct output_options {
  bool json = false, quiet = false;
};

/// An option or argument of a command_line, which has to outlive it. What is said of it can be said in one go:
/// app.add_option("--nodes", nodes, "nodes").within(1, 8).shows_default();
class option {
 public:
  explicit option(CLI::Option* of) : of_(of) {}

  option required() const;
  /// What help calls the value: FILE.
  option value_name(const std::string& name) const;
  /// Help names the value that is there now.
  option shows_default() const;
  /// One argument holds several values, with this between them.
  option split_at(char separator) const;

  /// Numbers from `low` to `high`; integers if these are.
  option within(unsigned low, unsigned high) const;
  option within(double low, double high) const;
  option positive() const;
  option one_of(const std::vector<std::string>& words) const;

  /// Must not be given without `other`, or together with it.
  option needs(const option& other) const;
  option excludes(const option& other) const;

  /// Whether it was given, and how it is written.
  [[nodiscard]] bool is_given() const;
  [[nodiscard]] std::string name() const;

 private:
  CLI::Option* of_;
};

/// A program's options: --help with examples and --version are there already.
class command_line {
 public:
  /// `examples` are arguments to call the program with.
  command_line(const std::string& program, const std::string& description, const std::vector<std::string>& examples);
  command_line(const command_line&) = delete;
  command_line& operator=(const command_line&) = delete;
  ~command_line();

  /// An option, or an argument where `name` has no dashes, whose value is written to `to`: a number, a string, vectors
  /// of them, or an std::optional of unsigned or double.
  template <class Value>
  option add_option(const std::string& name, Value& to, const std::string& help);
  option add_flag(const std::string& name, bool& to, const std::string& help);
  /// One that names a file.
  option add_file(const std::string& name, std::string& to, const std::string& help);
  void add_threads(unsigned& to);
  void add_output(output_options& to);

  /// Reads the arguments. What it returns, if it holds anything, is to be called and its result to be left with, before
  /// any work: it says what --help and --version ask for (status 0), or what is wrong (2).
  [[nodiscard]] std::function<int()> read(int argc, char** argv);

 private:
  std::unique_ptr<CLI::App> app_;
};

}  // namespace ui
