/// Feeds any sizes with small buffers to everything that takes packed storage or a matrix: it must be refused unless
/// the buffers are as large as the sizes say, counted in 128 bits. Built and run as tests/fuzz/safetensors.cpp.

#include <tetromino/layout.hpp>
#include <tetromino/tetromino.hpp>

#include "fuzz/bytes.hpp"
#include "fuzz/replay.hpp"

#include <vector>  // std::vector

namespace {

using namespace tetromino;
__extension__ using wide = unsigned __int128;

std::size_t any_size(fuzz_bytes& in) {
  switch (in.below(4)) {
    case 0:
      return std::size_t{1} << in.below(64);
    case 1:
      return in.next<std::size_t>();
    default:
      return in.below(70);
  }
}

any_format any_known(fuzz_bytes& in) {
  const any_format all[] = {mxfp4{}, mxfp4_16{}, nvfp4{}, mbs<mxfp4>{}, mbs<mxfp4_16, 32>{}, mbs<mxfp4, 16, 2>{}};
  return all[in.below(6)];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz_bytes in(data, size);
  const any_format format = any_known(in);
  const std::size_t matrices = any_size(in), rows = any_size(in), cols = any_size(in);
  const wide blocks = wide{matrices} * rows * (cols / format.block + (cols % format.block != 0));
  const std::size_t macro = format.macro_block;
  const wide macros = macro == 0 ? 0 : wide{matrices} * rows * (cols / macro + (cols % macro != 0));
  constexpr std::size_t most = 1 << 16;
  const bool is_small = wide{matrices} * rows * cols <= most && blocks <= most;
  // buffers of the right size where that is small, or of some other
  const auto room = [&](wide right) {
    return right <= most && in.below(8) != 0 ? static_cast<std::size_t>(right) : in.below(200);
  };
  std::vector<std::uint8_t> codes(room(blocks * (format.block / 2))), scales(room(blocks)), factors(room(macros));
  std::vector<float> tensor_scales(
      format.scale == scale_type::e4m3 ? 1 + in.below(2) * (matrices < 70 ? matrices : 0) : 0, 1.0f);
  const bool fits = codes.size() == blocks * (format.block / 2) && scales.size() == blocks &&
                    factors.size() == macros && (tensor_scales.size() <= 1 || tensor_scales.size() == matrices);
  const packed_view<any_format, std::uint8_t> storage{format, matrices, rows,    cols,
                                                      codes,  scales,   factors, tensor_scales};

  std::vector<float> values(is_small ? matrices * rows * cols : 1, 1.0f);
  if (is_small || wide{matrices} * rows * cols > most) {
    // a view of sizes that memory cannot hold is refused before it is read
    const bool may_be_read = is_small;
    const batch_view<float> x(values.data(), matrices, rows, cols, cols, rows * cols);
    if (may_be_read || !fits) {
      const auto packed = try_quantize_to(scalar, x, storage);
      require(!packed || (fits && may_be_read), "only storage that fits is written");
      const auto unpacked = try_dequantize_to(scalar, storage, x);
      require(!unpacked || (fits && may_be_read), "only storage that fits is read");
    }
  }
  if (!fits) {
    require(!layout::try_to_ggml(storage), "ggml: storage that fits");
    require(!layout::try_swizzled_scales(storage), "swizzle: storage that fits");
  }
  return 0;
}
