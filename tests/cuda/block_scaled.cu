/// Block-scaled operands made on the GPU, byte for byte those of the host, and the product's kernel: with a model of
/// the instruction that only sm_120a has, on every GPU, and with the instruction where there is one. The model needs a
/// kernel that is made here, from all kernels in one file, as those include them who compile CUDA themselves: their
/// headers go together, and what a call needs is instantiated where it stands.

#include "block_scaled.hpp"

#include <tetromino/cuda/kernels.cuh>
#include <tetromino/hadamard.hpp>
#include <tetromino/quantize.hpp>

namespace {

using namespace harness;
namespace cuda = tetromino::cuda;
using tetromino::errc;
using tetromino::matrix_view;

/// mma.m16n8k64 with block scales, gathered from the registers of the warp: which lane and register hold the element
/// [row, k] of A and [k, col] of B, turned around from the fragment tables of PTX ISA 9.0.
struct modelled_mma {
  static constexpr bool is_native = false;
  static __device__ float e2m1(std::uint32_t code) {
    const auto exponent = static_cast<int>(code >> 1 & 3), mantissa = static_cast<int>(code & 1);
    const int halves = exponent == 0 ? mantissa : (2 + mantissa) << (exponent - 1);
    return static_cast<float>((code & 8) != 0 ? -halves : halves) * 0.5f;
  }
  template <block_scaled_kind Kind>
  static __device__ float scale(std::uint32_t word, int byte) {
    const std::uint32_t code = word >> (8 * byte) & 255;
    if (Kind == block_scaled_kind::e8m0_32) return code == 255 ? NAN : ldexpf(1.0f, static_cast<int>(code) - 127);
    if ((code & 127) == 127) return NAN;
    const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
    return exponent == 0 ? ldexpf(static_cast<float>(mantissa), -9)
                         : ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
  }
  template <block_scaled_kind Kind, int Byte>
  static __device__ __noinline__ void add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                          std::uint32_t scale_a, std::uint32_t scale_b) {
    const int lane = static_cast<int>(threadIdx.x % 32), group = lane >> 2, in_group = lane & 3;
    constexpr int block = Kind == block_scaled_kind::e4m3_16 ? 16 : 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i < 2 ? 0 : 8), col = in_group * 2 + (i & 1);
      const std::uint32_t of_row = __shfl_sync(0xFFFFFFFFu, scale_a, row % 8 * 4 + row / 8);
      const std::uint32_t of_col = __shfl_sync(0xFFFFFFFFu, scale_b, col * 4);
      float sum = 0;
#pragma unroll 1
      for (int k = 0; k < 64; k += 8) {
        const std::uint32_t left =
            __shfl_sync(0xFFFFFFFFu, a[(i < 2 ? 0 : 1) + (k < 32 ? 0 : 2)], row % 8 * 4 + k % 32 / 8);
        const std::uint32_t right = __shfl_sync(0xFFFFFFFFu, b[k < 32 ? 0 : 1], col * 4 + k % 32 / 8);
        float part = 0;
#pragma unroll 1
        for (int j = 0; j < 8; ++j) part += e2m1(left >> (4 * j) & 15) * e2m1(right >> (4 * j) & 15);
        sum += part * (scale<Kind>(of_row, Byte + k / block) * scale<Kind>(of_col, Byte + k / block));
      }
      d[i] += sum;
    }
  }
};

