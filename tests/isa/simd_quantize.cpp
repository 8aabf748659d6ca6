#include "check.hpp"

/// The simd backend against the scalar one, byte for byte. Run for each backend of tetromino::cpu.

#include <tetromino/dequantize.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/thread_executor.hpp>

#include "isa/backend.hpp"
#include "reference/generators.hpp"

#include <algorithm>    // std::fill
#include <bit>          // std::bit_cast
#include <cmath>        // std::ldexp
#include <cstring>      // std::memcmp
#include <limits>       // std::numeric_limits
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

#if !TETROMINO_TEST_VECTORS
TEST_CASE("the simd backend exists") { WARN("xsimd was not found: there is nothing to test"); }
#else

namespace {

using tetromino::any_format;
using tetromino::batch_view;
using tetromino::bfloat16;
using tetromino::half;
using tetromino::macro_rule;
using tetromino::quantize_options;
using tetromino::recipe;
using tetromino::scale_rule;
using tetromino::special_values;
using tetromino_test::vectors;

std::vector<recipe> all_recipes() {
  std::vector<recipe> out;
  for (const scale_rule rule : {scale_rule::amax, scale_rule::four_over_six, scale_rule::min_error}) {
    out.push_back({tetromino::nvfp4{}, rule, {}});
  }
  for (const std::size_t block : {16u, 32u}) {
    for (const scale_rule rule : {scale_rule::floor, scale_rule::ceil, scale_rule::round_up, scale_rule::even,
                                  scale_rule::oas, scale_rule::min_error}) {
      out.push_back({{tetromino::scale_type::e8m0, block, 0}, rule, {}});
      for (const std::size_t macro : {32u, 64u, 128u, 256u}) {
        for (const macro_rule search : {macro_rule::from_amax, macro_rule::search, macro_rule::search_256}) {
          out.push_back({{tetromino::scale_type::e8m0, block, macro}, rule, search});
        }
      }
      for (const macro_rule search : {macro_rule::from_amax, macro_rule::search}) {
        if (block != 32) continue;
        out.push_back({tetromino::mbs<tetromino::mxfp4, 8, 2>{}, rule, search});
        out.push_back({tetromino::mbs<tetromino::mxfp4, 16, 2>{}, rule, search});
      }
    }
  }
  return out;
}

/// Floats of many kinds, kept apart by stretches so that blocks of one kind occur.
class awkward_floats {
 public:
  explicit awkward_floats(reference::generator& g) : g_(g) {}

  float next() {
    if (left_ == 0) {
      left_ = 1 + g_.below(50);
      kind_ = g_.below(9);
      exponent_ = static_cast<int>(g_.below(40)) - 20;
      if (g_.below(6) == 0) exponent_ = static_cast<int>(g_.below(276)) - 149;
    }
    --left_;
    const float sign = g_.below(2) == 0 ? 1.0f : -1.0f;
    switch (kind_) {
      case 0:
        return sign * 0.0f;
      case 1:  // any finite bits
        return sign * std::bit_cast<float>(static_cast<std::uint32_t>(g_.below(0x7F800000)));
      case 2: {  // near a value or a midpoint of E2M1
        const float edges[] = {0.25f, 0.5f, 0.75f, 1, 1.25f, 1.5f, 1.75f, 2, 2.5f, 3, 3.5f, 4, 5, 6, 7, 8};
        const float x = std::ldexp(edges[g_.below(16)], exponent_);
        const auto bits =
            static_cast<std::int64_t>(std::bit_cast<std::uint32_t>(x)) + static_cast<std::int64_t>(g_.below(5)) - 2;
        return x == 0 || x > 1e38f ? x : sign * std::bit_cast<float>(static_cast<std::uint32_t>(bits < 0 ? 0 : bits));
      }
      case 3:  // subnormal
        return sign * std::bit_cast<float>(static_cast<std::uint32_t>(g_.below(0x00800000)));
      case 4:  // exact in E2M1
        return sign * std::ldexp(static_cast<float>(g_.below(9)) / 2, exponent_);
      case 5:  // heavy tails
        return static_cast<float>(g_.student_t4());
      case 6:  // huge
        return sign * std::bit_cast<float>(0x7F000000u + static_cast<std::uint32_t>(g_.below(0x00800000)));
      default:
        return static_cast<float>(g_.normal()) * std::ldexp(1.0f, exponent_ / 2);
    }
  }

