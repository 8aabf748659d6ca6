/// Products with packed weights, against sums in double over the unpacked weights, on both kernels: ragged shapes, all
/// formats, all activation types, gated and biased outputs, experts, and inputs meant to go wrong.

#include "harness.hpp"

#include <tetromino/cuda.hpp>
#include <tetromino/dequantize.hpp>
#include <tetromino/e4m3_activations.hpp>
#include <tetromino/quantize.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <sstream>

namespace {

using namespace harness;
using tetromino::batch_view;
using tetromino::e4m3;
using tetromino::matrix_view;
using tetromino::recipe;
using tetromino::cuda::gating_rows;

/// One thread for each sum: out = Σ x w and size = Σ |x w|, for weights [matrices, rows, cols] in float.
template <class T>
__global__ void reference_kernel(const T* x, std::size_t x_stride, const float* w, const std::uint32_t* row_matrix,
                                 std::uint32_t m_count, std::uint32_t n_count, std::uint32_t cols, double* out,
                                 double* size) {
  const std::uint32_t n = blockIdx.x * blockDim.x + threadIdx.x, m = blockIdx.y;
  if (n >= n_count || m >= m_count) return;
  const T* a = x + m * x_stride;
  const float* b = w + (static_cast<std::size_t>(row_matrix[m]) * n_count + n) * cols;
  double sum = 0, magnitude = 0;
  for (std::uint32_t k = 0; k < cols; ++k) {
    const double product = static_cast<double>(tetromino::detail::to_float(a[k])) * static_cast<double>(b[k]);
    sum += product;
    magnitude += fabs(product);
  }
  out[static_cast<std::size_t>(m) * n_count + n] = sum;
  size[static_cast<std::size_t>(m) * n_count + n] = magnitude;
}

struct shape {
  std::size_t m, n, k;
};

struct setting {
  std::vector<std::uint32_t> offsets{};  ///< of experts; empty: one matrix
  gating_rows gating = gating_rows::none;
  bool bias = false;
  std::size_t x_gap = 0, out_gap = 0;  ///< elements between rows
  bool odd_rows = false;               ///< of x, whose scale is zero or NaN (E4M3)
  bool captured = false;               ///< in a graph, before the offsets are known
};

double worst_error = 0;

/// The type of the outputs for activations of type X.
template <class X>
using output_of = std::conditional_t<std::is_same_v<X, e4m3>, bfloat16, X>;
template <class X>
const char* const activations_name = std::is_same_v<X, e4m3>   ? " e4m3 "
                                     : std::is_same_v<X, half> ? " half "
                                                               : " bfloat16 ";

/// Weights as products with activations in E4M3 see them: to nearest even multiples of 2^-15 of their row's largest
/// scale.
void round_weights(std::vector<float>& w, const std::vector<std::uint8_t>& scales, std::size_t cols) {
  const std::size_t blocks = (cols + 31) / 32;
  for (std::size_t r = 0; r < w.size() / cols; ++r) {
    int top = 0;
    for (std::size_t b = 0; b < blocks; ++b) {
      if (scales[r * blocks + b] != 255) top = std::max(top, static_cast<int>(scales[r * blocks + b]));
    }
    for (std::size_t k = 0; k < cols; ++k) {
      float& v = w[r * cols + k];
      if (scales[r * blocks + k / 32] + 14 < top) v = std::ldexp(std::nearbyint(std::ldexp(v, 142 - top)), top - 142);
    }
  }
}

/// Activations on the device, for the reference and for products: [m, k] of T, NaN between rows.
template <class X>
struct operand {
  std::size_t rows, cols, stride;
  device<X> values;

  operand(const shape& s, const setting& how, const std::vector<float>& x)
      : rows(s.m), cols(s.k), stride(s.k + how.x_gap), values(spread(x, s, stride)) {}
  [[nodiscard]] double scale(std::size_t) const { return 1; }
  [[nodiscard]] matrix_view<const X> view() const { return {values.data(), rows, cols, stride}; }

  static std::vector<X> spread(const std::vector<float>& x, const shape& s, std::size_t stride) {
    std::vector<X> out(s.m * stride, tetromino::detail::from_float<X>(NAN));
    for (std::size_t i = 0; i < x.size(); ++i) {
      out[i / s.k * stride + i % s.k] = tetromino::detail::from_float<X>(x[i]);
    }
    return out;
  }
};
/// The same in E4M3; `values` are the numbers that the codes stand for, which the scales are to multiply.
template <>
struct operand<e4m3> {
  tetromino::e4m3_matrix x;
  std::size_t stride;
  device<float> values;
  device<std::uint8_t> codes;
  device<float> scales;

  operand(const shape& s, const setting& how, const std::vector<float>& of)
      : x(made(s, how, of)), stride(s.k), values(decoded(x)), codes(x.values), scales(x.scales) {}
  [[nodiscard]] double scale(std::size_t row) const { return static_cast<double>(x.scales[row]); }
  [[nodiscard]] tetromino::e4m3_view<> view() const { return {x.rows, x.cols, codes.span(), scales.span()}; }