void check_operands(const tetromino::packed_shape& shape, block_scaled_kind kind, unsigned low, unsigned high,
                    bool one_tensor_scale = false) {
  auto packed = random_packed(shape, low, high, shape.rows + shape.cols + low);
  if (one_tensor_scale && !packed.tensor_scales.empty()) packed.tensor_scales.resize(1);
  const std::string what = "operand [" + std::to_string(shape.matrices) + ", " + std::to_string(shape.rows) + ", " +
                           std::to_string(shape.cols) + "] block " + std::to_string(shape.format.block) + " scales " +
                           std::to_string(low) + " to " + std::to_string(high);
  for (std::size_t i = 0; i < packed.scales.size(); i += 5) {  // some blocks of zeros
    const std::size_t bytes = shape.format.block / 2;
    for (std::size_t j = 0; j < bytes; ++j) packed.codes[i * bytes + j] &= 0x88;
  }
  const auto want = tetromino::repack(tetromino::scalar, packed, kind);
  const device_packed on_device(packed);
  const device_operands out(want.shape);
  require(tetromino::try_repack_to(cuda::stream(), on_device.view(), out.view()), what.c_str());
  require(cudaDeviceSynchronize(), what.c_str());
  expect(first_difference(out.codes.values(), want.codes) < 0, "%s: codes differ", what.c_str());
  expect(first_difference(out.scales.values(), want.scales) < 0, "%s: scales differ", what.c_str());
  expect(first_difference(out.factors.values(), want.factors) < 0, "%s: factors differ", what.c_str());
  expect(out.is_intact(), "%s: written past the end", what.c_str());
}

void operands() {
  using tetromino::mxfp4;
  using tetromino::mxfp4_16;
  using tetromino::nvfp4;
  for (const auto& [matrices, rows, cols] : std::vector<std::array<std::size_t, 3>>{
           {1, 1, 64}, {1, 128, 128}, {3, 129, 192}, {2, 5, 50}, {1, 300, 96}, {5, 2, 16}, {1, 64, 2880}, {1, 0, 64}}) {
    check_operands({nvfp4{}, matrices, rows, cols}, block_scaled_kind::e4m3_16, 0, 0x7F);
    check_operands({nvfp4{}, matrices, rows, cols}, block_scaled_kind::e4m3_16, 0, 0x7F, true);
    check_operands({mxfp4{}, matrices, rows, cols}, block_scaled_kind::e8m0_32, 0, 255);
    for (const any_format format : {any_format(mxfp4{}), any_format(mxfp4_16{})}) {
      check_operands({format, matrices, rows, cols}, block_scaled_kind::e4m3_16, 110, 127);
      check_operands({format, matrices, rows, cols}, block_scaled_kind::e4m3_16, 0, 12);
      check_operands({format, matrices, rows, cols}, block_scaled_kind::e4m3_16, 100, 130);  // beyond 18 powers of two
      check_operands({format, matrices, rows, cols}, block_scaled_kind::e4m3_16, 225, 255);
    }
  }
}

/// Activations become operands where they are packed.
void activations() {
  for (const any_format format : {any_format(tetromino::nvfp4{}), any_format(tetromino::mxfp4{})}) {
    const bool is_nv = format == any_format(tetromino::nvfp4{});
    const std::size_t rows = 133, cols = 576;
    const numbers random{5};
    const auto x = generate<float>(rows * cols, [&](std::size_t i) { return random.normal(i); });
    tetromino::packed<any_format> packed(format, 1, rows, cols);
    tetromino::quantize_to(tetromino::scalar, tetromino::batch_view<const float>(x.data(), 1, rows, cols),
                           packed.view());
    const auto want =
        tetromino::repack(tetromino::scalar, packed, is_nv ? block_scaled_kind::e4m3_16 : block_scaled_kind::e8m0_32);
    const device<float> input(x);
    const device<std::uint8_t> codes(want.codes.size()), scales(want.scales.size());
    const device<float> tensor_scales(want.factors.size());
    const tetromino::packed_view<any_format, std::uint8_t> out{format, 1, rows, cols, codes, scales, {}, tensor_scales};
    tetromino::quantize_options options;
    options.special = tetromino::special_values::poison;
    require(cuda::try_quantize_swizzled_to(
                cuda::stream(), tetromino::batch_view<const float>(input.data(), 1, rows, cols), out, options),
            "try_quantize_swizzled_to");
    const auto operand = cuda::as_block_scaled(out);
    expect(operand.shape == want.shape, "as_block_scaled has another shape");
    expect(first_difference(codes.values(), want.codes) < 0, "packed activations: codes differ from the operand's");
    expect(first_difference(scales.values(), want.scales) < 0, "packed activations: scales differ from the operand's");
    expect(first_difference(tensor_scales.values(), want.factors) < 0, "packed activations: factors differ");
  }
}

