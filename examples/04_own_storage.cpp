// Packing into memory of the engine's own, and the layouts of other engines.
#include <tetromino/layout.hpp>
#include <tetromino/tetromino.hpp>

#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  namespace tt = tetromino;
  const std::size_t rows = 16, cols = 256;
  std::vector<std::uint16_t> checkpoint(rows * cols);  // bfloat16 as the file has it: 16-bit words
  for (std::size_t i = 0; i < checkpoint.size(); ++i) checkpoint[i] = tt::bfloat16(float(i % 97) / 31 - 1.5f).bits;
  const tt::matrix_view<const tt::bfloat16> w(checkpoint.data(), rows, cols);

  // Buffers of the sizes that the shape says; here from one allocation.
  const tt::packed_shape shape{tt::nvfp4{}, 1, rows, cols};
  std::vector<std::uint8_t> arena(shape.code_bytes() + shape.scale_bytes());
  float tensor_scale = 0;
  const tt::packed_view<tt::nvfp4, std::uint8_t> packed{
      .matrices = 1,
      .rows = rows,
      .cols = cols,
      .codes = {arena.data(), shape.code_bytes()},
      .scales = {arena.data() + shape.code_bytes(), shape.scale_bytes()},
      .tensor_scales = {&tensor_scale, 1},
  };
  tt::quantize_to(tt::automatic, w, packed);
  std::printf("codes %zu, scales %zu bytes, tensor scale %g\n", packed.codes.size(), packed.scales.size(),
              tensor_scale);

  // ggml's blocks, for llama.cpp; compressed-tensors, for vLLM; the 128x4 swizzle, for Blackwell's tensor cores.
  const std::vector<std::uint8_t> blocks = tt::layout::to_ggml(packed);
  float global_scale = 0;  // its inverse, which that layout stores
  const auto tensors = tt::layout::as_compressed_tensors(packed, {&global_scale, 1});
  const auto swizzled = tt::layout::swizzled_scales(packed);
  std::printf("ggml %zu, swizzled scales %zu bytes; weight_global_scale %g\n", blocks.size(), swizzled.size(),
              double(tensors.weight_global_scale[0]));

  // And back: the same codes and scales, to the bit.
  const auto again = tt::layout::from_ggml(tt::nvfp4{}, blocks, 1, rows, cols, packed.tensor_scales);
  return std::equal(again.codes.begin(), again.codes.end(), packed.codes.begin()) ? 0 : 1;
}
