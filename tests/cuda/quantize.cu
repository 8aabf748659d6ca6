/// The CUDA backend packs and unpacks byte for byte as the scalar backend does.
///   quantize [MILLIONS]   elements in each bulk comparison, in millions (default 1)

#include "harness.hpp"

#include <tetromino/layout.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/scaling.hpp>
#include <tetromino/thread_executor.hpp>

#include <algorithm>

namespace {

using namespace harness;
using tetromino::any_format;
using tetromino::batch_view;
using tetromino::packed;
using tetromino::quantize_options;
using tetromino::recipe;
using tetromino::special_values;

const tetromino::thread_executor threads;

template <class T>
const char* type_name() {
  return sizeof(T) == 4 ? "float" : std::is_same_v<T, half> ? "half" : "bfloat16";
}

template <class T>
T make(float x) {
  return tetromino::detail::from_float<T>(x);
}

/// Weights of varied size row by row and block by block, with outliers, exact ties and zeros.
template <class T>
std::vector<T> varied(std::size_t n, std::uint64_t seed) {
  const numbers r{seed};
  return generate<T>(n, [&](std::size_t i) {
    const std::uint64_t kind = r.bits(i / 512 + (std::uint64_t{1} << 40));
    float x = r.normal(i);
    switch (kind % 8) {
      case 0:
        x *= std::ldexp(1.0f, static_cast<int>(kind >> 8 & 15) - 8);
        break;
      case 1:
        x = std::round(x * 4.0f) / 4.0f;
        break;  // ties
      case 2:
        x = r.bits(i) % 64 == 0 ? x * 50.0f : x * 0.1f;
        break;  // outliers
      case 3:
        x = r.bits(i) % 4 == 0 ? x : 0.0f;
        break;
      case 4:
        x = r.bits(i / 16) % 3 == 0 ? -0.0f : std::ldexp(x, -20);
        break;  // zero blocks, half's subnormals
      case 5:
        x = std::copysign(std::exp2(std::round(x * 3.0f)), r.normal(i + 7));
        break;
      default:
        break;
    }
    return make<T>(x);
  });
}

/// Every bit pattern, or as many as fit.
template <class T>
std::vector<T> patterns(std::size_t n, std::uint64_t seed) {
  const numbers r{seed};
  return generate<T>(n, [&](std::size_t i) {
    if constexpr (sizeof(T) == 4) {
      return tetromino::detail::bit_cast<float>(static_cast<std::uint32_t>(r.bits(i)));
    } else {
      const auto bits = i < 65536 ? i : r.bits(i);
      return T::from_bits(static_cast<std::uint16_t>(bits));
    }
  });
}

struct case_of {
  std::string name;
  std::size_t matrices, rows, cols, row_stride, matrix_stride;
};

void compare(const std::string& what, const packed<any_format>& expected, const device_packed& got) {
  const auto report = [&](const char* part, const auto& a, const auto& b) {
    const long at = first_difference(a, b);
    if (at >= 0 && static_cast<std::size_t>(at) < a.size()) {
      expect(false, "%s: %s differ first at %ld: expected %g, got %g", what.c_str(), part, at,
             static_cast<double>(a[static_cast<std::size_t>(at)]),
             static_cast<double>(b[static_cast<std::size_t>(at)]));
    } else {
      expect(at < 0, "%s: %s differ in size", what.c_str(), part);
    }
  };
  report("tensor scales", expected.tensor_scales, got.tensor_scales.values());
  report("macro bytes", expected.macros, got.macros.values());
  report("scales", expected.scales, got.scales.values());
  report("codes", expected.codes, got.codes.values());
  expect(got.is_intact(), "%s: written past the end", what.c_str());
}

/// first_difference, where all NaN are alike.
template <class T>
long first_difference_of_numbers(std::vector<T> a, std::vector<T> b) {
  const auto name_nan = [](std::vector<T>& values) {
    for (T& v : values) {
      if (std::isnan(tetromino::detail::to_float(v))) v = make<T>(NAN);
    }
  };
  name_nan(a), name_nan(b);
  return first_difference(a, b);
}

/// Packs on both backends; then unpacks and round-trips on both.
template <class T>
void check_case(const case_of& c, const std::vector<T>& values, const recipe& r, const quantize_options& options,
                bool round_trip) {
  const std::string what = c.name + " " + type_name<T>() + " " + r.name();
  const device<T> x(values);
  const batch_view<const T> host(values.data(), c.matrices, c.rows, c.cols, c.row_stride, c.matrix_stride);
  const batch_view<const T> on_device(x.data(), c.matrices, c.rows, c.cols, c.row_stride, c.matrix_stride);

  const auto policy = tetromino::scalar.on(threads);
  const auto expected = tetromino::quantize(policy, host, r, options);

  // the device reads weights and tensor scales from its own memory
  const device<float> weights(std::vector<float>(options.column_weights.begin(), options.column_weights.end()));
  const device<float> given(std::vector<float>(options.tensor_scales.begin(), options.tensor_scales.end()));
  quantize_options settings = options;
  settings.rule = r.rule;
  settings.macro = r.macro;
  if (!options.column_weights.empty()) settings.column_weights = weights.span();
  if (!options.tensor_scales.empty()) settings.tensor_scales = given.span();

  auto report = tetromino::cuda::rejections::create();
  const tetromino::cuda::stream stream = tetromino::cuda::stream{}.reporting(report);
  device_packed out(expected.shape(), expected.tensor_scales.size());
  require(tetromino::try_quantize_to(stream, on_device, out.view(), settings), what.c_str());
  require(report.try_check(stream, on_device), what.c_str());
  compare(what, expected, out);

  if (!round_trip) return;
  const std::size_t n = c.matrices * c.rows * c.cols;
  const auto values_expected = tetromino::dequantize<T>(policy, expected);
  const device<T> unpacked(n);
  require(tetromino::try_dequantize_to(stream, out.view(), batch_view<T>(unpacked.data(), c.matrices, c.rows, c.cols)),
          what.c_str());
  const long at = first_difference(values_expected.data, unpacked.values());
  expect(at < 0, "%s: unpacked values differ first at %ld", what.c_str(), at);
  expect(unpacked.is_intact(), "%s: unpacked past the end", what.c_str());

  std::vector<std::byte> unused;
  const device<float> scratch(c.matrices);
  const auto with_memory = stream.with_workspace(std::as_writable_bytes(scratch.span()));
  const device<T> fake(n);
  require(tetromino::try_fake_quantize(with_memory, on_device, r,
                                       batch_view<T>(fake.data(), c.matrices, c.rows, c.cols), settings),
          what.c_str());
  long fake_at = first_difference(values_expected.data, fake.values());
  if (options.rotation) {
    tetromino::matrix<T> turned_back(c.matrices * c.rows, c.cols);
    tetromino::fake_quantize(policy, host, r, batch_view<T>(turned_back.data.data(), c.matrices, c.rows, c.cols),
                             options);
    fake_at = first_difference_of_numbers(turned_back.data, fake.values());
  }
  expect(fake_at < 0, "%s: fake_quantize differs first at %ld", what.c_str(), fake_at);
}

const char* const closed_recipes[] = {
    "mxfp4-32/floor",
    "mxfp4-32/ceil",
    "mxfp4-32/round-up",
    "mxfp4-32/even",
    "mxfp4-32/oas",
    "mxfp4-16/oas",
    "mxfp4-16/floor",
    "mxfp4-32/oas/mbs-static",
    "mxfp4-16/oas/mbs-static",
    "nvfp4/amax",
    "mxfp4-16/oas/mbs-static@32",
    "mxfp4-32/round-up/mbs-static@256",
    "mxfp4-32/oas/mbs-static@8x2",
    "mxfp4-32/floor/mbs-static@16x2",
};
const char* const searched_recipes[] = {
    "mxfp4-32/min-error",           "mxfp4-16/min-error",
    "mxfp4-32/oas/mbs-search",      "mxfp4-16/oas/mbs-search",
    "mxfp4-32/floor/mbs-search@32", "mxfp4-16/even/mbs-search@32",
    "mxfp4-32/ceil/mbs-search@64",  "mxfp4-16/oas/mbs-search@64",
    "mxfp4-32/oas/mbs-search@256",  "mxfp4-16/round-up/mbs-search@256",
    "nvfp4/four-over-six",          "nvfp4/min-error",
    "mxfp4-32/ceil/mbs-search@8x2", "mxfp4-32/even/mbs-search@16x2",
};
const char* const slow_recipes[] = {
    "mxfp4-32/oas/mbs-search256",         "mxfp4-16/oas/mbs-search256@64",      "mxfp4-32/min-error/mbs-search",
    "mxfp4-16/min-error/mbs-static",      "mxfp4-16/min-error/mbs-search@32",   "mxfp4-32/min-error/mbs-static@256",
    "mxfp4-32/min-error/mbs-search@8x2",  "mxfp4-32/min-error/mbs-search@16x2", "mxfp4-32/min-error/mbs-static@8x2",
    "mxfp4-32/min-error/mbs-static@16x2",
};

template <class T>
void bulk(std::size_t millions) {
  std::size_t compared = 0;
  const auto run = [&](const char* name, std::size_t n, std::uint64_t seed) {
    const std::size_t cols = 4096, rows = std::max<std::size_t>(1, n / cols);
    const case_of c{"bulk", 1, rows, cols, cols, rows * cols};
    check_case(c, varied<T>(rows * cols, seed), recipe::parse(name), {}, false);
    compared += rows * cols;
  };
  std::uint64_t seed = 1;
  for (const char* name : closed_recipes) run(name, millions << 20, seed++);
  for (const char* name : searched_recipes) run(name, std::min<std::size_t>(millions << 20, 2 << 20), seed++);
  for (const char* name : slow_recipes) run(name, 1 << 17, seed++);
  std::printf("%s: %zu million elements packed as the scalar backend packs them\n", type_name<T>(), compared >> 20);
}

template <class T>
void shapes() {
  const case_of cases[] = {
      {"one element", 1, 1, 1, 1, 1},
      {"ragged", 1, 7, 45, 45, 315},
      {"ragged, strided", 2, 5, 77, 80, 512},
      {"batch", 3, 4, 256, 256, 1024},
      {"unaligned", 2, 9, 131, 133, 1300},
      {"tail of a macro block", 1, 3, 400, 400, 1200},
      {"aligned, strided", 2, 6, 384, 512, 4096},
      {"short rows", 1, 1000, 16, 16, 16000},
  };
  std::vector<std::string> names(std::begin(closed_recipes), std::end(closed_recipes));
  names.insert(names.end(), std::begin(searched_recipes), std::end(searched_recipes));
  names.insert(names.end(), std::begin(slow_recipes), std::end(slow_recipes));
  std::uint64_t seed = 1000, turn = 0;
  for (const case_of& c : cases) {
    const auto values = varied<T>(c.matrices * c.matrix_stride, seed++);
    const numbers r{seed};
    std::vector<float> weights(c.matrices * c.cols);
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = r.uniform(i) * 3.0f;
    for (const std::string& name : names) {
      if (is_short() && ++turn % 4 != 0) continue;  // every recipe and every shape still has its turn
      const recipe rule = recipe::parse(name);
      check_case(c, values, rule, {}, true);
      quantize_options stochastic;
      stochastic.rounding = tetromino::element_rounding::stochastic;
      stochastic.seed = seed, stochastic.first_index = 12345;
      check_case(c, values, rule, stochastic, true);
      quantize_options weighted;
      weighted.column_weights = weights;
      weighted.scope = tetromino::tensor_scale_scope::per_matrix;
      check_case(c, values, rule, weighted, true);
      auto tiny = weights;
      for (std::size_t i = 0; i < tiny.size(); i += 3) tiny[i] *= i % 2 == 0 ? 1e-40f : 1e-31f;
      weighted.column_weights = tiny;
      check_case(c, values, rule, weighted, true);
      if (rule.format.scale != tetromino::scale_type::e4m3) continue;
      for (const float scale : {1.0f, 0.001f, 1e-30f, 1e-44f, 1e30f}) {
        quantize_options given;
        given.tensor_scales = {&scale, 1};
        check_case(c, values, rule, given, true);
      }
    }
  }
}

/// All bit patterns under the two policies that take them.
template <class T>
void specials() {
  std::vector<std::string> names(std::begin(closed_recipes), std::end(closed_recipes));
  names.insert(names.end(), std::begin(searched_recipes), std::end(searched_recipes));
  names.insert(names.end(), std::begin(slow_recipes), std::end(slow_recipes));
  const std::size_t n = 1 << 17;
  const case_of c{"all bits", 1, n / 512, 512, 512, n};
  auto values = patterns<T>(n, 99);
  auto some = varied<T>(n, 98);  // few special values among plain ones
  const numbers r{97};
  for (std::size_t i = 0; i < n; ++i) {
    if (r.bits(i) % 100 == 0) some[i] = values[i];
  }
  // neighbours of every threshold of every rule, in every binade
  std::vector<T> edges(n, make<T>(0.0f));
  for (std::size_t i = 0; i < n; i += 64) {
    const float thresholds[] = {1.0f, 1.25f, 1.5f, 1.75f, 7.0f / 6.0f};
    const auto pick = i / 64;
    float a = std::ldexp(thresholds[pick % 5], static_cast<int>(pick / 5 % 250) - 126);
    if (pick / 1250 == 1) a = std::nextafter(a, 0.0f);
    edges[i] = make<T>(a);
    for (std::size_t k = 1; k < 16; ++k) {
      edges[i + k] = make<T>(a * (static_cast<float>(k) / 16.0f) * (k % 2 == 0 ? 1.0f : -1.0f));
    }
    edges[i + 40] = make<T>(-a);
  }
  // nothing but zeros and a few infinities, in the first two of three matrices
  const case_of lone_case{"lone infinities", 3, n / 512, 512, 512, n};
  std::vector<T> lone(3 * n, make<T>(0.0f));
  for (const std::size_t i : {std::size_t{77}, n / 2, n + 5, 2 * n - 1})
    lone[i] = make<T>(i % 2 == 0 ? -INFINITY : INFINITY);
  for (const std::string& name : names) {
    const recipe rule = recipe::parse(name);
    quantize_options saturating;
    saturating.special = special_values::saturate;
    check_case(lone_case, lone, rule, saturating, true);
    saturating.scope = tetromino::tensor_scale_scope::per_matrix;
    check_case(lone_case, lone, rule, saturating, true);
    for (const auto policy : {special_values::poison, special_values::saturate}) {
      quantize_options options;
      options.special = policy;
      check_case(c, values, rule, options, true);
      check_case(c, some, rule, options, true);
      options.rounding = tetromino::element_rounding::stochastic;
      check_case(c, some, rule, options, true);
    }
    quantize_options options;
    options.special = special_values::poison;  // half has no room for all of them
    check_case(c, edges, rule, options, true);
  }
}

/// Every code under every scale and macro byte.
template <class T>
void every_code() {
  for (const any_format format :
       {any_format(tetromino::mxfp4{}), any_format(tetromino::mxfp4_16{}), any_format(tetromino::nvfp4{}),
        any_format(tetromino::mbs<tetromino::mxfp4_16>{}), any_format(tetromino::mbs<tetromino::mxfp4, 32>{}),
        any_format(tetromino::mbs<tetromino::mxfp4, 8, 2>{}), any_format(tetromino::mbs<tetromino::mxfp4, 16, 2>{})}) {
    for (const float tensor_scale : {1.0f, 0.0371f}) {
      packed<any_format> p(format, 1, 256, 512 * 16);
      for (std::size_t i = 0; i < p.codes.size(); ++i)
        p.codes[i] = static_cast<std::uint8_t>(i * 16 + (i + 7 * (i / 8)) % 16);
      for (std::size_t i = 0; i < p.scales.size(); ++i) p.scales[i] = static_cast<std::uint8_t>(i);
      const std::size_t per_row = p.shape().macros_per_row();
      for (std::size_t i = 0; i < p.macros.size(); ++i) p.macros[i] = static_cast<std::uint8_t>(i / per_row);
      for (float& s : p.tensor_scales) s = tensor_scale;
      const auto expected = tetromino::dequantize<T>(tetromino::scalar.on(threads), p);
      const device_packed on_device(p);
      const device<T> out(expected.data.size());
      require(tetromino::try_dequantize_to(tetromino::cuda::stream{}, on_device.view(),
                                           batch_view<T>(out.data(), 1, p.rows, p.cols)),
              "dequantize");
      const auto got = out.values();
      const long at = first_difference(expected.data, got);
      if (at >= 0) {
        const auto i = static_cast<std::size_t>(at);
        expect(false, "every code, %s, block %zu, macro block %zu: element %ld: expected %g, got %g", type_name<T>(),
               format.block, format.macro_block, at, static_cast<double>(tetromino::detail::to_float(expected.data[i])),
               static_cast<double>(tetromino::detail::to_float(got[i])));
      }
      expect(at < 0, "every code");
    }
  }
}

template <class T>
void rejects() {
  const std::size_t rows = 40, cols = 320;
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-search", "nvfp4/amax", "mxfp4-32/oas/mbs-static",
                           "mxfp4-32/min-error/mbs-search@16x2"}) {
    auto values = varied<T>(rows * cols, 5);
    values[7 * cols + 19] = make<T>(INFINITY);
    values[7 * cols + 18] = make<T>(NAN);
    values[30 * cols] = make<T>(-INFINITY);
    const device<T> x(values);
    const batch_view<const T> view(x.data(), 1, rows, cols);
    const recipe r = recipe::parse(name);
    device_packed out({r.format, 1, rows, cols}, 1);
    quantize_options options;
    options.rule = r.rule, options.macro = r.macro;
    const auto without = tetromino::try_quantize_to(tetromino::cuda::stream{}, view, out.view(), options);
    expect(!without && without.error().code() == tetromino::errc::invalid_argument, "rejecting needs a report");
    auto report = tetromino::cuda::rejections::create();
    const auto stream = tetromino::cuda::stream{}.reporting(report);
    require(tetromino::try_quantize_to(stream, view, out.view(), options), name);
    const auto found = report.try_check(stream, view);
    expect(!found && std::string(found.error().what()).find("row 7, column 18") != std::string::npos,
           "%s: rejection says %s", name, found ? "nothing" : found.error().what());
    report.reset(stream);
    expect(report.try_check(stream, view).has_value(), "%s: a reset report is empty", name);
    // what was refused is poisoned
    options.special = special_values::poison;
    const auto expected =
        tetromino::quantize(tetromino::scalar, batch_view<const T>(values.data(), 1, rows, cols), r, options);
    compare(std::string("rejected ") + name, expected, out);
  }
}