template <class T, class Multiply>
void check_products(const Multiply& multiply) {
  for (const block_scaled_kind kind : {block_scaled_kind::e4m3_16, block_scaled_kind::e8m0_32}) {
    for (const product_case& c : product_cases(kind)) {
      const device_operands x(c.x), w(c.w);
      const std::size_t stride = c.w.shape.rows + 5;
      const device<T> out(c.x.shape.rows * stride);
      require(multiply(x.view(), w.view(), matrix_view<T>(out.data(), c.x.shape.rows, c.w.shape.rows, stride)),
              c.name.c_str());
      require(cudaDeviceSynchronize(), c.name.c_str());
      c.check(out.values(), stride);
      expect(out.is_intact(), "%s: written past the end", c.name.c_str());
    }
  }
}

void refusals() {
  const product_case c(block_scaled_kind::e4m3_16, 16, 8, 64);
  const device_operands x(c.x), w(c.w);
  const device<tetromino::half> out(16 * 8);
  const auto multiply = [&](const auto& a, const auto& b, std::size_t cols) {
    return tetromino::try_matmul(cuda::stream(), a, b, matrix_view<tetromino::half>(out.data(), 16, cols));
  };
  expect_error(multiply(x.view(), w.view(), 7), errc::shape_mismatch, "it is [16, 8], the output [16, 7]");
  const device_operands other(product_case(block_scaled_kind::e8m0_32, 16, 8, 64).w);
  expect_error(multiply(x.view(), other.view(), 8), errc::invalid_argument, "operands of one kind");
  const device_operands longer(product_case(block_scaled_kind::e4m3_16, 16, 8, 128).w);
  expect_error(multiply(x.view(), longer.view(), 8), errc::shape_mismatch, "have 64 columns, the weights 128");
  auto cut = w.view();
  cut.scales = cut.scales.first(16);
  expect_error(multiply(x.view(), cut, 8), errc::shape_mismatch, "scales needs 512 entries, got 16");
  if (device_major() != 12) {
    expect_error(multiply(x.view(), w.view(), 8), errc::device, "needs compute capability 12.x");
    expect_error(multiply(x.view(), w.view(), 8), errc::device, ("has " + std::to_string(device_major())).c_str());
  }

  const any_format macros(tetromino::scale_type::e8m0, 32, 128);
  const device_packed packed(tetromino::packed_shape{macros, 1, 16, 64}, 0);
  expect_error(tetromino::try_repack_to(cuda::stream(), packed.view(), x.view()), errc::invalid_argument,
               "without macro blocks");
}

void rotation() {
  const std::vector<float> ones(4 * 64, 1.0f);
  const device<float> x(ones), out(ones.size());
  const tetromino::hadamard rotation{64};
  std::vector<float> expected(ones.size());
  tetromino::rotate(tetromino::scalar, tetromino::batch_view<const float>(ones.data(), 1, 4, 64), rotation,
                    tetromino::batch_view<float>(expected.data(), 1, 4, 64));
  require(tetromino::try_rotate(cuda::stream{}, tetromino::batch_view<const float>(x.data(), 1, 4, 64), rotation,
                                tetromino::batch_view<float>(out.data(), 1, 4, 64)),
          "rotate");
  expect(first_difference(expected, out.values()) < 0, "a rotation instantiated here");
}

}  // namespace

int main() {
  need_device();
  operands();
  activations();
  const auto modelled = [](const auto& x, const auto& w, const auto& out) {
    return cuda::detail::launch_block_scaled<modelled_mma>(cuda::stream(), {x, w, out.row_stride}, out.data);
  };
  check_products<tetromino::half>(modelled);
  check_products<tetromino::bfloat16>(modelled);
  refusals();
  rotation();
  if (device_major() == 12) {
    const auto native = [](const auto& x, const auto& w, const auto& out) {
      return tetromino::try_matmul(cuda::stream(), x, w, out);
    };
    check_products<tetromino::half>(native);
    check_products<tetromino::bfloat16>(native);
  } else {
    std::printf("the instruction itself was not run: it needs compute capability 12.x\n");
  }
  return finish("block_scaled");
}
