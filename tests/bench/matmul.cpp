/// Speed of matmul on the CPU: 8-bit, 4-bit and bfloat16 activations by packed weights, linear and repacked.
///
///   bench_matmul [--mib N] [--repetitions N] [--only TEXT] [--pages huge]
///
/// Weights of N MiB (128), more than most caches hold, and of 256 KiB; and grouped_matmul over as many experts of 1024
/// outputs as fit N MiB. GB/s counts the weights' bytes; cycles are for 32 weights and one row of activations. The
/// ceiling is to read the same bytes. Weights in either order have the usual pages, or all of them huge ones.
/// product_contender.hpp says how to put another library beside these.

#include <tetromino/matmul.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/repacked.hpp>
#include <tetromino/simd.hpp>

#include "bench.hpp"
#include "product_contender.hpp"
#include "reference/generators.hpp"

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t
#include <string>   // std::string
#include <utility>  // std::move
#include <vector>   // std::vector

namespace {

using namespace tetromino;

constexpr std::size_t cols = 4096;

matrix<float> normal_matrix(std::size_t rows) {
  matrix<float> out(rows, cols);
  const std::vector<float> sample = reference::normal_sample(rows, 16 * cols + 1);
  for (std::size_t i = 0; i < out.data.size(); ++i) out.data[i] = sample[i % sample.size()];
  return out;
}

memory_pages pages = memory_pages::usual;

/// Packed weights [experts, outputs, cols] in such pages.
class paged_weights {
 public:
  paged_weights(const recipe& r, std::size_t experts, std::size_t outputs) : shape_(r.format, experts, outputs, cols) {
    const auto some = quantize(simd, normal_matrix(16), r);
    fill(codes_, shape_.code_bytes(), some.codes);
    fill(scales_, shape_.scale_bytes(), some.scales);
    fill(macros_, shape_.macro_bytes(), some.macros);
    tensor_scales_ = some.tensor_scales;
  }
  [[nodiscard]] packed_view<any_format> view() const {
    return {shape_.format, shape_.matrices, shape_.rows, shape_.cols, codes_, scales_, macros_, tensor_scales_};
  }
  [[nodiscard]] double bytes() const { return static_cast<double>(codes_.size() + scales_.size() + macros_.size()); }
  void read() const {
    for (const auto* part : {&codes_, &scales_, &macros_}) bench::read_all(part->data(), part->size());
  }

 private:
  using paged_bytes = std::vector<std::uint8_t, detail::page_allocator<std::uint8_t>>;
  static void fill(paged_bytes& out, std::size_t size, const std::vector<std::uint8_t>& some) {
    out = paged_bytes(size, 0, detail::page_allocator<std::uint8_t>(pages == memory_pages::huge));
    for (std::size_t i = 0; i < size; ++i) out[i] = some[i % some.size()];
  }

