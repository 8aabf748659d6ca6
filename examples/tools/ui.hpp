#pragma once

/// What the example programs share on a terminal: progress, tables, and errors as one clear line.

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace ui {

/// A percentage on standard error, rewritten in place on a terminal and left out elsewhere.
class progress {
 public:
  progress(std::string label, std::size_t total) : label_(std::move(label)), total_(std::max<std::size_t>(1, total)) {
    show();
  }
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;
  ~progress() {
    if (terminal_) fmt::print(stderr, "\r\033[K");
  }

  void add(std::size_t done) {
    done_ += done;
    show();
  }

 private:
  void show() {
    const int percent = static_cast<int>(100.0 * static_cast<double>(done_) / static_cast<double>(total_));
    if (!terminal_ || percent == shown_) return;
    shown_ = percent;
    fmt::print(stderr, "\r{} {:3} % {:<25}", label_, percent, std::string(static_cast<std::size_t>(percent / 4), '#'));
    std::fflush(stderr);
  }

  std::string label_;
  std::size_t total_;
  std::size_t done_ = 0;
  int shown_ = -1;
  bool terminal_ = isatty(STDERR_FILENO) != 0;
};

/// Rows of text in aligned columns: the first column to the left, numbers to the right.
class table {
 public:
  explicit table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }

  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

  void print() const {
    std::vector<std::size_t> width(rows_.front().size());
    for (const auto& row : rows_) {
      for (std::size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], characters(row[c]));
    }
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      std::string line;
      for (std::size_t c = 0; c < rows_[r].size(); ++c) {
        line += c == 0 ? fmt::format("{:<{}}", rows_[r][c], width[c]) : fmt::format("  {:>{}}", rows_[r][c], width[c]);
      }
      fmt::print("{}\n", line);
      if (r == 0) fmt::print("{}\n", std::string(characters(line), '-'));
    }
  }

 private:
  static std::size_t characters(const std::string& utf8) {
    return static_cast<std::size_t>(std::count_if(utf8.begin(), utf8.end(), [](char c) { return (c & 0xC0) != 0x80; }));
  }

  std::vector<std::vector<std::string>> rows_;
};

/// Bytes for people: "7.9 MB".
inline std::string bytes(std::size_t count) {
  const auto value = static_cast<double>(count);
  if (count < 1000) return fmt::format("{} B", count);
  if (count < 1000000) return fmt::format("{:.1f} kB", value / 1e3);
  if (count < 1000000000) return fmt::format("{:.1f} MB", value / 1e6);
  return fmt::format("{:.2f} GB", value / 1e9);
}

/// Runs a program's body; an error becomes one line on standard error and exit status 1.
template <class Body>
int run(const char* program, const Body& body) {
  try {
    return body();
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}: {}\n", program, e.what());
    return 1;
  }
}

}  // namespace ui