void swizzled() {
  for (const auto& [matrices, rows, cols] : {std::array<std::size_t, 3>{1, 128, 256}, {2, 130, 272}, {1, 5, 2880}}) {
    for (const char* name : {"mxfp4-32/oas", "nvfp4/amax", "mxfp4-32/min-error", "mxfp4-32/oas/mbs-search@16x2"}) {
      const recipe r = recipe::parse(name);
      const auto values = varied<bfloat16>(matrices * rows * cols, 11);
      const batch_view<const bfloat16> host(values.data(), matrices, rows, cols);
      const auto linear = tetromino::quantize(tetromino::scalar, host, r);
      const std::size_t per_row = linear.shape().blocks_per_row();
      const std::size_t bytes = tetromino::layout::swizzled_bytes(matrices, rows, per_row);
      std::vector<std::uint8_t> expected(bytes);
      for (std::size_t e = 0; e < matrices; ++e) {
        for (std::size_t i = 0; i < rows; ++i) {
          for (std::size_t b = 0; b < per_row; ++b) {
            expected[e * (bytes / matrices) + tetromino::layout::swizzled_offset(i, b, per_row)] =
                linear.scales[(e * rows + i) * per_row + b];
          }
        }
      }
      const device<bfloat16> x(values);
      device_packed out(linear.shape(), linear.tensor_scales.size());
      const device<std::uint8_t> scales(bytes);
      auto view = out.view();
      view.scales = scales.span();
      auto report = tetromino::cuda::rejections::create();
      quantize_options options;
      options.rule = r.rule, options.macro = r.macro;
      require(tetromino::cuda::try_quantize_swizzled_to(tetromino::cuda::stream{}.reporting(report),
                                                        batch_view<const bfloat16>(x.data(), matrices, rows, cols),
                                                        view, options),
              name);
      expect(first_difference(expected, scales.values()) < 0, "swizzled scales of %s [%zu, %zu, %zu]", name, matrices,
             rows, cols);
      expect(first_difference(linear.codes, out.codes.values()) < 0, "codes with swizzled scales of %s", name);
      expect(first_difference(linear.macros, out.macros.values()) < 0, "macros with swizzled scales of %s", name);
      expect(scales.is_intact(), "swizzled scales: written past the end");
    }
  }
}