  packed_shape shape_;
  paged_bytes codes_, scales_, macros_;
  std::vector<float> tensor_scales_;
};

matrix<bfloat16> as_bfloat16(const matrix<float>& x) {
  matrix<bfloat16> out(x.rows, x.cols);
  for (std::size_t i = 0; i < x.data.size(); ++i) out.data[i] = bfloat16(x.data[i]);
  return out;
}

void bench_format(const recipe& r, std::size_t bytes, int repetitions, bool in_memory) {
  const std::size_t outputs = bytes / (cols / 2);
  const paged_weights storage(r, 1, outputs);
  const auto weights = storage.view();
  const double size = storage.bytes();
  bench::table table(r.name() + ", " + std::to_string(outputs) + " x " + std::to_string(cols) + ", " +
                     (!in_memory                    ? "in cache, "
                      : pages == memory_pages::huge ? "in huge pages, "
                                                    : "in memory, ") +
                     std::string(simd.isa()));
  const repacked fast = repack(simd, weights, pages);
  const auto weight_count = static_cast<double>(outputs * cols);
  const auto read = table.add("(read the weights)", "", size, weight_count, [&] { storage.read(); });
  table.add(
      "repack", "", size, weight_count, [&] { bench::sink = repack(simd, weights, pages).bytes(); }, read);
  struct activations {
    matrix<float> x;
    matrix<bfloat16> x16;
    int8_matrix x8;
    packed<any_format> x4;
    matrix<float> out;
  };
  std::vector<activations> all;
  all.reserve(4);
  for (const std::size_t rows : {1u, 4u, 16u, 64u}) {
    if (in_memory && rows > 16) break;
    activations a;
    a.x = normal_matrix(rows);
    a.x16 = as_bfloat16(a.x);
    a.x8 = quantize_int8(simd, a.x);
    a.x4 = quantize(simd, a.x, r);
    a.out = matrix<float>(rows, outputs);
    activations& stored = all.emplace_back(std::move(a));
    const double products = static_cast<double>(outputs * cols * rows);
    const std::string suffix = ", M = " + std::to_string(rows);
    const auto out = [&stored, outputs, rows] { return matrix_view<float>(stored.out.data.data(), rows, outputs); };
    table.add(
        "int8" + suffix, "W4A8", size, products, [&, out] { matmul(simd, stored.x8, weights, out()); }, read);
    table.add(
        "int8, repacked" + suffix, "W4A8", size, products, [&, out] { matmul(simd, stored.x8, fast, out()); }, read);
    table.add(
        "packed" + suffix, "W4A4", size, products, [&, out] { matmul(simd, stored.x4, weights, out()); }, read);
    table.add(
        "packed, repacked" + suffix, "W4A4", size, products, [&, out] { matmul(simd, stored.x4, fast, out()); }, read);
    table.add(
        "bfloat16" + suffix, "W4A16", size, products, [&, out] { matmul(simd, stored.x16, weights, out()); }, read);
    table.add(
        "bfloat16, repacked" + suffix, "W4A16", size, products, [&, out] { matmul(simd, stored.x16, fast, out()); },
        read);
  }
#if defined(TETROMINO_BENCH_CONTENDER)
  for (const activations& a : all) {
    for (bench::product_contender& c : bench::product_contenders(weights, a.x, pages)) {
      table.add(c.work + ", M = " + std::to_string(a.x.rows), "", size, static_cast<double>(outputs * cols * a.x.rows),
                std::move(c.f), read);
    }
  }
#endif
  table.run(repetitions);
  table.print();
}

/// As many rows of activations for each expert.
void bench_experts(const recipe& r, std::size_t bytes, int repetitions) {
  constexpr std::size_t outputs = 1024;
  const std::size_t experts = bytes / (outputs * cols / 2);
  const paged_weights storage(r, experts, outputs);
  const auto weights = storage.view();
  const repacked fast = repack(simd, weights, pages);
  const double size = storage.bytes();
  bench::table table(r.name() + ", " + std::to_string(experts) + " experts of " + std::to_string(outputs) + " x " +
                     std::to_string(cols) + ", " + std::string(simd.isa()));
  const auto read = table.add("(read the weights)", "", size, 0, [&] { storage.read(); });
  struct tokens {
    std::vector<std::uint32_t> offsets;
    matrix<bfloat16> x16;
    int8_matrix x8;
    matrix<float> out;
  };
  std::vector<tokens> all;
  all.reserve(3);
  for (const std::size_t each : {1u, 4u, 16u}) {
    std::vector<std::uint32_t> offsets;
    for (std::size_t e = 0; e <= experts; ++e) offsets.push_back(static_cast<std::uint32_t>(e * each));
    const matrix<float> x = normal_matrix(experts * each);
    tokens& t = all.emplace_back(
        tokens{std::move(offsets), as_bfloat16(x), quantize_int8(simd, x), matrix<float>(x.rows, outputs)});
    const double products = static_cast<double>(outputs * cols) * static_cast<double>(x.rows);
    const auto add = [&](const char* name, const auto& activations, const auto& w) {
      table.add(
          name + (", M = " + std::to_string(each)) + " each", "", size, products,
          [&t, &activations, &w] { grouped_matmul(simd, activations, w, t.offsets, t.out.view()[0]); }, read);
    };
    add("int8", t.x8, weights);
    add("int8, repacked", t.x8, fast);
    add("bfloat16", t.x16, weights);
  }
  table.run(repetitions);
  table.print();
}

}  // namespace

int main(int argc, char** argv) {
  const auto bytes = static_cast<std::size_t>(bench::option(argc, argv, "--mib", 128) * 1048576.0);
  const auto repetitions = static_cast<int>(bench::option(argc, argv, "--repetitions", 9));
  bench::table::filter() = bench::text_option(argc, argv, "--only");
  if (bench::text_option(argc, argv, "--pages") == "huge") pages = memory_pages::huge;
  bench::explain();
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-static", "nvfp4/amax"}) {
    bench_format(recipe::parse(name), std::size_t{256} << 10, repetitions, false);
    bench_format(recipe::parse(name), bytes, repetitions, true);
    bench_experts(recipe::parse(name), bytes, repetitions);
  }
}
