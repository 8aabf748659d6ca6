/// Packs raw bytes as floats, halves and bfloat16s, under every recipe and option that the first bytes pick, on the
/// scalar and on the simd backend: the same bytes, or the same error; and unpacks them, and any other bytes, to the
/// same numbers. Built and run as tests/fuzz/safetensors.cpp, for the instruction set that is to be looked at.

#include <tetromino/tetromino.hpp>

#include "fuzz/bytes.hpp"
#include "fuzz/replay.hpp"

#include <bit>          // std::bit_cast
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

namespace {

using namespace tetromino;

recipe pick_recipe(fuzz_bytes& in) {
  recipe r;
  if (in.below(3) == 0) {
    r.format = nvfp4{};
    constexpr scale_rule rules[] = {scale_rule::amax, scale_rule::four_over_six, scale_rule::min_error};
    r.rule = rules[in.below(3)];
  } else {
    r.format = any_format(scale_type::e8m0, in.below(2) == 0 ? 16 : 32, 0);
    constexpr scale_rule rules[] = {scale_rule::floor, scale_rule::ceil, scale_rule::round_up,
                                    scale_rule::even,  scale_rule::oas,  scale_rule::min_error};
    r.rule = rules[in.below(6)];
    constexpr std::size_t macro_blocks[] = {0, 0, 0, 32, 64, 128, 256};
    r.format.macro_block = macro_blocks[in.below(7)];
    if (r.format.macro_block != 0) r.macro = static_cast<macro_rule>(in.below(16) == 0 ? 2 : in.below(2));
    const bool can_be_fine = r.format.block == 32 && (r.format.macro_block == 32 || r.format.macro_block == 64);
    if (can_be_fine && r.macro != macro_rule::search_256 && in.below(2) == 0) r.format.macro_bits = 2;
  }
  constexpr std::size_t rotations[] = {0, 0, 0, 0, 16, 32, 64, 128};
  r.rotation = rotations[in.below(8)];
  return r;
}

template <class Packed>
bool same_bytes(const Packed& a, const Packed& b) {
  if (a.codes != b.codes || a.scales != b.scales || a.macros != b.macros) return false;
  if (a.tensor_scales.size() != b.tensor_scales.size()) return false;
  for (std::size_t i = 0; i < a.tensor_scales.size(); ++i) {
    if (std::bit_cast<std::uint32_t>(a.tensor_scales[i]) != std::bit_cast<std::uint32_t>(b.tensor_scales[i])) {
      return false;
    }
  }
  return true;
}

/// The same numbers bit for bit, where one NaN is as good as another.
template <class T>
bool same_numbers(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const float x = detail::to_float(a[i]), y = detail::to_float(b[i]);
    if (x != x ? y == y : std::bit_cast<std::uint32_t>(x) != std::bit_cast<std::uint32_t>(y)) return false;
  }
  return true;
}

template <class T>
void compare(fuzz_bytes& in, const recipe& r) {
  quantize_options options;
  options.special = static_cast<special_values>(in.below(3));
  options.rounding = static_cast<element_rounding>(in.below(2));
  options.scope = static_cast<tensor_scale_scope>(in.below(2));
  if (options.rounding == element_rounding::stochastic) {
    options.seed = in.next<std::uint64_t>();
    options.first_index = in.next<std::uint64_t>();
  }
  const std::size_t matrices = 1 + in.below(2), rows = 1 + in.below(3);
  const std::size_t cols = in.below(8) == 0 ? 2000 + in.below(256) : in.next<std::uint16_t>() % 700;
  std::vector<float> weights, tensor_scales;
  if (in.below(4) == 0) {
    weights = in.fill<float>(in.below(2) == 0 ? cols : matrices * cols);
    options.column_weights = weights;
  }
  if (in.below(4) == 0) {
    tensor_scales = in.fill<float>(in.below(2) == 0 ? 1 : matrices);
    options.tensor_scales = tensor_scales;
  }
  const std::vector<T> values = in.fill<T>(matrices * rows * cols);
  const batch_view<const T> x(values.data(), matrices, rows, cols);

  const auto plain = try_quantize(scalar, x, r, options);
  const auto fast = try_quantize(automatic, x, r, options);
  require(plain.has_value() == fast.has_value(), "packed by both, or refused by both");
  std::vector<T> round_trip(values.size()), fast_trip(values.size());
  const batch_view<T> back(round_trip.data(), matrices, rows, cols), fast_back(fast_trip.data(), matrices, rows, cols);
  const auto faked = try_fake_quantize(automatic, x, r, fast_back, options);
  require(plain.has_value() == faked.has_value(), "packed and unpacked at once, or refused");
  if (!plain) {
    require(std::string_view(plain.error().what()) == fast.error().what(), "the same error");
    require(std::string_view(plain.error().what()) == faked.error().what(), "the same error in one pass");
    return;
  }
  require(same_bytes(*plain, *fast), "the same bytes");
  require(try_fake_quantize(scalar, x, r, back, options).has_value(), "packed and unpacked at once");
  require(same_numbers(round_trip, fast_trip), "the same numbers in one pass");
  if (r.rotation == 0) {
    require(same_numbers(dequantize<T>(scalar, *plain).data, round_trip), "the same numbers in two passes");
  }
}

template <class T>
void unpack(fuzz_bytes& in, const recipe& r) {
  const std::size_t matrices = 1 + in.below(2), rows = 1 + in.below(3), cols = in.next<std::uint16_t>() % 700;
  packed<any_format> storage(r.format, matrices, rows, cols, in.below(2) == 0 ? 1 : matrices);
  storage.scales = in.fill<std::uint8_t>(storage.scales.size());
  storage.macros = in.fill<std::uint8_t>(storage.macros.size());
  storage.tensor_scales = in.fill<float>(storage.tensor_scales.size());
  storage.codes = in.fill<std::uint8_t>(storage.codes.size());
  require(same_numbers(dequantize<T>(scalar, storage).data, dequantize<T>(automatic, storage).data),
          "the same numbers from any bytes");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz_bytes in(data, size);
  const std::size_t what = in.below(9);
  const recipe r = pick_recipe(in);
  if (what < 2) compare<float>(in, r);
  if (what >= 2 && what < 4) compare<half>(in, r);
  if (what >= 4 && what < 6) compare<bfloat16>(in, r);
  if (what == 6) unpack<float>(in, r);
  if (what == 7) unpack<half>(in, r);
  if (what == 8) unpack<bfloat16>(in, r);
  return 0;
}
