/// How cost grows with size and falls with threads, on the CPU: quantize, dequantize and matmul from 1 KiB to whatever
/// fits, and all of them over the caller's threads.
///
///   bench_scaling [--most-mib N] [--threads N] [--repetitions N] [--only TEXT]
///
/// Sizes are those of the float matrix, up to N MiB (1024; 4096 needs 5 GiB of memory), and grow by 4 each time; for
/// matmul they are those of the weights before packing, and GB/s counts the packed bytes.

#include <tetromino/dequantize.hpp>
#include <tetromino/matmul.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/repacked.hpp>
#include <tetromino/simd.hpp>
#include <tetromino/thread_executor.hpp>

#include "bench.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdio>     // std::printf
#include <string>     // std::string
#include <vector>     // std::vector

namespace {

using namespace tetromino;

std::string size_name(std::size_t bytes) {
  return bytes < std::size_t{1} << 20   ? std::to_string(bytes >> 10) + " KiB"
         : bytes < std::size_t{1} << 30 ? std::to_string(bytes >> 20) + " MiB"
                                        : std::to_string(bytes >> 30) + " GiB";
}

void bench_size(std::size_t bytes, int repetitions) {
  const std::size_t count = bytes / sizeof(float), cols = std::min<std::size_t>(count, 4096), rows = count / cols;
  const std::vector<float> sample = reference::normal_sample(1, 16 * 4096 + 1);
  std::vector<float> x(count);
  for (std::size_t i = 0; i < count; ++i) x[i] = sample[i % sample.size()];
  const matrix_view<float> all(x.data(), rows, cols);
  const float tensor_scale = 5.0f / (6 * 448);
  packed<any_format> mx(mxfp4{}, 1, rows, cols), nv(nvfp4{}, 1, rows, cols);
  const int8_matrix one = quantize_int8(simd, matrix_view<const float>(sample.data(), 1, cols));
  std::vector<float> out(rows);

  bench::table table(size_name(bytes) + ", " + std::string(simd.isa()));
  const auto size = static_cast<double>(bytes), weights = static_cast<double>(count);
  const auto read = table.add("(read and add up)", "float", size, 0, [&] { bench::read_all(x.data(), bytes); });
  table.add(
      "mxfp4-32/oas", "float", size, weights, [&] { quantize_to(simd, all, mx.view()); }, read);
  table.add(
      "nvfp4/amax", "float", size, weights,
      [&] {
        quantize_options options;
        options.tensor_scales = {&tensor_scale, 1};
        quantize_to(simd, all, nv.view(), options);
      },
      read);
  const auto read_codes = table.add("(read the codes)", "", static_cast<double>(mx.codes.size()), 0,
                                    [&] { bench::read_all(mx.codes.data(), mx.codes.size()); });
  const auto multiply = [&](const char* name, const packed<any_format>& w) {
    table.add(
        name, "W4A8", static_cast<double>(w.bytes()), weights,
        [&] { matmul(simd, one, w, matrix_view<float>(out.data(), 1, rows)); }, read_codes);
  };
  multiply("matmul mxfp4-32, M = 1", mx);
  quantize_to(simd, all, mx.view());
  const repacked fast = repack(simd, mx);
  table.add(
      "the same, repacked", "W4A8", static_cast<double>(mx.bytes()), weights,
      [&] { matmul(simd, one, fast, matrix_view<float>(out.data(), 1, rows)); }, read_codes);
  multiply("matmul nvfp4, M = 1", nv);
  // Last, as it writes over its own input.
  table.add("dequantize mxfp4-32", "float", size, weights, [&] { dequantize_to(simd, mx, all); });
  table.run(repetitions);
  table.print();
}

void bench_threads(std::size_t bytes, unsigned most, int repetitions) {
  constexpr std::size_t cols = 4096;
  const std::size_t rows = bytes / sizeof(float) / cols;
  const std::vector<float> sample = reference::normal_sample(1, 16 * cols + 1);
  packed<any_format> w(mxfp4{}, 1, rows, cols);
  for (std::size_t i = 0; i < w.codes.size(); ++i) w.codes[i] = static_cast<std::uint8_t>(i * 37 >> 3);
  for (auto& s : w.scales) s = 120;
  const matrix_view<const float> few(sample.data(), 16, cols);
  const int8_matrix x = quantize_int8(simd, few);
  std::vector<float> out(16 * rows);
  const repacked fast = repack(simd, w);
  packed<any_format> experts(mxfp4{}, 8, 1024, cols);
  std::copy_n(w.codes.begin(), std::min(w.codes.size(), experts.codes.size()), experts.codes.begin());
  for (auto& e : experts.scales) e = 120;
  const repacked fast_experts = repack(simd, experts);
  const std::vector<std::uint32_t> all_to_one{0, 0, 0, 16, 16, 16, 16, 16, 16};
  matrix<float> of_one(16, 1024);
  const std::vector<float> x32 = reference::normal_sample(2, std::size_t{1} << 24);
  const matrix_view<const float> floats(x32.data(), x32.size() / cols, cols);
  packed<any_format> codes(mxfp4{}, 1, floats.rows, cols);
  bench::table table("threads, weights of " + size_name(bytes) + " before packing, by the wall clock", false);
  for (unsigned threads = 1; threads <= most; threads *= 2) {
    const thread_executor executor(threads);
    const std::string count = std::to_string(threads) + (threads == 1 ? " thread" : " threads");
    const auto read = table.add("(read the codes)", count, static_cast<double>(w.codes.size()), 0, [&, executor] {
      executor(threads, [&](std::size_t i) {
        const std::size_t part = w.codes.size() / threads;
        bench::read_all(w.codes.data() + i * part, part);
      });
    });
    table.add(
        "mxfp4-32/oas", count, static_cast<double>(x32.size() * sizeof(float)), static_cast<double>(x32.size()),
        [&, executor] { quantize_to(simd.on(executor), floats, codes.view()); }, read);
    table.add(
        "grouped_matmul, one of 8, M = 16", count, static_cast<double>(experts.bytes()) / 8, 16 * 1024 * cols,
        [&, executor] { grouped_matmul(simd.on(executor), x, fast_experts, all_to_one, of_one); }, read);
    for (const std::size_t m : {1u, 16u}) {
      const int8_view<> part{m, cols, std::span(x.values).first(m * cols), std::span(x.scales).first(m * cols / 32)};
      const std::string suffix = ", M = " + std::to_string(m);
      const double bytes_read = static_cast<double>(w.bytes()), products = static_cast<double>(m * rows * cols);
      table.add(
          "matmul int8" + suffix, count, bytes_read, products,
          [&, executor, part, m] { matmul(simd.on(executor), part, w, matrix_view<float>(out.data(), m, rows)); },
          read);
      table.add(
          "the same, repacked" + suffix, count, bytes_read, products,
          [&, executor, part, m] { matmul(simd.on(executor), part, fast, matrix_view<float>(out.data(), m, rows)); },
          read);
      table.add(
          "matmul float" + suffix, count, bytes_read, products,
          [&, executor, m] {
            matmul(simd.on(executor), matrix_view<const float>(sample.data(), m, cols), w,
                   matrix_view<float>(out.data(), m, rows));
          },
          read);
    }
  }
  table.run(repetitions);
  table.print();
}

}  // namespace

int main(int argc, char** argv) {
  const auto most = static_cast<std::size_t>(bench::option(argc, argv, "--most-mib", 1024)) << 20;
  const auto repetitions = static_cast<int>(bench::option(argc, argv, "--repetitions", 5));
  const auto threads = static_cast<unsigned>(bench::option(argc, argv, "--threads", 2));
  bench::table::filter() = bench::text_option(argc, argv, "--only");
  bench::explain();
  for (std::size_t bytes = 1 << 10; bytes <= most; bytes *= 4) bench_size(bytes, repetitions);
  bench_threads(std::min<std::size_t>(most, std::size_t{512} << 20), threads, repetitions);
}