 private:
  reference::generator& g_;
  std::size_t left_ = 0, kind_ = 0;
  int exponent_ = 0;
};

template <class T>
T number(float x) {
  T out = tetromino::detail::from_float<T>(x);
  return tetromino::detail::is_finite(tetromino::detail::to_float(out)) ? out : T{};  // halves overflow
}

template <class T>
T special(reference::generator& g) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const float values[] = {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()};
  return tetromino::detail::from_float<T>(values[g.below(3)]);
}

/// Storage whose pieces start at odd addresses.
struct loose_storage {
  loose_storage(const tetromino::packed_shape& shape, std::size_t tensor_scales, std::size_t offset)
      : shape_(shape),
        offset_(offset),
        codes(shape.code_bytes() + offset, 0xA5),
        scales(shape.scale_bytes() + offset, 0xA5),
        macros(shape.macro_bytes() + offset, 0xA5),
        tensors(tensor_scales) {}
  tetromino::packed_view<any_format, std::uint8_t> view() {
    return {shape_.format,
            shape_.matrices,
            shape_.rows,
            shape_.cols,
            std::span(codes).subspan(offset_),
            std::span(scales).subspan(offset_),
            std::span(macros).subspan(offset_),
            tensors};
  }

  tetromino::packed_shape shape_;
  std::size_t offset_;
  std::vector<std::uint8_t> codes, scales, macros;
  std::vector<float> tensors;
};

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
class comparison {
 public:
  comparison(reference::generator& g, const recipe& r, std::size_t cols, const quantize_options& options)
      : g_(g), r_(r), options_(options), cols_(cols), matrices_(1 + g.below(2)), rows_(1 + g.below(3)) {
    options_.rule = r.rule;
    options_.macro = r.macro;
    stride_ = cols + g.below(5);
    matrix_stride_ = stride_ * rows_ + g.below(7);
    offset_ = g.below(8);
    x_.resize(offset_ + matrices_ * matrix_stride_);
    awkward_floats floats(g);
    for (T& v : x_) v = number<T>(floats.next());
  }

  void put_special_values() {
    for (std::size_t n = 1 + g_.below(4); n > 0; --n) x_[g_.below(x_.size())] = special<T>(g_);
  }

  void run() {
    INFO(r_.name() << ", " << sizeof(T) << " bytes, K = " << cols_ << ", rows = " << rows_);
    const batch_view<const T> in(x_.data() + offset_, matrices_, rows_, cols_, stride_, matrix_stride_);
    const tetromino::packed_shape shape{r_.format, matrices_, rows_, cols_};
    const std::size_t tensors = r_.format.scale == tetromino::scale_type::e8m0 ? 0
                                : options_.tensor_scales.size() > 1            ? matrices_
                                                                               : 1;
    loose_storage expected(shape, tensors, g_.below(4)), got(shape, tensors, expected.offset_);
    const auto a = tetromino::try_quantize_to(tetromino::scalar, in, expected.view(), options_);
    const auto b = tetromino::try_quantize_to(vectors, in, got.view(), options_);
    REQUIRE(a.has_value() == b.has_value());
    if (!a) {
      REQUIRE(std::string(a.error().what()) == b.error().what());
      return;
    }
    REQUIRE(same_bytes(expected.tensors, got.tensors));
    REQUIRE(expected.macros == got.macros);
    REQUIRE(expected.scales == got.scales);
    REQUIRE(expected.codes == got.codes);
    unpack<float>(expected.view());
    unpack<half>(expected.view());
    unpack<bfloat16>(expected.view());
  }