  static tetromino::e4m3_matrix made(const shape& s, const setting& how, const std::vector<float>& of) {
    auto out = tetromino::quantize_e4m3(tetromino::scalar, matrix_view<const float>(of.data(), s.m, s.k));
    const std::size_t bytes = out.view().stride();
    for (std::size_t r = 3; how.odd_rows && r < s.m; r += 7) {
      std::fill_n(out.values.data() + r * bytes, bytes, std::uint8_t{0});
      out.scales[r] = r % 2 == 0 ? 0.0f : NAN;
    }
    return out;
  }
  static std::vector<float> decoded(const tetromino::e4m3_matrix& x) {
    const std::size_t bytes = (x.cols + 127) / 128 * 128;
    return generate<float>(x.rows * x.cols, [&](std::size_t i) {
      return static_cast<float>(e4m3::from_bits(x.values[i / x.cols * bytes + i % x.cols]).value());
    });
  }
};

/// Launches a product from a graph that was captured before the offsets were there.
template <class X>
void run_captured(const tetromino::cuda::detail::matmul_job<X>& job, device<std::uint32_t>& offsets, const char* what) {
  const auto known = offsets.values();
  offsets.poison();
  cudaStream_t handle;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  require(cudaStreamCreate(&handle), what);
  require(cudaStreamBeginCapture(handle, cudaStreamCaptureModeGlobal), what);
  require(tetromino::cuda::detail::matmul(tetromino::cuda::stream(handle), job), what);
  require(cudaStreamEndCapture(handle, &graph), what);
  require(cudaGraphInstantiate(&exec, graph, 0), what);
  require(cudaMemcpy(offsets.data(), known.data(), known.size() * sizeof(std::uint32_t), cudaMemcpyHostToDevice), what);
  require(cudaGraphLaunch(exec, handle), what);
  require(cudaStreamSynchronize(handle), what);
  require(cudaGraphExecDestroy(exec), what);
  require(cudaGraphDestroy(graph), what);
  require(cudaStreamDestroy(handle), what);
}

template <class X>
void check_product(const std::string& name, const shape& s, const recipe& r, const setting& how,
                   const std::vector<float>& weights, const std::vector<float>& activations) {
  using T = output_of<X>;
  constexpr bool is_e4m3 = std::is_same_v<X, e4m3>;
  const std::size_t matrices = how.offsets.empty() ? 1 : how.offsets.size() - 1;
  const std::size_t outputs = how.gating == gating_rows::none ? s.n : s.n / 2;
  const std::string what = name + activations_name<X> + r.name() + " [" + std::to_string(s.m) + ", " +
                           std::to_string(s.n) + ", " + std::to_string(s.k) + "] × " + std::to_string(matrices);

  // pack on the device, repack, and unpack for the reference
  const tetromino::cuda::stream stream;
  const device<float> w(weights);
  const tetromino::packed_shape packed_shape{r.format, matrices, s.n, s.k};
  device_packed packed(packed_shape, matrices);
  tetromino::quantize_options options;
  options.rule = r.rule, options.macro = r.macro, options.special = tetromino::special_values::poison;
  require(
      tetromino::try_quantize_to(stream, batch_view<const float>(w.data(), matrices, s.n, s.k), packed.view(), options),
      what.c_str());
  const device<float> unpacked(weights.size());
  require(tetromino::try_dequantize_to(stream, packed.view(), batch_view<float>(unpacked.data(), matrices, s.n, s.k)),
          what.c_str());
  if constexpr (is_e4m3) {
    auto rounded = unpacked.values();
    round_weights(rounded, packed.scales.values(), s.k);
    require(cudaMemcpy(unpacked.data(), rounded.data(), rounded.size() * sizeof(float), cudaMemcpyHostToDevice),
            what.c_str());
  }
  const tetromino::cuda::repacked_shape shape{r.format, matrices, s.n, s.k, how.gating};
  const device<std::byte> repacked(shape.bytes());
  const tetromino::cuda::repacked_view<X, std::byte> ready{shape, repacked.span()};
  require(tetromino::try_repack_to(stream, packed.view(), ready), what.c_str());
  expect(repacked.is_intact(), "%s: repacked past the end", what.c_str());

  const std::size_t out_stride = outputs + how.out_gap;
  const operand<X> x(s, how, activations);
  std::vector<std::uint32_t> row_matrix(s.m, 0);
  for (std::size_t e = 0; e + 1 < how.offsets.size(); ++e) {
    for (std::size_t i = how.offsets[e]; i < how.offsets[e + 1]; ++i) row_matrix[i] = static_cast<std::uint32_t>(e);
  }
  const device<std::uint32_t> row_matrix_device(row_matrix);
  device<std::uint32_t> offsets(how.offsets);
  std::vector<float> bias(how.bias ? matrices * s.n : 0);
  const numbers noise{77};
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = noise.normal(i);
  const device<float> bias_device(bias);

  const device<double> sums(s.m * s.n), sizes(s.m * s.n);
  reference_kernel<<<dim3(static_cast<unsigned>((s.n + 127) / 128), static_cast<unsigned>(s.m)), 128>>>(
      x.values.data(), x.stride, unpacked.data(), row_matrix_device.data(), static_cast<std::uint32_t>(s.m),
      static_cast<std::uint32_t>(s.n), static_cast<std::uint32_t>(s.k), sums.data(), sizes.data());
  require(cudaGetLastError(), "reference_kernel");
  const auto expected = sums.values(), magnitude = sizes.values();

  for (const bool portable : {false, true}) {
    if (is_e4m3 && portable) continue;  // there is no such kernel
    const device<T> out(s.m * out_stride);
    tetromino::cuda::detail::matmul_job<X> job{};
    job.shape = shape, job.weights = repacked.data(), job.row_count = s.m;
    job.row_offsets = how.offsets.empty() ? nullptr : offsets.data();
    job.options.bias = bias_device.span();
    if (!how.bias) job.options = {};
    job.options.settled_weights = s.k % 128 == 0;  // they are: the reference above was waited for
    job.x = x.view();
    job.out = matrix_view<T>(out.data(), s.m, outputs, out_stride);
    job.portable = portable;
    if (how.captured && !portable) {
      run_captured(job, offsets, what.c_str());
    } else {
      require(tetromino::cuda::detail::matmul(stream, job), what.c_str());
    }
    require(cudaDeviceSynchronize(), what.c_str());
    const auto got = out.values();
    expect(out.is_intact(), "%s: written past the end", what.c_str());

    // What a sum loses, beside Σ |x w|. Of E4M3, the tensor cores align 32 products and the sum so far to the largest
    // of them, and drop what lies 13 bits below. Products of one size and sign each lose up to 2^-13 of the sum so far,
    // half of the whole sum on average; others lose little of what cancels.
    const bool is_lossy = is_e4m3 && (name == "wide" || name == "constant");
    const double loss = is_lossy ? 0x1p-14 * static_cast<double>(s.k) : is_e4m3 ? 0x1p-12 : 0x1p-17;
    double error = 0, energy = 0, least_error = 0;  // the last: of exact outputs, rounded
    std::size_t bad = 0;
    std::string first_bad;
    for (std::size_t i = 0; i < s.m; ++i) {
      for (std::size_t j = 0; j < out_stride; ++j) {
        const T result = got[i * out_stride + j];
        if (j >= outputs) {  // between rows nothing is written
          if (result.bits != 0xA5A5) ++bad;
          continue;
        }
        const auto full = [&](std::size_t row) {
          const std::size_t at = i * s.n + row;
          return expected[at] * x.scale(i) + (how.bias ? static_cast<double>(bias[row_matrix[i] * s.n + row]) : 0.0);
        };
        const auto uncertain = [&](std::size_t row) {
          return loss * (is_e4m3 ? x.scale(i) : 1.0) * magnitude[i * s.n + row] + 1e-40;
        };
        double value, slack;
        if (how.gating == gating_rows::none) {
          value = full(j), slack = uncertain(j);
        } else {
          const bool halves = how.gating == gating_rows::halves;
          const std::size_t gate_row = halves ? j : 2 * j, up_row = halves ? outputs + j : 2 * j + 1;
          const double gate = full(gate_row), up = full(up_row), activated = gate / (1.0 + std::exp(-gate));
          value = activated * up;
          slack = 1.2 * uncertain(gate_row) * std::fabs(up) + std::fabs(activated) * uncertain(up_row) +
                  1e-5 * std::fabs(value);
        }
        const double y = static_cast<double>(tetromino::detail::to_float(result));
        // half a unit in the last place of the output type, subnormals of half included
        const double rounding = (std::is_same_v<T, half> ? 0x1.01p-11 : 0x1.01p-8) * (std::fabs(value) + slack) +
                                (std::is_same_v<T, half> ? 0x1p-25 : 0.0);
        const bool overflows = std::is_same_v<T, half> && std::fabs(value) > 65000.0;
        const bool fits = std::isnan(value) ? std::isnan(y) : overflows || std::fabs(y - value) <= rounding + slack;
        if (!fits && ++bad == 1) {
          std::ostringstream text;
          text << "row " << i << ", column " << j << ": expected " << value << ", got " << y;
          first_bad = text.str();
        }
        if (std::isnan(value) || overflows) continue;
        error += (y - value) * (y - value), energy += value * value;
        const double rounded = tetromino::detail::to_float(tetromino::detail::from_float<T>(static_cast<float>(value)));
        least_error += (rounded - value) * (rounded - value);
      }
    }
    expect(bad == 0, "%s%s: %zu outputs off; %s", what.c_str(), portable ? " (portable)" : "", bad, first_bad.c_str());
    // Few outputs, of which one or two are large, can be rounded worse than that all by themselves.
    const double relative = energy == 0 ? 0 : std::sqrt(error / energy);
    const double allowed = energy == 0 ? 0 : std::max(is_e4m3 ? 4e-3 : 2e-3, 1.01 * std::sqrt(least_error / energy));
    if (is_e4m3 && name == "constant") {
      std::printf("E4M3: sums of one sign lost %.1f %% of %zu columns, %s\n", 100 * relative, s.k,
                  how.offsets.empty() ? "shared by clusters" : "in one sum");
      continue;
    }
    if (name != "cancelling") worst_error = std::max(worst_error, relative);
    expect(name == "cancelling" || relative <= allowed, "%s%s: relative error %g, allowed %g", what.c_str(),
           portable ? " (portable)" : "", relative, allowed);
  }
}

std::vector<float> normals(std::size_t n, std::uint64_t seed, float size) {
  const numbers r{seed};
  return generate<float>(n, [&](std::size_t i) { return r.normal(i) * size; });
}

const char* const all_recipes[] = {"mxfp4-32/oas",
                                   "mxfp4-16/oas",
                                   "nvfp4/amax",
                                   "mxfp4-32/oas/mbs-static",
                                   "mxfp4-16/oas/mbs-static",
                                   "mxfp4-16/oas/mbs-static@64",
                                   "mxfp4-32/oas/mbs-static@32",
                                   "mxfp4-16/oas/mbs-static@32",
                                   "mxfp4-32/oas/mbs-static@256",
                                   "mxfp4-32/min-error/mbs-search@8x2",
                                   "mxfp4-32/oas/mbs-static@16x2"};

template <class T>
void shapes() {
  const shape all[] = {{1, 64, 64},     {1, 128, 256},   {3, 72, 200},    {8, 320, 1024},  {9, 200, 136},
                       {16, 256, 512},  {17, 192, 384},  {24, 320, 2880}, {32, 512, 2880}, {33, 264, 320},
                       {48, 200, 704},  {64, 640, 1024}, {65, 256, 704},  {130, 200, 256}, {257, 384, 448},
                       {520, 136, 128}, {5, 7168, 512},  {1, 2048, 7168}, {7, 40, 45},     {40, 100, 77},
                       {200, 4096, 256}};
  std::uint64_t seed = 1;
  for (const shape& s : all) {
    for (const char* name : all_recipes) {
      if (is_short() && seed % 7 != 0) {  // every recipe and every shape still has its turn
        ++seed;
        continue;
      }
      setting how;
      if (seed % 3 == 1) how.x_gap = 8, how.out_gap = 24;
      if (seed % 5 == 2) how.x_gap = 3, how.out_gap = 5;
      how.bias = seed % 2 == 0;
      check_product<T>("random", s, recipe::parse(name), how, normals(s.n * s.k, seed, 0.02f),
                       normals(s.m * s.k, seed + 1, 1.0f));
      ++seed;
    }
  }
  // tiles of 256 rows, which a product gets where they take fewer rounds; the last rows fill less than half of one
  for (const char* name : {"mxfp4-32/oas", "nvfp4/amax", "mxfp4-16/oas/mbs-static", "mxfp4-32/oas/mbs-static@32",
                           "mxfp4-32/oas/mbs-static@8x2"}) {
    const shape s = is_short() ? shape{512, 7168, 128} : shape{2100, 3072, 320};
    check_product<T>("tall", s, recipe::parse(name), {}, normals(s.n * s.k, seed, 0.02f),
                     normals(s.m * s.k, seed + 1, 1.0f));
    ++seed;
  }
  // up to 16, 24 and 32 rows of x, and so many weight rows that each of 132 multiprocessors gets 64 or 128; by a single
  // stage of columns; and so many that most would get 192, which are a tile then
  for (const shape& s :
       {shape{13, 14336, 512}, {22, 14336, 512}, {30, 14336, 512}, {16, 14336, 100}, {9, 17000, 320}}) {
    for (const char* name : all_recipes) {
      if (!is_short() || seed % 4 == 0) {
        check_product<T>("wide", s, recipe::parse(name), {}, normals(s.n * s.k, seed, 0.02f),
                         normals(s.m * s.k, seed + 1, 1.0f));
      }
      ++seed;
    }
  }
  if (is_short()) {  // every other kernel, with more columns than its stages hold
    for (const std::size_t m : {4, 12, 32, 64, 128, 300}) {
      for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-static", "mxfp4-32/oas/mbs-static@32", "nvfp4/amax",
                               "mxfp4-32/oas/mbs-static@8x2"}) {
        const shape s{m, 192, 3072};
        check_product<T>("long", s, recipe::parse(name), {}, normals(s.n * s.k, seed, 0.02f),
                         normals(s.m * s.k, seed + 1, 1.0f));
        ++seed;
      }
    }
    return;
  }
  // many tiles for each block
  for (const char* name : {"mxfp4-32/oas", "nvfp4/amax", "mxfp4-16/oas/mbs-static"}) {
    const shape s{4100, 3072, 256};
    check_product<T>("large", s, recipe::parse(name), {}, normals(s.n * s.k, seed, 0.02f),
                     normals(s.m * s.k, seed + 1, 1.0f));
  }
}

