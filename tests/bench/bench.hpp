#pragma once

/// What the CPU benchmarks share: work and ceilings timed in turns, so that a noisy machine hits all of them alike;
/// medians; one table.

#include <algorithm>   // std::sort, std::max
#include <chrono>      // std::chrono
#include <cstddef>     // std::size_t
#include <cstdint>     // std::uint64_t
#include <cstdio>      // std::printf
#include <cstdlib>     // std::strtod
#include <cstring>     // std::memset, std::memcpy, std::strcmp
#include <functional>  // std::function
#include <string>      // std::string
#include <utility>     // std::move
#include <vector>      // std::vector

#if defined(__x86_64__)
#include <x86intrin.h>  // __rdtsc
#endif
#if defined(__unix__)
#include <time.h>  // clock_gettime
#endif

namespace bench {

/// Keeps the compiler from dropping a result.
inline volatile std::uint64_t sink;

/// Seconds that this thread has run. Time during which it was set aside for others is not counted, so use it for work
/// of one thread only.
inline double thread_seconds() {
#if defined(__unix__)
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}
inline double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Ticks of the time stamp counter in a second, which is the nominal clock; 0 where there is none.
inline double nominal_hz() {
#if defined(__x86_64__)
  const double begin = wall_seconds();
  const std::uint64_t ticks = __rdtsc();
  while (wall_seconds() < begin + 0.05) {
  }
  const std::uint64_t more = __rdtsc() - ticks;
  return static_cast<double>(more) / (wall_seconds() - begin);
#else
  return 0;
#endif
}

/// Reads all of x[bytes] and adds it up: how fast reading can be.
inline void read_all(const void* x, std::size_t bytes) {
  std::uint64_t sums[32] = {};
  const char* p = static_cast<const char*>(x);
  for (std::size_t i = 0; i + sizeof sums <= bytes; i += sizeof sums) {
    std::uint64_t words[32];
    std::memcpy(words, p + i, sizeof words);
    for (std::size_t j = 0; j < 32; ++j) sums[j] += words[j];
  }
  for (const std::uint64_t s : sums) sink = sink + s;
}
/// Writes all of x[bytes]: how fast writing can be.
inline void write_all(void* x, std::size_t bytes) {
  static int value = 0;
  std::memset(x, ++value & 0xFF, bytes);
}

struct summary {
  double median = 0;  ///< seconds
  double least = 0;
  double spread = 0;  ///< (90th percentile - 10th) / median
};

inline summary summarize(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  const std::size_t n = seconds.size();
  const double median = n % 2 == 1 ? seconds[n / 2] : (seconds[n / 2 - 1] + seconds[n / 2]) / 2;
  return {median, seconds.front(), (seconds[n * 9 / 10] - seconds[n / 10]) / median};
}

/// A ceiling or a contender of a table, which other lines are compared with.
struct reference_line {
  static constexpr std::size_t none = ~std::size_t{0};
  std::size_t index = none;
};

/// One table: lines are timed in turns, `repetitions` times.
class table {
 public:
  explicit table(std::string title, bool one_thread = true) : title_(std::move(title)), one_thread_(one_thread) {}

  /// f() handles `bytes` bytes (those that count as GB/s) and `weights` 4-bit weights (0: not a matter of weights).
  reference_line add(std::string work, std::string input, double bytes, double weights, std::function<void()> f,
                     reference_line compared_with = {}) {
    if (work.find(filter()) == std::string::npos && work.front() != '(') return {};
    lines_.push_back({std::move(work), std::move(input), bytes, weights, std::move(f), compared_with.index, {}});
    return {lines_.size() - 1};
  }

  /// Only lines that contain this text are timed, and the ceilings, whose names begin with a parenthesis.
  static std::string& filter() {
    static std::string text;
    return text;
  }

  void run(int repetitions) {
    const auto now = one_thread_ ? thread_seconds : wall_seconds;
    for (int i = -1; i < repetitions; ++i) {  // the first turn warms up
      for (line& l : lines_) {
        // Short work is repeated, or the clock would be what is measured.
        const double begin = now();
        for (std::size_t n = 0; n < l.calls; ++n) l.f();
        const double seconds = (now() - begin) / static_cast<double>(l.calls);
        if (i >= 0) l.seconds.push_back(seconds);
        if (i < 0 && seconds < 1e-3) l.calls = static_cast<std::size_t>(1e-3 / std::max(seconds, 1e-8)) + 1;
      }
    }
  }

  void print() const {
    const double hz = nominal_hz();
    std::printf("%s\n", title_.c_str());
    std::printf("%-34s %-9s %11s %7s %8s %12s %9s\n", "work", "input", one_thread_ ? "median" : "quickest", "spread",
                "GB/s", "cycles/32 w.", "share");
    for (const line& l : lines_) {
      const summary s = summarize(l.seconds);
      // The wall clock runs on while threads are set aside for others: the quickest turn was disturbed least.
      const double seconds = one_thread_ ? s.median : s.least;
      std::printf("%-34s %-9s %8.1f us %5.1f %% %8.2f", l.work.c_str(), l.input.c_str(), seconds * 1e6, s.spread * 100,
                  l.bytes / seconds * 1e-9);
      if (l.weights > 0 && hz > 0) {
        std::printf(" %12.2f", seconds * hz * 32 / l.weights);
      } else {
        std::printf(" %12s", "");
      }
      if (l.compared_with != reference_line::none) std::printf(" %7.1f %%", 100 * share(l));
      std::printf("\n");
    }
    std::printf("\n");
  }

 private:
  struct line {
    std::string work, input;
    double bytes, weights;
    std::function<void()> f;
    std::size_t compared_with;
    std::vector<double> seconds;
    std::size_t calls = 1;
  };

  /// How the line's rate compares with its reference's: the median over the turns, or that of the quickest ones.
  double share(const line& l) const {
    const line& r = lines_[l.compared_with];
    if (!one_thread_) return l.bytes / summarize(l.seconds).least / (r.bytes / summarize(r.seconds).least);
    std::vector<double> shares;
    for (std::size_t i = 0; i < l.seconds.size(); ++i) {
      shares.push_back(l.bytes / l.seconds[i] / (r.bytes / r.seconds[i]));
    }
    return summarize(shares).median;
  }

  std::string title_;
  bool one_thread_;
  std::vector<line> lines_;
};

/// The number after `name` on the command line, or a default.
inline double option(int argc, char** argv, const char* name, double otherwise) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) return std::strtod(argv[i + 1], nullptr);
  }
  return otherwise;
}

/// The text after `name` on the command line, or nothing.
inline std::string text_option(int argc, char** argv, const char* name) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) return argv[i + 1];
  }
  return {};
}

/// What the columns mean; print it once.
inline void explain() {
  std::printf(
      "median of repetitions in turns; spread: 10th to 90th percentile; cycles of the nominal clock for 32 weights;\n"
      "share: of the ceiling in the same turns. Work of one thread is timed by the thread's own clock, that of several "
      "by\n"
      "the wall clock, of which the quickest turn is shown.\n\n");
}

}  // namespace bench