template <class T>
void transposed() {
  std::vector<std::string> names(std::begin(closed_recipes), std::end(closed_recipes));
  names.insert(names.end(), std::begin(searched_recipes), std::end(searched_recipes));
  names.insert(names.end(), std::begin(slow_recipes), std::end(slow_recipes));
  std::uint64_t seed = 7000;
  for (const auto& [matrices, rows, cols] :
       {std::array<std::size_t, 3>{1, 128, 32}, {2, 300, 72}, {3, 16, 5}, {1, 1000, 130}}) {
    for (const std::string& name : names) {
      ++seed;
      if (is_short() && seed % 5 != 0) continue;
      recipe r = recipe::parse(name);
      auto values = varied<T>(matrices * rows * cols, seed);
      std::vector<T> transposed(values.size());
      for (std::size_t e = 0; e < matrices; ++e) {
        for (std::size_t i = 0; i < rows * cols; ++i) {
          transposed[e * rows * cols + i % cols * rows + i / cols] = values[e * rows * cols + i];
        }
      }
      const numbers n{seed};
      std::vector<float> weights(rows);
      for (std::size_t i = 0; i < rows; ++i) weights[i] = n.uniform(i) * 3.0f;
      const device<float> device_weights(weights);
      quantize_options options;
      options.scope = tetromino::tensor_scale_scope::per_matrix;
      if (seed % 3 == 0) options.column_weights = weights;
      if (seed % 4 == 0) options.rounding = tetromino::element_rounding::stochastic;
      if (seed % 5 < 2) {
        r.rotation = std::size_t{16} << seed % 4;
        options.rotation = tetromino::hadamard{r.rotation, seed};
      }
      const auto expected = tetromino::quantize(
          tetromino::scalar, batch_view<const T>(transposed.data(), matrices, cols, rows), r, options);
      options.rule = r.rule, options.macro = r.macro;
      if (!options.column_weights.empty()) options.column_weights = device_weights.span();
      const device<T> x(values);
      auto report = tetromino::cuda::rejections::create();
      const auto stream = tetromino::cuda::stream{}.reporting(report);
      device_packed out(expected.shape(), expected.tensor_scales.size());
      const batch_view<const T> in(x.data(), matrices, rows, cols);
      require(tetromino::cuda::try_quantize_transposed_to(stream, in, out.view(), options), name.c_str());
      require(report.try_check(stream, in), name.c_str());
      compare("transposed " + name + " " + type_name<T>(), expected, out);
    }
  }
  std::vector<T> values(64 * 48, make<T>(1.0f));
  values[37 * 48 + 5] = make<T>(NAN);
  const device<T> x(values);
  const batch_view<const T> in(x.data(), 1, 64, 48);
  auto report = tetromino::cuda::rejections::create();
  const auto stream = tetromino::cuda::stream{}.reporting(report);
  const device_packed out({any_format(tetromino::mxfp4{}), 1, 48, 64}, 0);
  require(tetromino::cuda::try_quantize_transposed_to(stream, in, out.view()), "transposed");
  const auto found = report.try_check(stream, in);
  expect(!found && std::string(found.error().what()).find("row 37, column 5") != std::string::npos,
         "a transposed rejection says %s", found ? "nothing" : found.error().what());
  const auto refused =
      tetromino::cuda::try_quantize_transposed_to(stream, batch_view<const T>(x.data(), 1, 48, 64), out.view());
  expect(!refused && refused.error().code() == tetromino::errc::shape_mismatch, "storage that is not the transpose");
}