/// Offsets of experts with so many rows each.
std::vector<std::uint32_t> offsets_of(std::size_t experts, const std::vector<std::uint32_t>& counts) {
  std::vector<std::uint32_t> out(experts + 1, 0);
  for (std::size_t e = 0; e < experts; ++e) out[e + 1] = out[e] + counts[e % counts.size()];
  return out;
}

template <class T>
void experts() {
  std::uint64_t seed = 500;
  const std::vector<std::uint32_t> splits[] = {{0, 1, 1, 3, 8},          {0, 0, 0, 5},        {0, 14, 20, 31, 40},
                                               {0, 20, 41, 41, 60, 100}, {0, 24, 60, 61, 96}, {0, 70, 70, 73, 200, 460},
                                               {0, 300, 301, 302, 1100}};
  for (const auto& offsets : splits) {
    for (const char* name : all_recipes) {
      for (const auto gating : {gating_rows::none, gating_rows::halves, gating_rows::interleaved}) {
        const shape s{offsets.back(), 208, 320};
        setting how;
        how.offsets = offsets;
        how.gating = gating;
        how.bias = seed % 2 == 0;
        how.out_gap = seed % 5 == 2 ? 3 : 0;
        how.captured = seed % 4 == 1;
        check_product<T>("experts", s, recipe::parse(name), how, normals((offsets.size() - 1) * s.n * s.k, seed, 0.1f),
                         normals(s.m * s.k, seed + 1, 1.0f));
        ++seed;
      }
    }
  }
  // tiles of 16, 24 and 32 rows, of which each of 132 multiprocessors gets a share: three times 64 weight rows here,
  // six or seven below
  const std::vector<std::uint32_t> counts[] = {
      {8, 1, 16, 0, 12, 17, 5, 3, 10}, {12, 1, 24, 0, 18, 25, 7, 5, 16}, {20, 1, 32, 0, 28, 33, 11, 8, 38}};
  for (const char* name : all_recipes) {
    setting how;
    how.offsets = offsets_of(18, counts[seed / 3 % 3]);
    how.gating = std::array{gating_rows::none, gating_rows::halves, gating_rows::interleaved}[seed % 3];
    how.bias = seed % 2 == 0;
    const shape s{how.offsets.back(), 1400, 320};
    if (!is_short() || seed % 4 == 0) {
      check_product<T>("wide experts", s, recipe::parse(name), how, normals(18 * s.n * s.k, seed, 0.1f),
                       normals(s.m * s.k, seed + 1, 1.0f));
    }
    ++seed;
  }
  const auto many_weights = normals(std::size_t{18} * 3000 * 840, seed, 0.1f);
  for (const char* name : all_recipes) {
    setting how;
    how.offsets = offsets_of(18, counts[seed % 3]);
    how.gating = std::array{gating_rows::none, gating_rows::halves, gating_rows::interleaved}[seed / 3 % 3];
    how.bias = seed % 2 == 1;
    const shape s{how.offsets.back(), 3000, 840};
    if (!is_short() || seed % 4 == 0) {
      check_product<T>("wide experts", s, recipe::parse(name), how, many_weights, normals(s.m * s.k, seed + 1, 1.0f));
    }
    ++seed;
  }
  // tiles of 256 rows
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-static"}) {
    if (is_short()) break;
    const shape s{3900, 3328, 128};
    setting how;
    how.offsets = {0, 1700, 1750, 3900};
    check_product<T>("large experts", s, recipe::parse(name), how, normals(3 * s.n * s.k, seed, 0.1f),
                     normals(s.m * s.k, seed + 1, 1.0f));
    ++seed;
  }
  // few rows of many columns, which tiles of 8 rows take
  for (const char* name : all_recipes) {
    const shape s{6, 72, 6272};
    setting how;
    how.offsets = {0, 2, 2, 5, 6};
    check_product<T>("deep experts", s, recipe::parse(name), how, normals(4 * s.n * s.k, seed, 0.1f),
                     normals(s.m * s.k, seed + 1, 1.0f));
    ++seed;
  }
  // more experts than a warp has lanes, most of them idle
  std::vector<std::uint32_t> offsets(141, 0);
  const numbers r{9};
  for (std::size_t e = 1; e < offsets.size(); ++e) {
    offsets[e] = offsets[e - 1] + static_cast<std::uint32_t>(r.bits(e) % 4 == 0 ? r.bits(e + 900) % 30 : 0);
  }
  const shape s{offsets.back(), 128, 256};
  setting how;
  how.offsets = offsets;
  how.gating = gating_rows::halves;
  check_product<T>("many experts", s, recipe::parse("mxfp4-32/oas"), how, normals(140 * s.n * s.k, 3, 0.1f),
                   normals(s.m * s.k, 4, 1.0f));
}