 private:
  template <class Out>
  void unpack(const tetromino::packed_view<any_format>& packed) {
    const std::size_t stride = cols_ + g_.below(3), offset = g_.below(5);
    std::vector<Out> expected(offset + matrices_ * rows_ * stride + 1), got = expected;
    const auto view = [&](std::vector<Out>& v) {
      return batch_view<Out>(v.data() + offset, matrices_, rows_, cols_, stride, rows_ * stride);
    };
    tetromino::dequantize_to(tetromino::scalar, packed, view(expected));
    tetromino::dequantize_to(vectors, packed, view(got));
    REQUIRE(same_bytes(expected, got));
    // The way past the caches, which only large output takes by itself.
    for (std::size_t e = 0; e < matrices_; ++e) {
      for (std::size_t r = 0; r < rows_; ++r) {
        Out* const row = view(got).row(e, r);
        std::fill(row, row + cols_, Out{});
        tetromino_test::row_kernels().dequantize_row_past_caches(
            packed.format,
            tetromino::detail::packed_row<const std::uint8_t>{packed.row_codes(e, r), packed.row_scales(e, r),
                                                              packed.row_macros(e, r), packed.tensor_scale(e)},
            cols_, row);
      }
    }
    REQUIRE(same_bytes(expected, got));
  }

  reference::generator& g_;
  recipe r_;
  quantize_options options_;
  std::size_t cols_, matrices_, rows_, stride_ = 0, matrix_stride_ = 0, offset_ = 0;
  std::vector<T> x_;
};

template <class T>
void compare(reference::generator& g, const recipe& r, std::size_t cols) {
  quantize_options options;
  std::vector<float> weights;
  float tensor_scale = 0;
  const std::size_t variant = g.below(4);
  if (variant == 1) {
    for (std::size_t k = 0; k < cols; ++k) {
      weights.push_back(g.below(8) == 0 ? 0.0f : std::ldexp(static_cast<float>(g.uniform()), 10 - int(g.below(20))));
    }
    if (g.below(4) == 0) {  // some columns that weights cannot tell apart
      const float same = g.below(2) == 0 ? 0.0f : 3e38f;
      const std::size_t from = g.below(cols + 1), to = from + g.below(cols - from + 1);
      for (std::size_t k = from; k < to; ++k) weights[k] = same;
    }
    options.column_weights = weights;
  }
  if (r.format.scale == tetromino::scale_type::e4m3 && g.below(2) == 0) {
    tensor_scale =
        std::ldexp(static_cast<float>(g.uniform()), static_cast<int>(g.below(g.below(2) == 0 ? 30 : 250)) - 125);
    if (tensor_scale == 0) tensor_scale = 1e-38f;
    options.tensor_scales = {&tensor_scale, 1};
  }
  if (variant == 2) {
    options.rounding = tetromino::element_rounding::stochastic;
    options.seed = g.bits();
    options.first_index = g.bits() >> g.below(64);
  }
  const special_values policies[] = {special_values::reject, special_values::poison, special_values::saturate};
  options.special = policies[g.below(3)];
  if (g.below(4) == 0) options.tiny_blocks = tetromino::tiny_block_scale::least;
  comparison<T> job(g, r, cols, options);
  if (variant == 3 && cols != 0) job.put_special_values();
  job.run();
}

/// Matrices of so many rows, of which a task takes 15.
void compare_over_threads(std::size_t rows) {
  reference::generator g(tetromino_test::seed() + 4);
  tetromino::thread_executor threads(3);
  tetromino::matrix<float> x(3, rows, 4200);
  for (float& v : x.data) v = static_cast<float>(g.student_t4());
  const std::vector<recipe> recipes = all_recipes();
  for (std::size_t i = 0; i < recipes.size(); i += 1 + g.below(8)) {
    if (recipes[i].macro == macro_rule::search_256) continue;
    INFO(recipes[i].name());
    tetromino::matrix<float> expected(3, rows, 4200), got(3, rows, 4200);
    tetromino::fake_quantize(tetromino::scalar, x.view(), recipes[i], expected.view());
    tetromino::fake_quantize(vectors.on(threads), x.view(), recipes[i], got.view());
    CHECK(same_bytes(expected.data, got.data));
    const auto packed = tetromino::quantize(vectors, x.view(), recipes[i]);
    const auto split = tetromino::quantize(vectors.on(threads), x.view(), recipes[i]);
    CHECK((packed.codes == split.codes && packed.scales == split.scales && packed.macros == split.macros));
    CHECK(same_bytes(tetromino::dequantize<float>(vectors.on(threads), packed).data, expected.data));
  }
}

}  // namespace