template <class T>
void magnitudes() {
  const std::size_t matrices = 3, rows = 33, cols = 1000;
  auto values = varied<T>(matrices * rows * cols, 21);
  values[rows * cols + 5] = make<T>(1000.0f);
  const device<T> x(values);
  for (const std::size_t stride : {cols, std::size_t{1000 - 8}}) {
    const batch_view<const T> view(x.data(), matrices, rows, stride, cols, rows * cols);
    const device<float> one(1), each(matrices);
    require(tetromino::cuda::try_amax_to(tetromino::cuda::stream{}, view, one.span()), "amax");
    require(tetromino::cuda::try_amax_to(tetromino::cuda::stream{}, view, each.span()), "amax");
    for (std::size_t e = 0; e < matrices; ++e) {
      const batch_view<const T> host(values.data() + e * rows * cols, 1, rows, stride, cols, rows * cols);
      expect(tetromino::amax(tetromino::scalar, host) == each.values()[e], "amax of matrix %zu", e);
    }
    const batch_view<const T> all(values.data(), matrices, rows, stride, cols, rows * cols);
    expect(tetromino::amax(tetromino::scalar, all) == one.values()[0], "amax of a batch");
  }
}

/// Rotations before packing, of the transpose too, and by themselves.
template <class T>
void rotations() {
  std::vector<std::string> names(std::begin(closed_recipes), std::end(closed_recipes));
  names.insert(names.end(), std::begin(searched_recipes), std::end(searched_recipes));
  names.insert(names.end(), std::begin(slow_recipes), std::end(slow_recipes));
  const case_of cases[] = {
      {"rotated", 1, 40, 512, 512, 20480},
      {"rotated, ragged", 2, 7, 333, 340, 2400},
      {"rotated, short rows", 3, 9, 48, 48, 432},
      {"rotated, shorter than its blocks", 1, 5, 13, 16, 80},
  };
  std::uint64_t seed = 9000;
  for (const case_of& c : cases) {
    const auto values = varied<T>(c.matrices * c.matrix_stride, ++seed);
    auto wild = values;  // what is not finite spreads over its block; large values overflow when they are added up
    const numbers r{seed};
    for (std::size_t i = 0; i < wild.size(); ++i) {
      if (r.bits(i) % 50 == 0) wild[i] = make<T>(r.bits(i) / 50 % 3 == 0 ? NAN : INFINITY);
      if (r.bits(i / 32) % 5 == 0) wild[i] = make<T>(tetromino::detail::largest<T>);
    }
    std::vector<float> weights(c.cols);
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = r.uniform(i) * 3.0f;
    for (const std::string& name : names) {
      ++seed;
      if (is_short() && seed % 7 != 0) continue;
      recipe rule = recipe::parse(name);
      rule.rotation = std::size_t{16} << seed % 4;
      quantize_options options;
      options.rotation = tetromino::hadamard{rule.rotation};
      if (seed / 4 % 2 == 0) options.rotation->sign_seed = seed;
      options.scope = tetromino::tensor_scale_scope::per_matrix;
      check_case(c, values, rule, options, true);
      quantize_options weighted = options;
      weighted.column_weights = weights;
      check_case(c, values, rule, weighted, true);
      options.rounding = tetromino::element_rounding::stochastic;
      options.scope = tetromino::tensor_scale_scope::batch;
      check_case(c, values, rule, options, true);
      for (const auto policy : {special_values::poison, special_values::saturate}) {
        options.special = policy;
        check_case(c, wild, rule, options, true);
      }
    }
    for (const std::size_t size : {16u, 32u, 64u, 128u}) {
      const tetromino::hadamard rotation{size, size % 64 == 0 ? std::optional<std::uint64_t>(seed) : std::nullopt};
      const device<T> x(values), out(c.matrices * c.rows * c.cols);
      const batch_view<const T> host(values.data(), c.matrices, c.rows, c.cols, c.row_stride, c.matrix_stride);
      const batch_view<const T> in(x.data(), c.matrices, c.rows, c.cols, c.row_stride, c.matrix_stride);
      const batch_view<T> to(out.data(), c.matrices, c.rows, c.cols);
      tetromino::matrix<T> expected(c.matrices * c.rows, c.cols);
      const batch_view<T> view(expected.data.data(), c.matrices, c.rows, c.cols);
      tetromino::rotate(tetromino::scalar, host, rotation, view);
      require(tetromino::try_rotate(tetromino::cuda::stream{}, in, rotation, to), "rotate");
      expect(first_difference(expected.data, out.values()) < 0, "%s: rotate by %zu", c.name.c_str(), size);
      tetromino::rotate_back(tetromino::scalar, batch_view<const T>(view), rotation, view);
      require(tetromino::try_rotate_back(tetromino::cuda::stream{}, batch_view<const T>(to), rotation, to),
              "rotate_back");
      expect(first_difference(expected.data, out.values()) < 0, "%s: rotate back by %zu", c.name.c_str(), size);
      expect(out.is_intact(), "%s: rotated past the end", c.name.c_str());
    }
  }
}

