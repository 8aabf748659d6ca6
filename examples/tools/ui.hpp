#pragma once

/// What the example programs share on a terminal: progress, tables, stopping at a signal, and errors as one clear line.

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ui {

/// Text out of a file, fit for a terminal: control characters escaped, long text cut.
inline std::string printable(std::string_view raw, std::size_t longest = 120) {
  std::string out;
  for (const char c : raw.substr(0, longest)) {
    const auto byte = static_cast<unsigned char>(c);
    out += byte < 0x20 || byte == 0x7f ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
  }
  return raw.size() > longest ? out + "..." : out;
}

/// Arguments that make no sense: one line, and exit status 2.
struct usage_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Signals that ask a program to stop: while one of these lives, they are written down, and the program, which looks at
/// `seen` now and then, stops by itself and leaves nothing behind.
class stop_signals {
 public:
  stop_signals() {
    for (std::size_t i = 0; i < handled.size(); ++i) {
      struct sigaction action {};
      action.sa_handler = note;
      action.sa_flags = SA_RESTART;
      ::sigaction(handled[i], &action, &before_[i]);
    }
  }
  stop_signals(const stop_signals&) = delete;
  stop_signals& operator=(const stop_signals&) = delete;
  ~stop_signals() {
    for (std::size_t i = 0; i < handled.size(); ++i) ::sigaction(handled[i], &before_[i], nullptr);
  }

  /// The signal that came, or 0.
  [[nodiscard]] static int seen() noexcept { return seen_; }

 private:
  static constexpr std::array<int, 3> handled{SIGINT, SIGTERM, SIGHUP};
  static void note(int signal) noexcept { seen_ = signal; }
  static inline std::atomic<int> seen_{0};
  static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may write it");

  std::array<struct sigaction, handled.size()> before_{};
};

/// Where a signal came while the finished output got its name.
inline void say_if_too_late(const std::string& output) {
  if (stop_signals::seen() != 0) fmt::print(stderr, "the signal came too late: {} is whole\n", printable(output));
}

/// A percentage on standard error with the time that is left: rewritten in place on a terminal, elsewhere a line every
/// few seconds. `add` may be called from any thread.
class progress {
 public:
  progress(std::string label, std::size_t total, bool is_quiet = false)
      : label_(std::move(label)), total_(std::max<std::size_t>(1, total)), is_quiet_(is_quiet) {}
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;
  ~progress() {
    if (terminal_ && shown_ >= 0) fmt::print(stderr, "\r\033[K");
  }

  void add(std::size_t done) {
    const std::size_t sum = done_ += done;
    if (is_quiet_) return;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) show(sum);
  }

 private:
  using clock = std::chrono::steady_clock;

  void show(std::size_t done) {
    const double share = static_cast<double>(done) / static_cast<double>(total_);
    const int percent = static_cast<int>(100 * share);
    const auto now = clock::now();
    if (percent == shown_ || (!terminal_ && now < next_line_)) return;
    shown_ = percent;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const std::string left =
        share > 0.01 && seconds > 1 ? fmt::format("{:.0f} s left", seconds * (1 - share) / share) : std::string();
    if (terminal_) {
      fmt::print(stderr, "\r{} {:3} % {:<25} {:<12}", label_, percent,
                 std::string(static_cast<std::size_t>(percent / 4), '#'), left);
      std::fflush(stderr);
    } else {
      fmt::print(stderr, "{} {} % {}\n", label_, percent, left);
      next_line_ = now + std::chrono::seconds(10);
    }
  }

  std::string label_;
  std::size_t total_;
  bool is_quiet_;
  std::atomic<std::size_t> done_{0};
  std::mutex mutex_;
  int shown_ = -1;
  bool terminal_ = isatty(STDERR_FILENO) != 0;
  clock::time_point start_ = clock::now();
  clock::time_point next_line_ = start_ + std::chrono::seconds(5);
};

/// Rows of text in aligned columns: the first column to the left, numbers to the right.
class table {
 public:
  explicit table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }

  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  /// Points the last row out as the best.
  void mark_last() { rows_.back().front() += " (best)"; }

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

/// Prints JSON. What is no UTF-8, as names of files may be, becomes U+FFFD: strings in JSON have no other way.
template <class Json>
void print_json(const Json& json) {
  fmt::print("{}\n", json.dump(2, ' ', false, Json::error_handler_t::replace));
}

/// Bytes for people: "7.9 MB".
inline std::string bytes(std::size_t count) {
  const auto value = static_cast<double>(count);
  if (count < 1000) return fmt::format("{} B", count);
  if (count < 1000000) return fmt::format("{:.1f} kB", value / 1e3);
  if (count < 1000000000) return fmt::format("{:.1f} MB", value / 1e6);
  return fmt::format("{:.2f} GB", value / 1e9);
}

/// What a program writes past a limit, or to nobody, is an error of the call that does it, and no signal.
inline void ignore_write_signals() {
  for (const int signal : {SIGPIPE, SIGXFSZ}) std::signal(signal, SIG_IGN);
}

/// Throws if something could not be written to standard output.
inline void flush_output() {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return;
  throw std::runtime_error(fmt::format("could not write to standard output: {}", std::strerror(errno)));
}

/// Runs a program's body. An error becomes one line on standard error and exit status 1, or 2 for usage errors; after a
/// signal to stop, the status is 128 and its number. What could not be written to standard output is an error too.
template <class Body>
int run(const char* program, const Body& body) {
  ignore_write_signals();
  int status = 0;
  try {
    status = body();
    flush_output();
  } catch (const usage_error& e) {
    fmt::print(stderr, "{}: {}\n", program, e.what());
    status = 2;
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}: {}\n", program, e.what());
    status = 1;
  }
  return stop_signals::seen() == 0 ? status : 128 + stop_signals::seen();
}

}  // namespace ui