TEST_CASE("simd packs and unpacks as scalar does: every recipe") {
  reference::generator g(tetromino_test::seed());
  for (const recipe& r : all_recipes()) {
    // a search of 256 factors is slow, and no other arithmetic than one of 16
    for (int i = r.macro == macro_rule::search_256 ? 2 : 0; i < 3; ++i) {
      const std::size_t cols = i == 0 ? 300 + g.below(1000) : g.below(301);
      compare<float>(g, r, cols);
      compare<half>(g, r, cols);
      compare<bfloat16>(g, r, cols);
    }
  }
}

TEST_CASE("simd packs and unpacks as scalar does: every length up to 300") {
  reference::generator g(tetromino_test::seed() + 1);
  const std::vector<recipe> recipes = all_recipes();
  for (std::size_t cols = 0; cols <= 300; ++cols) {
    for (int i = 0; i < 2; ++i) {
      compare<float>(g, recipes[g.below(recipes.size())], cols);
      compare<half>(g, recipes[g.below(recipes.size())], cols);
      compare<bfloat16>(g, recipes[g.below(recipes.size())], cols);
    }
  }
}

TEST_CASE("simd packs and unpacks as scalar does: at length", "[.slow]") {
  reference::generator g(tetromino_test::seed() + 2);
  for (int i = 0; i < 100; ++i) {
    for (const recipe& r : all_recipes()) {
      const std::size_t cols = g.below(g.below(4) == 0 ? 5000 : 600);
      compare<float>(g, r, cols);
      compare<half>(g, r, cols);
      compare<bfloat16>(g, r, cols);
    }
  }
}

TEST_CASE("simd finds the E4M3 scales of least error that scalar finds, in every place of the search") {
  reference::generator g(tetromino_test::seed() + 5);
  tetromino::matrix<float> x(8, 4096);
  for (float& v : x.data) v = static_cast<float>(g.normal());
  quantize_options options;
  options.rule = scale_rule::min_error;
  const auto expected = tetromino::quantize<tetromino::nvfp4>(tetromino::scalar, x.view(), options);
  const auto got = tetromino::quantize<tetromino::nvfp4>(vectors, x.view(), options);
  CHECK((expected.scales == got.scales && expected.codes == got.codes));
}

TEST_CASE("any bytes unpack as scalar unpacks them") {
  reference::generator g(tetromino_test::seed() + 3);
  for (const any_format format :
       {any_format(tetromino::nvfp4{}), any_format(tetromino::mxfp4{}), any_format(tetromino::mxfp4_16{}),
        any_format(tetromino::mbs<tetromino::mxfp4, 32>{}), any_format(tetromino::mbs<tetromino::mxfp4_16, 256>{}),
        any_format(tetromino::mbs<tetromino::mxfp4, 8, 2>{}), any_format(tetromino::mbs<tetromino::mxfp4, 16, 2>{})}) {
    tetromino::packed<any_format> packed(format, 1, 64, 16 * 256);
    for (auto* bytes : {&packed.codes, &packed.scales, &packed.macros}) {
      for (auto& b : *bytes) b = static_cast<std::uint8_t>(g.bits());
    }
    for (float& t : packed.tensor_scales) t = 0.01f;
    const auto check = [&]<class T>(T) {
      CHECK(same_bytes(tetromino::dequantize<T>(tetromino::scalar, packed).data,
                       tetromino::dequantize<T>(vectors, packed).data));
    };
    check(float{});
    check(half{});
    check(bfloat16{});
  }
}

TEST_CASE("simd round-trips as scalar does, also over threads") { compare_over_threads(14); }

TEST_CASE("simd round-trips as scalar does, also over threads: more rows", "[.slow]") { compare_over_threads(40); }

#endif