/// What rotations refuse: values that are not finite where they lie, and sums that overflow.
void rotated_rejects() {
  for (const char* name :
       {"mxfp4-32/oas", "mxfp4-32/min-error/mbs-search", "nvfp4/amax", "mxfp4-32/min-error/mbs-search@8x2"}) {
    std::vector<float> values(64 * 256, 1.0f);
    for (std::size_t k = 0; k < 32; ++k) values[11 * 256 + 96 + k] = 3e38f;
    const recipe r = recipe::parse(name);
    quantize_options options;
    options.rule = r.rule, options.macro = r.macro, options.rotation = tetromino::hadamard{32};
    const auto says = [&](const char* place) {
      const device<float> x(values);
      const batch_view<const float> in(x.data(), 1, 64, 256);
      device_packed out({r.format, 1, 64, 256}, r.format.scale == tetromino::scale_type::e4m3 ? 1 : 0);
      auto report = tetromino::cuda::rejections::create();
      const auto stream = tetromino::cuda::stream{}.reporting(report);
      require(tetromino::try_quantize_to(stream, in, out.view(), options), name);
      const auto found = report.try_check(stream, in);
      expect(!found && std::string(found.error().what()).find(place) != std::string::npos,
             "%s rotated: expected %s, got %s", name, place, found ? "nothing" : found.error().what());
    };
    says("row 11, column 96");
    values[7 * 256 + 50] = NAN;
    says("row 7, column 50");
  }
}