/// Experts whose tiles are fitted to the rows of each.
template <class T>
void fitted_experts() {
  std::uint64_t seed = 700;
  // a tile for each multiprocessor, without which none are fitted; in the last of a row, warpgroups are idle
  const auto around_sixteens = offsets_of(27, {0,  1,  15, 16, 17, 31, 32, 33,  47,  48,  49,  63,  64, 65,
                                               79, 80, 81, 95, 96, 97, 0,  111, 112, 113, 127, 129, 290});
  for (const char* name : all_recipes) {
    const shape s{around_sixteens.back(), 1056, 320};
    setting how;
    how.offsets = around_sixteens;
    how.gating = std::array{gating_rows::none, gating_rows::halves, gating_rows::interleaved}[seed % 3];
    how.bias = seed % 2 == 0;
    how.x_gap = seed % 7 == 3 ? 8 : 0, how.out_gap = seed % 5 == 2 ? 3 : 0;
    how.captured = seed % 4 == 1;
    if (!is_short() || seed % 4 == 0) {
      check_product<T>("fitted", s, recipe::parse(name), how, normals(27 * s.n * s.k, seed, 0.1f),
                       normals(s.m * s.k, seed + 1, 1.0f));
    }
    ++seed;
  }
  // few rows of many experts, and one that has more
  setting how;
  how.offsets = offsets_of(140, {0, 1, 7, 8, 9, 15, 16, 17, 0, 3, 2, 0, 5, 0, 1, 40, 4, 6, 0, 2});
  const shape s{how.offsets.back(), 300, 648};
  const auto weights = normals(140 * s.n * s.k, seed, 0.1f), activations = normals(s.m * s.k, seed + 1, 1.0f);
  for (const char* name : all_recipes) {
    how.gating = seed % 2 == 0 ? gating_rows::none : gating_rows::halves;
    how.bias = seed % 3 == 0;
    how.out_gap = seed % 5 == 2 ? 3 : 0;
    how.captured = seed % 4 == 1;
    if (!is_short() || seed % 4 == 0) {
      check_product<T>("few rows", s, recipe::parse(name), how, weights, activations);
    }
    ++seed;
  }
}

