/// Speed of quantize, quantize_int8, dequantize and fake_quantize on the CPU, as a share of what the memory allows.
///
///   bench_quantize [--mib N] [--repetitions N] [--threads N] [--only TEXT]
///
/// The first tables work on N MiB (256), more than most caches hold, the second on 512 KiB. The instruction set is that
/// of the build; threads beyond the first have a table of their own. contender.hpp says how to put another library
/// beside it.

#include <tetromino/dequantize.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/simd.hpp>
#include <tetromino/thread_executor.hpp>

#include "bench.hpp"
#include "contender.hpp"
#include "reference/generators.hpp"

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint64_t
#include <cstdio>       // std::printf
#include <string>       // std::string
#include <type_traits>  // std::is_same_v
#include <utility>      // std::move
#include <vector>       // std::vector

namespace {

using namespace tetromino;

constexpr std::size_t cols = 8192;

template <class T>
constexpr const char* type_name = std::is_same_v<T, float>  ? "float"
                                  : std::is_same_v<T, half> ? "half"
                                                            : "bfloat16";

/// Normal numbers, a sample repeated: sixteen rows that differ.
template <class T>
std::vector<T> normal_numbers(std::size_t count) {
  const std::vector<float> sample = reference::normal_sample(1, 16 * cols + 1);
  std::vector<T> out(count);
  for (std::size_t i = 0; i < count; ++i) out[i] = detail::from_float<T>(sample[i % sample.size()]);
  return out;
}

struct recipe_line {
  const char* name;
  std::size_t divisor;  // slow recipes get a part of the rows
};
constexpr recipe_line recipes[] = {{"mxfp4-32/floor", 1},
                                   {"mxfp4-32/ceil", 1},
                                   {"mxfp4-32/round-up", 1},
                                   {"mxfp4-32/even", 1},
                                   {"mxfp4-32/oas", 1},
                                   {"mxfp4-16/oas", 1},
                                   {"mxfp4-32/min-error", 8},
                                   {"mxfp4-32/oas/mbs-static", 1},
                                   {"mxfp4-16/oas/mbs-static", 1},
                                   {"mxfp4-32/oas/mbs-search", 8},
                                   {"mxfp4-16/oas/mbs-search", 8},
                                   {"mxfp4-16/oas/mbs-search256", 64},
                                   {"mxfp4-16/min-error/mbs-search", 64},
                                   {"nvfp4/amax", 1},
                                   {"nvfp4/four-over-six", 8},
                                   {"nvfp4/min-error", 32}};
constexpr const char* unpacked_recipes[] = {"mxfp4-32/oas", "mxfp4-16/oas", "mxfp4-16/oas/mbs-static", "nvfp4/amax"};

template <class T>
void bench_type(std::size_t bytes, int repetitions, const char* where) {
  const std::size_t rows = bytes / sizeof(T) / cols;
  const std::vector<T> x = normal_numbers<T>(rows * cols);
  std::vector<T> y(x.size());
  const float tensor_scale = 5.0f / (6 * 448);

  bench::table table(std::string("quantize, dequantize, ") + type_name<T> + ", " + where + ", " +
                     std::string(simd.isa()));
  const auto size = [](std::size_t n) { return static_cast<double>(n * sizeof(T)); };
  const auto read = table.add("(read and add up)", type_name<T>, size(x.size()), 0,
                              [&] { bench::read_all(x.data(), x.size() * sizeof(T)); });
#if defined(TETROMINO_BENCH_CONTENDER)
  if constexpr (std::is_same_v<T, float>) {
    for (bench::contender& c : bench::contenders(x)) {
      table.add(c.work, type_name<T>, size(c.elements), static_cast<double>(c.elements), std::move(c.f), read);
    }
  }
#endif
  std::vector<packed<any_format>> storage;
  storage.reserve(std::size(recipes) + std::size(unpacked_recipes));
  for (const auto& [name, divisor] : recipes) {
    const recipe r = recipe::parse(name);
    const std::size_t n = rows / divisor == 0 ? 1 : rows / divisor;
    packed<any_format>& out = storage.emplace_back(r.format, 1, n, cols);
    table.add(
        name, type_name<T>, size(n * cols), static_cast<double>(n * cols),
        [&x, &out, r, n, tensor_scale] {
          quantize_options options;
          options.rule = r.rule;
          options.macro = r.macro;
          if (r.format.scale == scale_type::e4m3) options.tensor_scales = {&tensor_scale, 1};
          quantize_to(simd, matrix_view<const T>(x.data(), n, cols), out.view(), options);
        },
        read);
  }
  int8_matrix activations(rows, cols);
  table.add(
      "quantize_int8", type_name<T>, size(x.size()), static_cast<double>(x.size()),
      [&x, &activations, rows] {
        quantize_int8_to(simd, matrix_view<const T>(x.data(), rows, cols), activations.view());
      },
      read);
  const auto write =
      table.add("(memset)", type_name<T>, size(y.size()), 0, [&] { bench::write_all(y.data(), y.size() * sizeof(T)); });
  for (const char* name : unpacked_recipes) {
    packed<any_format>& in =
        storage.emplace_back(quantize(simd, matrix_view<const T>(x.data(), rows, cols), recipe::parse(name)));
    table.add(
        std::string("dequantize ") + name, type_name<T>, size(y.size()), static_cast<double>(y.size()),
        [&y, &in, rows] { dequantize_to(simd, in, matrix_view<T>(y.data(), rows, cols)); }, write);
  }
  const auto copy = table.add("(memcpy)", type_name<T>, size(y.size()), 0,
                              [&] { std::memcpy(y.data(), x.data(), y.size() * sizeof(T)); });
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-static"}) {
    const recipe r = recipe::parse(name);
    table.add(
        std::string("fake_quantize ") + name, type_name<T>, size(y.size()), static_cast<double>(y.size()),
        [&x, &y, r, rows] {
          fake_quantize(simd, matrix_view<const T>(x.data(), rows, cols), r, matrix_view<T>(y.data(), rows, cols));
        },
        copy);
  }
  table.run(repetitions);
  table.print();
}

