#include "check.hpp"

/// How many instructions the kernels take, counted one by one: a regression shows however noisy the machine is. Run for
/// each backend of tetromino::cpu. The counts hold for g++ 12 with -O2; with other compilers they are printed only.
/// After a change for the better, put the printed counts into the table below.

#include <tetromino/dequantize.hpp>
#include <tetromino/e4m3_activations.hpp>
#include <tetromino/matmul.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/repacked.hpp>

#include "isa/backend.hpp"
#include "reference/generators.hpp"

#include <algorithm>    // std::find_if, std::none_of
#include <csignal>      // raise, SIGSTOP
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint64_t
#include <cstdio>       // std::printf
#include <functional>   // std::function
#include <iterator>     // std::begin, std::end
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

#if defined(__linux__)
#include <sys/ptrace.h>  // ptrace
#include <sys/wait.h>    // waitpid
#include <unistd.h>      // fork, _exit
#endif

#if !defined(TETROMINO_TEST_CPU) || !defined(__linux__)
TEST_CASE("instructions can be counted") { WARN("skipped: that needs tetromino::cpu and Linux"); }
#else

namespace {

using namespace tetromino;
using tetromino_test::vectors;

/// Instructions of f() in a child process, stepped one at a time; 0 where this system does not allow that.
std::uint64_t stepped(const std::function<void()>& f) {
  const pid_t child = fork();
  if (child < 0) return 0;
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
    raise(SIGSTOP);
    f();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  std::uint64_t steps = 0;
  if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return 0;
  while (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) == 0 && waitpid(child, &status, 0) == child) {
    if (!WIFSTOPPED(status)) return 0;
    if (WSTOPSIG(status) == SIGSTOP) break;
    ++steps;
  }
  ptrace(PTRACE_CONT, child, nullptr, nullptr);
  waitpid(child, &status, 0);
  return steps;
}
std::uint64_t instructions_of(const std::function<void()>& f) {
  const std::uint64_t all = stepped(f), none = stepped([] {});
  return all > none ? all - none : 0;
}

struct work {
  std::string name;
  std::size_t elements;
  std::function<void()> f;
};

constexpr std::size_t cols = 512;

/// Outputs of a product of so many rows: stepping is slow.
constexpr std::size_t outputs_for(std::size_t rows) { return rows == 1 ? 32 : 16; }

template <class T>
matrix<T> normal_matrix(std::size_t rows) {
  matrix<T> out(rows, cols);
  const std::vector<float> sample = reference::normal_sample(7, rows * cols);
  for (std::size_t i = 0; i < sample.size(); ++i) out.data[i] = detail::from_float<T>(sample[i]);
  return out;
}

template <class T>
void add_quantize(std::vector<work>& all, const char* name, const char* type) {
  const recipe r = recipe::parse(name);
  all.push_back({std::string(type) + " -> " + name, cols,
                 [r, x = normal_matrix<T>(1), out = packed<any_format>(r.format, 1, 1, cols)]() mutable {
                   const float tensor_scale = 0.002f;
                   quantize_options options;
                   options.rule = r.rule;
                   options.macro = r.macro;
                   if (r.format.scale == scale_type::e4m3) options.tensor_scales = {&tensor_scale, 1};
                   quantize_to(vectors, x, out.view(), options);
                 }});
}
template <class T>
void add_dequantize(std::vector<work>& all, const char* name, const char* type) {
  all.push_back({std::string(name) + " -> " + type, cols,
                 [in = quantize(vectors, normal_matrix<float>(1), recipe::parse(name)),
                  out = matrix<T>(1, cols)]() mutable { dequantize_to(vectors, in, out.view()); }});
}
template <class T>
void add_quantize_int8(std::vector<work>& all, const char* type) {
  all.push_back({std::string(type) + " -> int8", cols, [x = normal_matrix<T>(1), out = int8_matrix(1, cols)]() mutable {
                   quantize_int8_to(vectors, x, out.view());
                 }});
}
template <class T>
void add_quantize_e4m3(std::vector<work>& all, const char* type) {
  all.push_back({std::string(type) + " -> e4m3", cols, [x = normal_matrix<T>(1), out = e4m3_matrix(1, cols)]() mutable {
                   quantize_e4m3_to(vectors, x, out.view());
                 }});
}
template <class X>
void add_matmul(std::vector<work>& all, const char* name, const char* type, const X& x, std::size_t rows) {
  const recipe r = recipe::parse(name);
  all.push_back({std::string(type) + " x " + name + ", M = " + std::to_string(rows), rows * outputs_for(rows) * cols,
                 [x, w = quantize(vectors, normal_matrix<float>(outputs_for(rows)), r),
                  out = matrix<float>(rows, outputs_for(rows))]() mutable { matmul(vectors, x, w, out.view()[0]); }});
}
template <class X>
void add_repacked(std::vector<work>& all, const char* name, const char* type, const X& x, std::size_t rows) {
  all.push_back(
      {std::string(type) + " x repacked " + name + ", M = " + std::to_string(rows), rows * outputs_for(rows) * cols,
       [x, w = repack(vectors, quantize(vectors, normal_matrix<float>(outputs_for(rows)), recipe::parse(name))),
        out = matrix<float>(rows, outputs_for(rows))]() mutable { matmul(vectors, x, w, out.view()[0]); }});
}