/// Inputs meant to go wrong.
template <class T>
void adversarial() {
  const shape s{40, 192, 1024};
  const numbers r{31};
  for (const char* name : all_recipes) {
    const recipe rule = recipe::parse(name);
    // scales from one end of the range to the other, within each row for bfloat16
    const int most = std::is_same_v<T, half> ? 20 : 240;
    auto wide = normals(s.n * s.k, 41, 1.0f);
    for (std::size_t i = 0; i < wide.size(); ++i) {
      const auto step = static_cast<int>(r.bits(i / 32) % static_cast<unsigned>(most));
      wide[i] = std::ldexp(wide[i], std::is_same_v<T, half> ? step - 24 : step - 140);
    }
    auto small = normals(s.m * s.k, 42, std::is_same_v<T, half> ? 1.0f : 1e-4f);
    check_product<T>("wide", s, rule, {}, wide, small);
    // each weight row of its own size
    auto rows = normals(s.n * s.k, 43, 1.0f);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = std::ldexp(rows[i], static_cast<int>(i / s.k) % 40 - 30);
    check_product<T>("rows of all sizes", s, rule, {}, rows, normals(s.m * s.k, 44, 0.01f));
    // sums that cancel
    auto signs = normals(s.m * s.k, 45, 1.0f);
    auto even = normals(s.n * s.k, 46, 1.0f);
    for (std::size_t i = 0; i < even.size(); ++i) even[i] = std::fabs(even[i - i % 2]);
    for (std::size_t i = 0; i < signs.size(); ++i) signs[i] = (i % 2 == 0 ? 1.0f : -1.0f) * std::fabs(signs[i - i % 2]);
    check_product<T>("cancelling", s, rule, {}, even, signs);
    // zero rows, zero blocks and, where the policy lets them in, NaN blocks
    auto holes = normals(s.n * s.k, 47, 1.0f);
    for (std::size_t i = 0; i < holes.size(); ++i) {
      if (i / s.k % 7 == 3 || r.bits(i / 16) % 5 == 0) holes[i] = 0.0f;
    }
    holes[5 * s.k + 100] = NAN, holes[100 * s.k] = INFINITY;
    check_product<T>("holes", s, rule, {}, holes, normals(s.m * s.k, 48, 1.0f));
    // equal weights, largest values
    check_product<T>("constant", s, rule, {}, std::vector<float>(s.n * s.k, -6.0f),
                     std::vector<float>(s.m * s.k, 1.0f));
  }
}

