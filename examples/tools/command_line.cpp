#include "command_line.hpp"

#include <tetromino/version.hpp>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <cstdint>
#include <optional>

namespace ui {

std::string version() {
  return fmt::format("{}.{}.{}", TETROMINO_VERSION_MAJOR, TETROMINO_VERSION_MINOR, TETROMINO_VERSION_PATCH);
}

option option::required() const {
  of_->required();
  return *this;
}

option option::value_name(const std::string& name) const {
  of_->type_name(name);
  return *this;
}

option option::shows_default() const {
  of_->capture_default_str();
  return *this;
}

option option::split_at(char separator) const {
  of_->delimiter(separator);
  return *this;
}

// Without CLI11's description, which help would show as "UINT:UINT in [1 - 1024]".
option option::within(unsigned low, unsigned high) const {
  of_->check(CLI::Range(low, high).description(""));
  return *this;
}

option option::within(double low, double high) const {
  of_->check(CLI::Range(low, high).description(""));
  return *this;
}

option option::positive() const {
  of_->check(CLI::PositiveNumber);
  return *this;
}

option option::one_of(const std::vector<std::string>& words) const {
  of_->check(CLI::IsMember(words));
  return *this;
}

option option::needs(const option& other) const {
  of_->needs(other.of_);
  return *this;
}

option option::excludes(const option& other) const {
  of_->excludes(other.of_);
  return *this;
}

bool option::is_given() const { return of_->count() > 0; }

std::string option::name() const { return of_->get_name(); }

command_line::command_line(const std::string& program, const std::string& description,
                           const std::vector<std::string>& examples)
    : app_(std::make_unique<CLI::App>(description, program)) {
  app_->set_version_flag("--version", fmt::format("{} {}", program, version()));
  std::string text = "Examples:\n";
  for (const std::string& example : examples) text += fmt::format("  {} {}\n", program, example);
  app_->footer(text);
}

command_line::~command_line() = default;

template <class Value>
option command_line::add_option(const std::string& name, Value& to, const std::string& help) {
  return option(app_->add_option(name, to, help));
}
template option command_line::add_option(const std::string&, std::string&, const std::string&);
template option command_line::add_option(const std::string&, std::vector<std::string>&, const std::string&);
template option command_line::add_option(const std::string&, unsigned&, const std::string&);
template option command_line::add_option(const std::string&, std::uint64_t&, const std::string&);
template option command_line::add_option(const std::string&, std::vector<std::uint64_t>&, const std::string&);
template option command_line::add_option(const std::string&, double&, const std::string&);
template option command_line::add_option(const std::string&, std::optional<unsigned>&, const std::string&);
template option command_line::add_option(const std::string&, std::optional<double>&, const std::string&);

option command_line::add_flag(const std::string& name, bool& to, const std::string& help) {
  return option(app_->add_flag(name, to, help));
}

option command_line::add_file(const std::string& name, std::string& to, const std::string& help) {
  return add_option(name, to, help).value_name("FILE");
}

void command_line::add_threads(unsigned& to) {
  add_option("--threads", to, "threads to use").shows_default().within(1u, 1024u);
}

void command_line::add_output(output_options& to) {
  const option as_json = add_flag("--json", to.json, "print the report as JSON");
  add_flag("--quiet", to.quiet, "print nothing but errors").excludes(as_json);
}

std::function<int()> command_line::read(int argc, char** argv) {
  try {
    app_->parse(argc, argv);
    return {};
  } catch (const CLI::ParseError& e) {
    return [this, e] { return app_->exit(e) == 0 ? 0 : 2; };
  }
}

}  // namespace ui
