/// Speed of int8 products by the backends of tetromino::cpu, side by side.
///
///   bench_backends [--backends NAME,NAME...] [--mib N] [--threads N] [--repetitions N] [--only TEXT]
///
/// Repacked weights of 512 KiB, in cache, on one thread, and of N MiB (256) in huge pages, on one, with up to 16 rows,
/// and on N threads (2); by default all backends that this CPU has, but the scalar one. GB/s counts the weights' bytes;
/// cycles are for 32 weights and one row of activations.

#include <tetromino/cpu.hpp>
#include <tetromino/repacked.hpp>
#include <tetromino/thread_executor.hpp>

#include "bench.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::copy_n, std::min
#include <cstddef>    // std::size_t
#include <cstdio>     // std::printf
#include <string>     // std::string
#include <vector>     // std::vector

namespace {

using namespace tetromino;

constexpr std::size_t cols = 4096;

matrix<float> normal_matrix(std::size_t rows) {
  matrix<float> out(rows, cols);
  out.data = reference::normal_sample(rows, rows * cols);
  return out;
}

/// The same 16 rows again and again.
repacked many_rows(const recipe& r, std::size_t outputs) {
  const auto some = quantize(cpu, normal_matrix(16), r);
  packed<any_format> all(r.format, 1, outputs, cols);
  const auto fill = [](auto& out, const auto& from) {
    for (std::size_t i = 0; i < out.size(); i += from.size()) {
      std::copy_n(from.begin(), std::min(from.size(), out.size() - i), out.begin() + static_cast<std::ptrdiff_t>(i));
    }
  };
  fill(all.codes, some.codes);
  fill(all.scales, some.scales);
  fill(all.macros, some.macros);
  all.tensor_scales = some.tensor_scales;
  return repack(scalar, all, memory_pages::huge);
}

void bench_products(const recipe& r, std::size_t bytes, unsigned threads, const std::vector<std::string>& backends,
                    int repetitions) {
  const std::size_t outputs = bytes / (cols / 2);
  const repacked w = many_rows(r, outputs);
  const auto size = static_cast<double>(w.bytes());
  bench::table table(r.name() + ", " + std::to_string(outputs) + " x " + std::to_string(cols) + ", " +
                         std::to_string(threads) + (threads == 1 ? " thread" : " threads"),
                     threads == 1);
  const thread_executor executor(threads);
  const auto read = table.add("(read the weights)", "", size, static_cast<double>(outputs * cols), [&] {
    executor(threads, [&](std::size_t i) {
      const std::size_t part = w.data.size() / threads;
      bench::read_all(w.data.data() + i * part, part * sizeof w.data[0]);
    });
  });
  struct product {
    int8_matrix x;
    matrix<float> out;
  };
  std::vector<product> all;
  all.reserve(6);
  for (const std::size_t rows : {1u, 4u, 8u, 16u, 64u, 256u}) {
    if (threads == 1 && rows > 16 && outputs > 256) break;
    product& p = all.emplace_back(product{quantize_int8(cpu, normal_matrix(rows)), matrix<float>(rows, outputs)});
    for (const std::string& name : backends) {
      const auto policy = threads == 1 ? cpu.with(name) : cpu.with(name).on(executor);
      table.add(
          "M = " + std::to_string(rows) + ", " + name, "W4A8", size, static_cast<double>(outputs * cols * rows),
          [&p, &w, policy] { matmul(policy, p.x, w, p.out.view()[0]); }, read);
    }
  }
  table.run(repetitions);
  table.print();
}

std::vector<std::string> parts(const std::string& text) {
  std::vector<std::string> out;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    out.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const auto bytes = static_cast<std::size_t>(bench::option(argc, argv, "--mib", 256) * 1048576.0);
  const auto threads = static_cast<unsigned>(bench::option(argc, argv, "--threads", 2));
  const auto repetitions = static_cast<int>(bench::option(argc, argv, "--repetitions", 9));
  bench::table::filter() = bench::text_option(argc, argv, "--only");
  std::vector<std::string> backends;
  if (const std::string names = bench::text_option(argc, argv, "--backends"); !names.empty()) {
    backends = parts(names);
  } else {
    const auto here = cpu_backends();
    backends.assign(here.begin() + 1, here.end());
  }
  bench::explain();
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-static", "nvfp4/amax"}) {
    const recipe r = recipe::parse(name);
    bench_products(r, std::size_t{512} << 10, 1, backends, repetitions);
    bench_products(r, bytes, 1, backends, repetitions);
    if (threads > 1) bench_products(r, bytes, threads, backends, repetitions);
  }
}