/// Weights repacked for E4M3, from what the order is documented to be: tiles of 64 × 64, in them words [warp 4][lane
/// 4 g + t][16 columns], then scales [g][warp][32 columns][row g, row g + 8]; a float for each row.
std::vector<std::uint8_t> expected_e4m3_order(const tetromino::packed_view<tetromino::any_format>& w,
                                              gating_rows gating) {
  const std::size_t row_tiles = (w.rows + 63) / 64, col_tiles = (w.cols + 127) / 128 * 2;
  const std::size_t blocks = (w.cols + 31) / 32, tiles = w.matrices * row_tiles * col_tiles;
  const std::size_t factors_at = (tiles * 2176 + 127) / 128 * 128;
  std::vector<std::uint8_t> out(factors_at + w.matrices * row_tiles * 64 * 4, 0);
  for (std::size_t row = 0; row < w.matrices * row_tiles * 64; ++row) {
    const std::size_t matrix = row / (row_tiles * 64), in_matrix = row % (row_tiles * 64), in_tile = row % 64;
    const std::size_t output = in_matrix / 16 * 8 + in_matrix % 8, is_up = in_matrix / 8 % 2;
    std::size_t source = in_matrix;
    if (gating == gating_rows::halves) source = output < w.rows / 2 ? is_up * (w.rows / 2) + output : w.rows;
    if (gating == gating_rows::interleaved) source = output < w.rows / 2 ? 2 * output + is_up : w.rows;
    const bool exists = source < w.rows;
    const std::uint8_t* const scales = w.scales.data() + (matrix * w.rows + source) * blocks;
    int top = 0;
    for (std::size_t b = 0; exists && b < blocks; ++b) top = scales[b] == 255 ? top : std::max(top, int{scales[b]});
    const float factor = std::ldexp(1.0f, top - 133);
    std::memcpy(out.data() + factors_at + row * 4, &factor, 4);
    if (!exists) continue;
    const std::size_t warp = in_tile / 16, g = in_tile % 8, is_high = in_tile / 8 % 2;
    for (std::size_t k = 0; k < blocks * 32; ++k) {
      const std::uint8_t scale = scales[k / 32];
      std::uint8_t* const tile = out.data() + (row / 64 * col_tiles + k / 64) * 2176;
      const int below = scale == 255 ? 31 : std::min(top - scale, 30);
      tile[2048 + ((g * 4 + warp) * 2 + k % 64 / 32) * 2 + is_high] = static_cast<std::uint8_t>(8 * below);
      if (scale == 255) continue;
      const std::size_t lane = 4 * g + k % 16 / 4, j = k % 4;
      const std::uint32_t code =
          std::uint32_t{w.codes[(matrix * w.rows + source) * blocks * 16 + k / 2]} >> k % 2 * 4 & 15u;
      std::uint8_t* const at = tile + ((warp * 32 + lane) * 4 + k % 64 / 16) * 4;
      std::uint32_t word = 0;
      std::memcpy(&word, at, 4);
      word |= (code & 7u) << (16 * is_high + 4 * j) | code >> 3 << (8 * j + (is_high != 0 ? 3 : 7));
      std::memcpy(at, &word, 4);
    }
  }
  return out;
}