void bench_threads(std::size_t bytes, int repetitions, unsigned most) {
  const std::size_t rows = bytes / sizeof(float) / cols;
  const std::vector<float> x = normal_numbers<float>(rows * cols);
  const matrix_view<const float> in(x.data(), rows, cols);
  std::vector<float> y(x.size());
  std::vector<packed<any_format>> storage;
  storage.reserve(3);
  int8_matrix activations(rows, cols), few(16, cols);
  bench::table table("threads, float, by the wall clock", false);
  const double size = static_cast<double>(x.size() * sizeof(float)), weights = static_cast<double>(x.size());
  for (unsigned threads = 1; threads <= most; threads *= 2) {
    const thread_executor executor(threads);
    const std::string count = std::to_string(threads) + (threads == 1 ? " thread" : " threads");
    const auto read = table.add("(read and add up)", count, size, 0, [&x, executor, threads] {
      executor(threads, [&](std::size_t i) {
        const std::size_t part = x.size() / threads;
        bench::read_all(x.data() + i * part, part * sizeof(float));
      });
    });
    for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-search", "nvfp4/amax"}) {
      const recipe r = recipe::parse(name);
      if (threads == 1) storage.emplace_back(r.format, 1, rows, cols);
      packed<any_format>* out = nullptr;
      for (auto& s : storage) {
        if (s.format == r.format) out = &s;
      }
      table.add(
          name, count, size, weights,
          [in, out, r, executor] {
            const float tensor_scale = 5.0f / (6 * 448);
            quantize_options options;
            options.rule = r.rule;
            options.macro = r.macro;
            if (r.format.scale == scale_type::e4m3) options.tensor_scales = {&tensor_scale, 1};
            quantize_to(simd.on(executor), in, out->view(), options);
          },
          read);
    }
    table.add(
        "quantize_int8", count, size, weights,
        [in, &activations, executor] { quantize_int8_to(simd.on(executor), in, activations.view()); }, read);
    table.add("quantize_int8, 16 rows", count, 16 * cols * sizeof(float), 16 * cols, [&x, &few, executor] {
      quantize_int8_to(simd.on(executor), matrix_view<const float>(x.data(), 16, cols), few.view());
    });
  }
  table.run(repetitions);
  table.print();
}

}  // namespace

int main(int argc, char** argv) {
  const auto bytes = static_cast<std::size_t>(bench::option(argc, argv, "--mib", 256) * 1048576.0);
  const auto repetitions = static_cast<int>(bench::option(argc, argv, "--repetitions", 9));
  const auto threads = static_cast<unsigned>(bench::option(argc, argv, "--threads", 2));
  bench::table::filter() = bench::text_option(argc, argv, "--only");
  bench::explain();
  bench_type<float>(bytes, repetitions, "in memory");
  bench_type<bfloat16>(bytes, repetitions, "in memory");
  bench_type<half>(bytes, repetitions, "in memory");
  bench_type<float>(512 * 1024, repetitions, "in cache");
  bench_type<bfloat16>(512 * 1024, repetitions, "in cache");
  bench_type<half>(512 * 1024, repetitions, "in cache");
  bench_threads(bytes, repetitions, threads);
}
