/// Feeds any bytes, in any shape, to the layout converters. What they accept must lie where the layouts' own formulas
/// (tests/reference/layouts.hpp) say, and must come back as the same bytes; what they refuse must be for a reason.
/// Built and run as tests/fuzz/safetensors.cpp.

#include <tetromino/layout.hpp>
#include <tetromino/quantize.hpp>  // scalar
#include <tetromino/repacked.hpp>

#include "fuzz/bytes.hpp"
#include "fuzz/replay.hpp"
#include "reference/layouts.hpp"

#include <algorithm>    // std::all_of, std::equal
#include <bit>          // std::bit_cast
#include <span>         // std::span
#include <string_view>  // std::string_view
#include <vector>       // std::vector

namespace {

using namespace tetromino;

template <class Result>
bool refused(const Result& got) {
  if (got) return false;
  const errc code = got.error().code();
  require(code == errc::invalid_argument || code == errc::shape_mismatch || code == errc::non_finite,
          "the kind of the error");
  require(std::string_view(got.error().what()).size() < 1000, "an error that fits on a screen");
  return true;
}

bool same(std::span<const std::uint8_t> a, std::span<const std::uint8_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

any_format pick_format(fuzz_bytes& in) {
  constexpr any_format formats[] = {
      mxfp4{}, nvfp4{}, mxfp4_16{}, mbs<mxfp4>{}, mbs<mxfp4, 8, 2>{}, any_format(scale_type::e4m3, 32, 0)};
  return formats[in.below(16) < 12 ? in.below(2) : in.below(6)];
}

packed<any_format> pick_storage(fuzz_bytes& in, const any_format& format) {
  const std::size_t matrices = in.below(3), rows = in.below(5), step = in.below(8) == 0 ? 1 : 64;
  packed<any_format> out(format, matrices, rows, step * in.below(9), in.below(2) == 0 ? 1 : matrices);
  const std::uint8_t mask = in.below(2) == 0 ? 0xFF : 0x7D;
  out.scales = in.fill<std::uint8_t>(out.scales.size());
  for (std::uint8_t& s : out.scales) s &= mask;
  out.tensor_scales = in.fill<float>(out.tensor_scales.size());
  out.codes = in.fill<std::uint8_t>(out.codes.size());
  return out;
}

void check_ggml(fuzz_bytes& in) {
  const packed<any_format> storage = pick_storage(in, pick_format(in));
  const auto blocks = layout::try_to_ggml(storage);
  const bool finite = std::all_of(storage.scales.begin(), storage.scales.end(), [&](std::uint8_t s) {
    return s <= (storage.format.scale == scale_type::e4m3 ? 0x7E : 0xFE);
  });
  if (refused(blocks)) {
    const bool known = storage.format == any_format(mxfp4{}) || storage.format == any_format(nvfp4{});
    require(!known || !finite || storage.cols % (storage.format.block == 16 ? 64 : 32) != 0, "a reason to refuse");
    return;
  }
  const std::size_t K = storage.cols;
  const bool is_mx = storage.format.scale == scale_type::e8m0;
  for (std::size_t r = 0; r < storage.matrices * storage.rows; ++r) {
    for (std::size_t k = 0; k < K; ++k) {
      const auto code = is_mx ? reference::ggml_mxfp4_code(r, k, K) : reference::ggml_nvfp4_code(r, k, K);
      const std::size_t scale = is_mx ? reference::ggml_mxfp4_scale(r, k, K) : reference::ggml_nvfp4_scale(r, k, K);
      require(reference::nibble_at(blocks->data(), code) ==
                  reference::nibble_at(storage.codes.data(), reference::linear_code(r, k, K)),
              "ggml: the code of an element");
      require((*blocks)[scale] == storage.scales[reference::linear_scale(r, k, K, storage.format.block)],
              "ggml: the scale of an element");
    }
  }
  const auto back = layout::try_from_ggml(storage.format, *blocks, storage.matrices, storage.rows, storage.cols,
                                          storage.tensor_scales);
  require(back.has_value() && back->codes == storage.codes && back->scales == storage.scales, "ggml: the same bytes");
}

/// Blocks that came from elsewhere, under shapes that may be anything.
void check_foreign_ggml(fuzz_bytes& in) {
  const any_format format = pick_format(in);
  const bool any_size = in.below(4) == 0;
  const std::size_t matrices = any_size ? in.next<std::uint64_t>() : in.below(3);
  const std::size_t rows = any_size ? in.next<std::uint64_t>() : in.below(4);
  const std::size_t cols = any_size ? in.next<std::uint64_t>() : 64 * in.below(4);
  const bool is_mx = format.scale == scale_type::e8m0;
  const std::size_t bytes = any_size ? in.left() : matrices * rows * (is_mx ? cols / 32 * 17 : cols / 64 * 36);
  const std::vector<std::uint8_t> blocks = in.fill<std::uint8_t>(bytes);
  const float one = 1;
  const auto read = layout::try_from_ggml(format, blocks, matrices, rows, cols,
                                          is_mx ? std::span<const float>{} : std::span<const float>(&one, 1));
  if (refused(read)) return;
  const auto again = layout::try_to_ggml(*read);
  require(again.has_value() && *again == blocks, "ggml: the same blocks");
}

void check_checkpoints(fuzz_bytes& in) {
  const packed<any_format> storage = pick_storage(in, pick_format(in));
  if (const auto got = layout::try_as_gpt_oss(storage); !refused(got)) {
    require(same(got->blocks, storage.codes) && same(got->scales, storage.scales), "gpt-oss: the same bytes");
    const auto back = layout::try_from_gpt_oss(*got, storage.matrices, storage.rows, storage.cols);
    require(back.has_value() && same(back->codes, storage.codes), "gpt-oss: and back");
  }
  if (const auto got = layout::try_as_modelopt(storage); !refused(got)) {
    require(same(got->weight, storage.codes) && same(got->weight_scale, storage.scales), "modelopt: the same bytes");
    const auto back = layout::try_from_modelopt(*got, storage.matrices, storage.rows, storage.cols);
    require(back.has_value() && same(back->codes, storage.codes), "modelopt: and back");
  }
  std::vector<float> inverse(storage.tensor_scales.size()), twice(storage.tensor_scales.size());
  if (const auto got = layout::try_as_compressed_tensors(storage, inverse); !refused(got)) {
    require(same(got->weight_packed, storage.codes), "compressed-tensors: the same bytes");
    const auto back =
        layout::try_from_compressed_tensors(storage.format, *got, storage.matrices, storage.rows, storage.cols, twice);
    require(back.has_value() && twice == storage.tensor_scales, "compressed-tensors: the same tensor scales");
  }
}

void check_swizzle(fuzz_bytes& in) {
  const bool any_size = in.below(4) == 0;
  const std::size_t matrices = any_size ? in.next<std::uint64_t>() : in.below(3);
  const std::size_t rows = any_size ? in.next<std::uint64_t>() : in.next<std::uint16_t>() % 300;
  const std::size_t per_row = any_size ? in.next<std::uint64_t>() : in.below(20);
  const std::vector<std::uint8_t> scales = in.fill<std::uint8_t>(any_size ? in.left() : matrices * rows * per_row);
  const std::size_t size = any_size ? in.below(4) * 512 : layout::swizzled_bytes(matrices, rows, per_row);
  std::vector<std::uint8_t> swizzled(size, 0xAA), back(scales.size());
  if (refused(layout::try_swizzle_scales(scales, matrices, rows, per_row, swizzled))) {
    require(any_size, "sizes that fit are swizzled");
    return;
  }
  const std::size_t one = matrices == 0 ? 1 : std::max<std::size_t>(1, size / matrices);
  for (std::size_t at = 0; at < size; ++at) {
    const auto [r, c] = reference::swizzled_position(at % one, per_row);
    const bool padding = r >= rows || c >= per_row;
    require(swizzled[at] == (padding ? 0 : scales[(at / one * rows + r) * per_row + c]), "the swizzled scale");
  }
  require(layout::try_unswizzle_scales(swizzled, matrices, rows, per_row, back).has_value() && back == scales,
          "the same scales");
}

void check_interleaved(fuzz_bytes& in) {
  const any_format format = pick_format(in);
  packed<any_format> even = pick_storage(in, format);
  packed<any_format> odd = in.below(4) == 0 ? pick_storage(in, format) : even;
  if (odd.codes.size() == even.codes.size()) std::reverse(odd.codes.begin(), odd.codes.end());
  packed<any_format> both(format, even.matrices, 2 * even.rows, even.cols, even.tensor_scales.size());
  if (refused(layout::try_interleave_rows(even, odd, both.view()))) return;
  packed<any_format> first = even, second = odd;
  first.codes.assign(first.codes.size(), 0);
  second.codes.assign(second.codes.size(), 0);
  require(layout::try_deinterleave_rows(both, first.view(), second.view()).has_value(), "rows that come apart again");
  require(first.codes == even.codes && second.codes == odd.codes && second.scales == odd.scales, "the same rows");
}

/// Byte by byte against the order that repacked_view states.
void check_repacked(fuzz_bytes& in) {
  const std::size_t matrices = in.below(3), rows = in.below(40), cols = in.next<std::uint16_t>() % 300;
  const any_format format = pick_format(in);
  packed<any_format> storage(format, matrices, rows, cols, in.below(2) == 0 ? 1 : matrices);
  storage.scales = in.fill<std::uint8_t>(storage.scales.size());
  storage.macros = in.fill<std::uint8_t>(storage.macros.size());
  storage.tensor_scales = in.fill<float>(storage.tensor_scales.size());
  storage.codes = in.fill<std::uint8_t>(storage.codes.size());
  const auto order = try_repack(scalar, storage);
  if (refused(order)) return;
  const repacked_view got = order->view();
  const std::size_t groups = (rows + 15) / 16, panels = (cols + 31) / 32, per_panel = 32 / format.block;
  const packed_shape shape = storage.shape();
  const std::size_t bytes = shape.code_bytes_per_row(), scales = shape.blocks_per_row(),
                    macros = shape.macros_per_row();
  const std::size_t group_bytes = (panels * (16 + per_panel) * 16 + macros * 16 + 63) / 64 * 64;
  require(got.data.size() == matrices * groups * group_bytes, "repacked: the size");
  // Of panel p; past macro bytes.
  const auto panel_at = [&](std::size_t p) {
    return (p * (16 + per_panel) + (macros == 0 ? 0 : p * 32 / format.macro_block + 1)) * 16;
  };
  for (std::size_t e = 0; e < matrices; ++e) {
    for (std::size_t r = 0; r < rows; ++r) {
      const std::size_t row = e * rows + r, group = (e * groups + r / 16) * group_bytes, lane = r % 16;
      for (std::size_t b = 0; b < bytes; ++b) {
        const std::size_t at = panel_at(b / 16) + (per_panel + b % 16 / 4 * 4) * 16 + lane * 4 + b % 4;
        require(got.data[group + at] == storage.codes[row * bytes + b], "repacked: the codes");
      }
      for (std::size_t b = 0; b < scales; ++b) {
        const std::size_t at = panel_at(b / per_panel) + b % per_panel * 16 + lane;
        require(got.data[group + at] == storage.scales[row * scales + b], "repacked: the scale");
      }
      for (std::size_t b = 0; b < macros; ++b) {
        const std::size_t at = panel_at(b * format.macro_block / 32) - 16 + lane;
        require(got.data[group + at] == storage.macros[row * macros + b], "repacked: the macro");
      }
    }
  }
  const auto back = try_to_packed(scalar, *order);
  require(back.has_value() && back->codes == storage.codes && back->scales == storage.scales &&
              back->macros == storage.macros,
          "repacked: and back");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz_bytes in(data, size);
  const auto what = in.next<std::uint8_t>();
  if (what / 8 == 30) {  // a number that no older input has
    check_repacked(in);
    return 0;
  }
  switch (what % 5) {
    case 0:
      check_ggml(in);
      break;
    case 1:
      check_foreign_ggml(in);
      break;
    case 2:
      check_checkpoints(in);
      break;
    case 3:
      check_swizzle(in);
      break;
    default:
      check_interleaved(in);
  }
  return 0;
}