/// Repacking for activations in E4M3 on any GPU, byte by byte: blocks of a row far apart, of NaN, and of zeros.
void e4m3_order() {
  for (const gating_rows gating : {gating_rows::none, gating_rows::halves, gating_rows::interleaved}) {
    for (const shape& s : {shape{3, 64, 128}, shape{1, 200, 328}, shape{2, 72, 45}}) {  // matrices, rows, columns
      const tetromino::packed_shape linear{tetromino::mxfp4{}, s.m, s.n, s.k};
      const numbers r{s.n + s.k};
      auto codes = generate<std::uint8_t>(linear.code_bytes(),
                                          [&](std::size_t i) { return static_cast<std::uint8_t>(r.bits(i)); });
      auto scales = generate<std::uint8_t>(linear.scale_bytes(), [&](std::size_t i) {
        const std::uint64_t bits = r.bits(i + 1'000'000);
        return static_cast<std::uint8_t>(bits % 11 == 0 ? 255 : bits % 7 == 0 ? bits % 200 : 100 + bits % 40);
      });
      std::fill_n(scales.begin(), linear.blocks_per_row(), std::uint8_t{255});
      const device<std::uint8_t> codes_there(codes), scales_there(scales);
      const tetromino::cuda::repacked_shape order{tetromino::mxfp4{}, s.m, s.n, s.k, gating};
      const device<std::byte> out(order.bytes());
      tetromino::packed_view<tetromino::any_format> w{tetromino::mxfp4{},  s.m, s.n, s.k, codes_there.span(),
                                                      scales_there.span(), {},  {}};
      require(tetromino::try_repack_to(tetromino::cuda::stream{}, w,
                                       tetromino::cuda::repacked_view<e4m3, std::byte>{order, out.span()}),
              "repack for e4m3");
      w.codes = codes, w.scales = scales;
      const auto expected = expected_e4m3_order(w, gating);
      const auto got = out.values();
      expect(out.is_intact(), "e4m3 order: written past the end");
      std::size_t at = 0;
      while (at < expected.size() && at < got.size() && expected[at] == std::to_integer<std::uint8_t>(got[at])) ++at;
      expect(at == expected.size() && at == got.size(), "e4m3 order [%zu, %zu, %zu]: byte %zu of %zu", s.m, s.n, s.k,
             at, expected.size());
    }
  }
}

/// Activations in E4M3, on Hopper: ragged shapes, more columns than the ring of stages holds, several tiles for a
/// block.
void e4m3_shapes() {
  const shape all[] = {{1, 64, 64},    {5, 72, 200},   {16, 128, 128},  {17, 192, 384},    {33, 264, 320},
                       {64, 100, 77},  {130, 200, 45}, {257, 384, 448}, {300, 320, 2880},  {520, 136, 128},
                       {96, 64, 7168}, {31, 40, 16},   {600, 72, 1030}, {2100, 3072, 320}, {4100, 7168, 256}};
  std::uint64_t seed = 900;
  for (const shape& s : all) {
    if (is_short() && s.m * s.n > 200000) continue;
    setting how;
    if (seed % 3 == 1) how.out_gap = 24;
    if (seed % 5 == 2) how.out_gap = 5;
    how.gating =
        std::array{gating_rows::none, gating_rows::none, gating_rows::halves, gating_rows::interleaved}[seed % 4];
    how.bias = seed % 2 == 0;
    how.odd_rows = seed % 3 == 0;
    check_product<e4m3>("e4m3", s, recipe::parse("mxfp4-32/oas"), how, normals(s.n * s.k, seed, 0.02f),
                        normals(s.m * s.k, seed + 1, 1.0f));
    ++seed;
  }
}

/// The same over experts, some of them without rows, in numbers around the widths of products; four tiles of weights,
/// or five, so that some warpgroups have none.
void e4m3_experts() {
  std::uint64_t seed = 950;
  const std::vector<std::uint32_t> splits[] = {
      {0, 1, 1, 3, 8},
      {0, 0, 0, 5},
      {0, 20, 41, 41, 60, 100},
      {0, 70, 70, 73, 200, 460},
      {0, 300, 301, 302, 1100},
      offsets_of(27, {0,  1,  15, 16, 17, 31, 32, 33,  47,  48,  49,  63,  64, 65,
                      79, 80, 81, 95, 96, 97, 0,  111, 112, 113, 127, 129, 290}),
      offsets_of(140, {0, 1, 7, 8, 9, 15, 16, 17, 0, 3, 2, 0, 5, 0, 1, 40, 4, 6, 0, 2})};
  for (const auto& offsets : splits) {
    for (const auto gating : {gating_rows::none, gating_rows::halves, gating_rows::interleaved}) {
      // where most numbers are, a tile for each multiprocessor, without which none of 96 rows are fitted
      const std::size_t n = offsets.size() == 28 ? 1056 : seed % 2 == 0 ? 208 : 272;
      const shape s{offsets.back(), n, 648};
      setting how;
      how.offsets = offsets;
      how.gating = gating;
      how.bias = seed % 2 == 0;
      how.out_gap = seed % 5 == 2 ? 3 : 0;
      how.captured = seed % 4 == 1;
      how.odd_rows = seed % 3 == 0;
      if (!is_short() || seed % 3 == 1) {
        check_product<e4m3>("experts", s, recipe::parse("mxfp4-32/oas"), how,
                            normals((offsets.size() - 1) * s.n * s.k, seed, 0.1f), normals(s.m * s.k, seed + 1, 1.0f));
      }
      ++seed;
    }
  }
}