/// What the GPU makes of rows: the scalar backend's bytes, and zeros with a NaN where a row is not finite.
template <class T>
tetromino::e4m3_matrix expected_e4m3(const batch_view<const T>& x) {
  const std::size_t rows = x.matrices * x.rows;
  std::vector<T> finite(rows * x.cols);
  std::vector<bool> is_finite(rows, true);
  for (std::size_t r = 0; r < rows; ++r) {
    const T* const row = x.row(r / x.rows, r % x.rows);
    for (std::size_t k = 0; k < x.cols; ++k) {
      if (!std::isfinite(tetromino::detail::to_float(row[k]))) is_finite[r] = false;
    }
    if (is_finite[r]) std::copy(row, row + x.cols, finite.begin() + static_cast<std::ptrdiff_t>(r * x.cols));
  }
  auto out =
      tetromino::quantize_e4m3(tetromino::scalar.on(threads), batch_view<const T>(finite.data(), 1, rows, x.cols));
  for (std::size_t r = 0; r < rows; ++r) {
    if (!is_finite[r]) out.scales[r] = tetromino::detail::bit_cast<float>(0x7FC00000u);
  }
  return out;
}

struct device_e4m3 {
  std::size_t rows, cols;
  device<std::uint8_t> values;
  device<float> scales;