std::vector<work> all_work() {
  std::vector<work> all;
  for (const char* name :
       {"mxfp4-32/floor", "mxfp4-32/oas", "mxfp4-16/oas", "mxfp4-32/min-error", "mxfp4-16/oas/mbs-static",
        "mxfp4-16/oas/mbs-search", "nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error"}) {
    add_quantize<float>(all, name, "float");
  }
  add_quantize<bfloat16>(all, "mxfp4-32/oas", "bfloat16");
  add_quantize<bfloat16>(all, "nvfp4/amax", "bfloat16");
  add_quantize<half>(all, "mxfp4-32/oas", "half");
  add_quantize<half>(all, "nvfp4/amax", "half");
  add_quantize_int8<float>(all, "float");
  add_quantize_int8<bfloat16>(all, "bfloat16");
  add_quantize_int8<half>(all, "half");
  add_quantize_e4m3<float>(all, "float");
  add_quantize_e4m3<bfloat16>(all, "bfloat16");
  add_quantize_e4m3<half>(all, "half");
  for (const char* name : {"mxfp4-32/oas", "nvfp4/amax"}) {
    add_dequantize<float>(all, name, "float");
    add_dequantize<bfloat16>(all, name, "bfloat16");
    const matrix<float> one = normal_matrix<float>(1), four = normal_matrix<float>(4);
    add_matmul(all, name, "int8", quantize_int8(vectors, one), 1);
    add_matmul(all, name, "int8", quantize_int8(vectors, four), 4);
    add_matmul(all, name, "packed", quantize(vectors, one, recipe::parse(name)), 1);
    add_matmul(all, name, "bfloat16", normal_matrix<bfloat16>(1), 1);
    add_matmul(all, name, "bfloat16", normal_matrix<bfloat16>(4), 4);
    add_repacked(all, name, "int8", quantize_int8(vectors, one), 1);
    add_repacked(all, name, "int8", quantize_int8(vectors, normal_matrix<float>(8)), 8);
    add_repacked(all, name, "packed", quantize(vectors, one, recipe::parse(name)), 1);
    add_repacked(all, name, "bfloat16", normal_matrix<bfloat16>(1), 1);
    add_repacked(all, name, "bfloat16", normal_matrix<bfloat16>(8), 8);
  }
  return all;
}

/// Instructions for 32 elements (of a product: for 32 weights and a row), by backend. About 240 of each call are those
/// of the calls themselves: checks, and the way to the backend. What avx512_bf16 has no count for are kernels of
/// avx512.
struct expected_count {
  std::string_view name;
  double avx2 = 0, avx512 = 0, avx512_bf16 = 0;