/// Weights and activations in E4M3 that are meant to go wrong.
void e4m3_adversarial() {
  const shape s{40, 192, 1024};
  const numbers r{37};
  const recipe rule = recipe::parse("mxfp4-32/oas");
  // blocks of a row up to 2^24 apart: small ones lose bits, or are zero
  auto wide = normals(s.n * s.k, 61, 1.0f);
  for (std::size_t i = 0; i < wide.size(); ++i) wide[i] = std::ldexp(wide[i], -static_cast<int>(r.bits(i / 32) % 25));
  auto few = normals(s.m * s.k, 62, 1.0f);
  check_product<e4m3>("wide", s, rule, {}, wide, few);
  // columns of x that meet small blocks alone, so that those bits are what is left
  for (std::size_t i = 0; i < wide.size(); ++i) {
    wide[i] = std::ldexp(1.0f + r.uniform(i), i % s.k / 32 % 2 == 0 ? 0 : -static_cast<int>(13 + i / s.k % 12));
  }
  for (std::size_t i = 0; i < few.size(); ++i) few[i] = i % s.k / 32 % 2 == 0 ? 0.0f : few[i];
  check_product<e4m3>("small blocks", s, rule, {}, wide, few);
  // each row of weights and of x of its own size
  auto rows = normals(s.n * s.k, 63, 1.0f), x = normals(s.m * s.k, 64, 1.0f);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = std::ldexp(rows[i], static_cast<int>(i / s.k) % 60 - 40);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::ldexp(x[i], static_cast<int>(i / s.k) * 3 - 60);
  check_product<e4m3>("rows of all sizes", s, rule, {}, rows, x);
  // zero rows, zero blocks and NaN blocks
  auto holes = normals(s.n * s.k, 65, 1.0f);
  for (std::size_t i = 0; i < holes.size(); ++i) {
    if (i / s.k % 7 == 3 || r.bits(i / 16) % 5 == 0) holes[i] = 0.0f;
  }
  holes[5 * s.k + 100] = NAN, holes[100 * s.k] = INFINITY;
  check_product<e4m3>("holes", s, rule, {}, holes, normals(s.m * s.k, 66, 1.0f));
  // columns that clusters share, and that one sum goes through
  for (const std::size_t m : {std::size_t{40}, std::size_t{200}}) {
    setting how;
    if (m == 200) how.offsets = {0, 200};
    for (const std::size_t k : {std::size_t{1024}, std::size_t{7168}}) {
      check_product<e4m3>("constant", {m, s.n, k}, rule, how, std::vector<float>(s.n * k, -6.0f),
                          std::vector<float>(m * k, 1.0f));
    }
  }
}

/// The bundled model's expert weights, if the data is there.
template <class T>
void real(const std::string& folder) {
  std::ifstream file(folder + "/moe-16x2.safetensors", std::ios::binary);
  if (!file) {
    std::printf("no %s/moe-16x2.safetensors: the bundled model is left out\n", folder.c_str());
    return;
  }
  std::uint64_t header_bytes = 0;
  file.read(reinterpret_cast<char*>(&header_bytes), 8);
  std::string header(header_bytes, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header_bytes));
  for (const char* tensor : {"layers.0.moe.down.weight", "layers.3.moe.gate.weight", "layers.2.moe.up.weight"}) {
    const std::size_t at = header.find(std::string("\"") + tensor + "\"");
    if (!expect(at != std::string::npos, "the model has no %s", tensor)) continue;
    const std::size_t from = header.find("data_offsets\":[", at) + 15;
    const std::uint64_t begin = std::strtoull(header.c_str() + from, nullptr, 10);
    std::vector<bfloat16> values(16 * 128 * 128);
    file.seekg(static_cast<std::streamoff>(8 + header_bytes + begin));
    file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * 2));
    std::vector<float> weights(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) weights[i] = static_cast<float>(values[i]);
    setting how;
    how.offsets.resize(17);
    for (std::uint32_t e = 0; e < 17; ++e) how.offsets[e] = e * e;  // 256 rows
    for (const char* name : all_recipes) {
      check_product<T>(tensor, {256, 128, 128}, recipe::parse(name), how, weights, normals(256 * 128, 51, 1.0f));
    }
  }
}

bool is_hopper() {
  int major = 0;
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
  return major == 9;
}

/// Without Hopper, activations in E4M3 are an error.
void e4m3_elsewhere() {
  tetromino::cuda::detail::matmul_job<e4m3> job{};
  job.shape = {tetromino::mxfp4{}, 1, 64, 64}, job.row_count = 1;
  const auto done = tetromino::cuda::detail::matmul(tetromino::cuda::stream(), job);
  expect(!done && done.error().code() == tetromino::errc::device, "e4m3: multiplied without Hopper");
}

}  // namespace

int main(int argc, char** argv) {
  need_device();
  const std::string data = argc > 1 ? argv[1] : "examples/data";
  shapes<bfloat16>();
  experts<bfloat16>();
  fitted_experts<bfloat16>();
  if (!is_short()) adversarial<bfloat16>();
  real<bfloat16>(data);
  shapes<half>();
  experts<half>();
  fitted_experts<half>();
  if (!is_short()) adversarial<half>();
  if (!is_short()) real<half>(data);
  e4m3_order();
  if (is_hopper()) {
    e4m3_shapes();
    e4m3_experts();
    e4m3_adversarial();
  } else {
    e4m3_elsewhere();
  }
  std::printf("largest relative error of a product: %.2e\n", worst_error);
  return finish("matmul");
}