  device_e4m3(std::size_t rows_, std::size_t cols_)
      : rows(rows_), cols(cols_), values(rows_ * tetromino::e4m3_view<>{rows_, cols_}.stride()), scales(rows_) {}
  [[nodiscard]] tetromino::e4m3_view<std::uint8_t> view() const { return {rows, cols, values, scales}; }
};

void compare_e4m3(const char* what, const char* type, const tetromino::e4m3_matrix& expected, const device_e4m3& got) {
  const long scale = first_difference(expected.scales, got.scales.values());
  expect(scale < 0, "%s, %s: the scale of row %ld of %zu differs", what, type, scale, expected.rows);
  const long at = first_difference(expected.values, got.values.values());
  const long stride = static_cast<long>(std::max<std::size_t>(expected.view().stride(), 1));
  expect(at < 0, "%s, %s: byte %ld of row %ld of [%zu, %zu] differs", what, type, at % stride, at / stride,
         expected.rows, expected.cols);
  expect(got.values.is_intact() && got.scales.is_intact(), "%s, %s: written past the end", what, type);
}

template <class T>
void check_e4m3(const char* what, const std::vector<T>& values, std::size_t matrices, std::size_t rows,
                std::size_t cols, std::size_t row_stride, std::size_t matrix_stride, std::size_t offset = 0) {
  const device<T> x(values);
  const batch_view<const T> host(values.data() + offset, matrices, rows, cols, row_stride, matrix_stride);
  const batch_view<const T> on_device(x.data() + offset, matrices, rows, cols, row_stride, matrix_stride);
  const device_e4m3 out(matrices * rows, cols);
  require(tetromino::try_quantize_e4m3_to(tetromino::cuda::stream{}, on_device, out.view()), what);
  compare_e4m3(what, type_name<T>(), expected_e4m3(host), out);
}