  double of(std::string_view backend) const {
    return backend == "avx2" ? avx2 : backend == "avx512" ? avx512 : backend == "avx512_bf16" ? avx512_bf16 : 0;
  }
};
constexpr double tolerance = 0.04;
constexpr expected_count expected[] = {
    // clang-format off
    {"float -> mxfp4-32/floor", 151.9, 107.5},
    {"float -> mxfp4-32/oas", 152.1, 107.8},
    {"float -> mxfp4-16/oas", 171.8, 121.3},
    {"float -> mxfp4-32/min-error", 329.9, 213.3},
    {"float -> mxfp4-16/oas/mbs-static", 189.9, 134.0},
    {"float -> mxfp4-16/oas/mbs-search", 1083.9, 676.9},
    {"float -> nvfp4/amax", 201.9, 139.0},
    {"float -> nvfp4/four-over-six", 430.6, 270.8},
    {"float -> nvfp4/min-error", 1590.3, 1081.9},
    {"bfloat16 -> mxfp4-32/oas", 147.7, 103.7},
    {"bfloat16 -> nvfp4/amax", 200.2, 136.6},
    {"half -> mxfp4-32/oas", 154.9, 106.2},
    {"half -> nvfp4/amax", 210.8, 136.2},
    {"float -> int8", 56.6, 47.5},
    {"bfloat16 -> int8", 63.5, 46.4},
    {"half -> int8", 66.1, 47.8},
    {"float -> e4m3", 118.7, 77.6},
    {"bfloat16 -> e4m3", 146.7, 85.6},
    {"half -> e4m3", 138.5, 81.6},
    {"mxfp4-32/oas -> float", 80.3, 58.6},
    {"mxfp4-32/oas -> bfloat16", 88.1, 57.8},
    {"int8 x mxfp4-32/oas, M = 1", 17.0, 12.0, 11.2},
    {"int8 x mxfp4-32/oas, M = 4", 13.8, 9.0, 8.4},
    {"packed x mxfp4-32/oas, M = 1", 18.2, 13.3, 12.4},
    {"bfloat16 x mxfp4-32/oas, M = 1", 32.8, 21.2, 15.5},
    {"bfloat16 x mxfp4-32/oas, M = 4", 20.9, 12.1, 7.0},
    {"int8 x repacked mxfp4-32/oas, M = 1", 14.1, 9.8, 8.9},
    {"int8 x repacked mxfp4-32/oas, M = 8", 11.3, 7.3, 6.7},
    {"packed x repacked mxfp4-32/oas, M = 1", 15.4, 11.1, 10.2},
    {"bfloat16 x repacked mxfp4-32/oas, M = 1", 39.5, 27.9, 10.4},
    {"bfloat16 x repacked mxfp4-32/oas, M = 8", 16.5, 9.7, 4.6},
    {"nvfp4/amax -> float", 89.1, 63.1},
    {"nvfp4/amax -> bfloat16", 115.8, 73.9},
    {"int8 x nvfp4/amax, M = 1", 20.0, 14.0, 13.2},
    {"int8 x nvfp4/amax, M = 4", 15.3, 9.6, 9.1},
    {"packed x nvfp4/amax, M = 1", 22.3, 16.3, 15.5},
    {"bfloat16 x nvfp4/amax, M = 1", 40.7, 26.2, 19.9},
    {"bfloat16 x nvfp4/amax, M = 4", 22.0, 13.7, 8.4},
    {"int8 x repacked nvfp4/amax, M = 1", 15.4, 10.7, 9.9},
    {"int8 x repacked nvfp4/amax, M = 8", 12.6, 7.4, 7.0},
    {"packed x repacked nvfp4/amax, M = 1", 17.7, 13.1, 12.3},
    {"bfloat16 x repacked nvfp4/amax, M = 1", 49.2, 34.8, 14.4},
    {"bfloat16 x repacked nvfp4/amax, M = 8", 17.3, 10.7, 5.5},
    // clang-format on
};

#if defined(__OPTIMIZE__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ == 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr bool is_the_compiler_of_the_table = true;
#else
constexpr bool is_the_compiler_of_the_table = false;
#endif

TEST_CASE("instructions for 32 elements are no more than the table says") {
  if (instructions_of([] { detail::rounded(1.0f); }) > 1000 || stepped([] {}) == 0) {
    WARN("skipped: this system does not let a process step through its child");
    return;
  }
  const std::string backend(vectors.backend());
  if (std::none_of(std::begin(expected), std::end(expected), [&](const auto& e) { return e.of(backend) != 0; })) {
    WARN("skipped: there is no table for " << backend);
    return;
  }
  for (const work& w : all_work()) {
    const auto* const row = std::find_if(std::begin(expected), std::end(expected),
                                         [&](const expected_count& e) { return e.name == w.name; });
    const double wanted = row == std::end(expected) ? 0 : row->of(backend);
    if (row != std::end(expected) && wanted == 0) continue;
    const double count = static_cast<double>(instructions_of(w.f)) * 32 / static_cast<double>(w.elements);
    std::printf("%-12s %-44s %8.1f\n", backend.c_str(), w.name.c_str(), count);
    if (!is_the_compiler_of_the_table || wanted == 0) continue;
    INFO(w.name << ": " << count << " instructions for 32 elements, expected " << wanted);
    CHECK(count <= (1 + tolerance) * wanted);
    if (count < (1 - tolerance) * wanted) std::printf("%57s, in the table %.1f\n", "fewer", wanted);
  }
}

}  // namespace

#endif
