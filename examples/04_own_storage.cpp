// Packing into memory of the engine's own, and the layouts of other engines.
#include <tetromino/layout.hpp>
#include <tetromino/layout/ggml_rows.hpp>
#include <tetromino/tetromino.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <span>
#include <vector>

int main() {
  namespace tt = tetromino;
  const std::size_t rows = 16, cols = 256;
  std::vector<std::uint16_t> checkpoint(rows * cols);  // bfloat16 as the file has it: 16-bit words
  for (std::size_t i = 0; i < checkpoint.size(); ++i) checkpoint[i] = tt::bfloat16(float(i % 97) / 31 - 1.5f).bits;
  const tt::matrix_view<const tt::bfloat16> w(checkpoint.data(), rows, cols);

  // Buffers of the sizes that the shape says; here from one allocation.
  const tt::packed_shape shape(tt::nvfp4{}, rows, cols);
  std::vector<std::uint8_t> arena(shape.code_bytes() + shape.scale_bytes());
  const std::span<std::uint8_t> bytes(arena);
  std::array<float, 1> tensor_scale{};
  const auto packed = shape.view(bytes.first(shape.code_bytes()), bytes.subspan(shape.code_bytes()), tensor_scale);
  // The inverse of the tensor scale must give it back, because compressed-tensors stores the inverse.
  tt::quantize_to(tt::automatic, w, packed, {.invertible_tensor_scales = true});
  std::printf("codes %zu, scales %zu bytes, tensor scale %g\n", packed.codes.size(), packed.scales.size(),
              double(tensor_scale[0]));

  // A recipe named at run time: a buffer that its format lacks (macro bytes but for mbs, scales but for nvfp4) is
  // empty.
  for (const char* name : {"mxfp4/oas", "mxfp4/oas/mbs-search", "nvfp4"}) {
    const auto r = tt::recipe::parse(name);
    const tt::packed_shape s(r.format, rows, cols);
    std::vector<std::uint8_t> codes(s.code_bytes()), scales(s.scale_bytes()), macros(s.macro_bytes());
    std::vector<float> tensor_scales(r.format.scale == tt::scale_type::e4m3 ? 1 : 0);
    tt::quantize_to(tt::automatic, w, r, s.view(codes, scales, macros, tensor_scales));
    std::printf("%s: %zu macro bytes, %zu tensor scales\n", name, macros.size(), tensor_scales.size());
  }

  // compressed-tensors, for vLLM; the 128x4 swizzle, for Blackwell's tensor cores; ggml's blocks, for llama.cpp.
  float global_scale = 0;  // the inverse of the tensor scale, which that layout stores
  const auto tensors = tt::layout::as_compressed_tensors(packed, {&global_scale, 1});
  std::printf("weight_packed %zu, weight_scale %zu bytes, weight_global_scale %g; swizzled scales %zu bytes\n",
              tensors.weight_packed.size(), tensors.weight_scale.size(), double(tensors.weight_global_scale[0]),
              tt::layout::swizzled_scales(packed).size());

  // Blocks straight from the weights into an array of ggml's structs, with the same tensor scale; and back.
  struct block_nvfp4 {
    std::uint8_t d[4], qs[32];
  };
  std::vector<block_nvfp4> structs(rows * cols / 64);
  const std::span blocks(reinterpret_cast<std::uint8_t*>(structs.data()), structs.size() * sizeof(block_nvfp4));
  tt::quantize_to(tt::automatic, w, "nvfp4", tt::layout::ggml_rows{blocks}, {.tensor_scales = packed.tensor_scales});
  const auto again = tt::layout::from_ggml(tt::nvfp4{}, blocks, 1, rows, cols, packed.tensor_scales);
  return std::equal(again.codes.begin(), again.codes.end(), packed.codes.begin()) ? 0 : 1;
}