/// Activations in E4M3: shapes, every bit pattern, rows of every size, and what is refused.
template <class T>
void e4m3_rows() {
  const std::size_t widths[] = {1,    15,   16,   17,   128,  130,  496,    512,    513,   528,
                                1024, 2048, 7168, 8192, 8193, 8208, 16'384, 16'400, 20'000};
  std::uint64_t seed = 500;
  for (const std::size_t cols : widths) {
    const auto values = varied<T>(3 * 5 * (cols + 16) + 8, ++seed);
    check_e4m3("rows", values, 1, 15, cols, cols, 15 * cols);
    check_e4m3("aligned, strided", values, 3, 5, cols, (cols + 15) / 16 * 16, 5 * ((cols + 15) / 16 * 16));
    check_e4m3("unaligned", values, 2, 3, cols, cols + 1, 4 * (cols + 1), 1);
    check_e4m3("one row", values, 1, 1, cols, cols, cols, 8);
  }
  check_e4m3("many short rows", varied<T>(10'001 * 64, 7), 1, 10'001, 64, 64, 0);
  check_e4m3("no rows", std::vector<T>(8), 1, 0, 64, 64, 0);
  check_e4m3("no columns", std::vector<T>(8), 1, 70, 0, 0, 0);

  const std::size_t n = 1 << 17;
  auto some = patterns<T>(n, 99);  // rows of any numbers, most of which are refused
  check_e4m3("all bits", some, 1, n / 256, 256, 256, n);
  check_e4m3("all bits, ragged", some, 1, n / 256, 250, 256, n);
  const numbers r{97};
  for (std::size_t i = 0; i < n; ++i) {
    if (!std::isfinite(tetromino::detail::to_float(some[i]))) some[i] = make<T>(r.normal(i));
  }
  check_e4m3("all finite bits", some, 1, n / 256, 256, 256, n);
  for (const float most : {448.0f, 3.0f, 1000.0f, 0x1p-14f}) {  // a few rows, in which many numbers are rounded
    auto below = some;
    for (std::size_t i = 0; i < n; ++i) {
      const float v = tetromino::detail::to_float(below[i]);
      if (std::abs(v) > most) below[i] = make<T>(std::fmod(v, most));
      if (i % 16'384 == 77) below[i] = make<T>(-most);
    }
    check_e4m3("numbers below a magnitude", below, 1, n / 16'384, 16'384, 16'384, n);
    check_e4m3("numbers below a magnitude, ragged", below, 1, n / 16'384, 16'377, 16'384, n);
  }
  std::vector<T> edges(64 * 128, make<T>(0.0f));  // rows around the least magnitude that is not zero, and the largest
  for (std::size_t row = 0; row < 64; ++row) {
    float amax = std::ldexp(1.0f, static_cast<int>(row) - 149);
    if (row >= 32) amax = row % 2 == 0 ? std::nextafter(0x1p-117f, static_cast<float>(row % 4)) : 0x1p-117f;
    if (row >= 60) amax = tetromino::detail::largest<T>;
    for (std::size_t k = 0; k < 128; ++k) {
      edges[row * 128 + k] = make<T>(k == row ? -amax : amax * static_cast<float>(k) / 128.0f);
    }
  }
  check_e4m3("rows of extreme magnitudes", edges, 1, 64, 128, 128, 64 * 128);
}

template <class T>
void e4m3_rejects() {
  for (const std::size_t cols : {320u, 333u, 4096u, 9008u, 17'000u}) {
    const std::size_t rows = 20;
    auto values = varied<T>(rows * cols, 5);
    values[7 * cols + 219] = make<T>(INFINITY);
    values[7 * cols + 118] = make<T>(NAN);
    values[15 * cols] = make<T>(-INFINITY);
    const device<T> x(values);
    const batch_view<const T> host(values.data(), 2, rows / 2, cols), view(x.data(), 2, rows / 2, cols);
    const device_e4m3 out(rows, cols);
    auto report = tetromino::cuda::rejections::create();
    const auto stream = tetromino::cuda::stream{}.reporting(report);
    require(tetromino::try_quantize_e4m3_to(stream, view, out.view()), "e4m3");
    compare_e4m3("refused rows", type_name<T>(), expected_e4m3(host), out);
    const auto found = report.try_check(stream, view);
    expect(!found && std::string(found.error().what()).find("matrix 0, row 7, column 118") != std::string::npos,
           "e4m3 of %zu columns: rejection says %s", cols, found ? "nothing" : found.error().what());
    report.reset(stream);
    const batch_view<const T> later(x.data() + 8 * cols, 1, 7, cols);
    const device_e4m3 more(7, cols);
    require(tetromino::try_quantize_e4m3_to(stream, later, more.view()), "e4m3");
    expect(report.try_check(stream, later).has_value(), "e4m3 of finite rows refuses some");
  }
}

/// A kernel may start before the one before it has ended, but reads what that one wrote: here the bytes of activations,
/// as numbers.
void e4m3_in_turns() {
  const std::size_t rows = 2000, cols = 4096;
  const auto values = varied<bfloat16>(rows * cols, 31);
  const device<bfloat16> x(values);
  auto expected = expected_e4m3(batch_view<const bfloat16>(values.data(), 1, rows, cols));
  std::vector<device_e4m3> out;
  out.emplace_back(rows, cols);
  require(tetromino::try_quantize_e4m3_to(tetromino::cuda::stream{},
                                          batch_view<const bfloat16>(x.data(), 1, rows, cols), out[0].view()),
          "e4m3");
  for (std::size_t width = cols / 2; width >= 256; width /= 2) {
    out.emplace_back(rows, width);
    const auto* const words = reinterpret_cast<const bfloat16*>(out[out.size() - 2].values.data());
    require(tetromino::try_quantize_e4m3_to(tetromino::cuda::stream{},
                                            batch_view<const bfloat16>(words, 1, rows, width), out.back().view()),
            "e4m3");
  }
  for (const device_e4m3& step : out) {
    compare_e4m3("one after the other", "bfloat16", expected, step);
    const auto* const words = reinterpret_cast<const bfloat16*>(expected.values.data());
    expected = expected_e4m3(batch_view<const bfloat16>(words, 1, rows, step.cols / 2));
  }
}

template <class T>
void all(std::size_t millions) {
  e4m3_rows<T>();
  e4m3_rejects<T>();
  magnitudes<T>();
  rejects<T>();
  shapes<T>();
  transposed<T>();
  rotations<T>();
  if (is_short()) return;
  every_code<T>();
  specials<T>();
  bulk<T>(millions);
}

}  // namespace

int main(int argc, char** argv) {
  need_device();
  const std::size_t millions = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  all<float>(millions);
  all<half>(millions);
  all<bfloat16>(millions);
  e4m3_in_turns();
  swizzled();
  rotated_rejects();
  return finish("quantize");
}
