/// What repack_to, matmul, grouped_matmul and quantize_e4m3_to check on a cuda::stream, and what they hand to the
/// kernels: this program defines the kernels itself, so that it needs no GPU; host memory stands for the device's.

#include "check.hpp"

#include <tetromino/cuda/block_scaled.hpp>
#include <tetromino/cuda/e4m3_activations.hpp>
#include <tetromino/cuda/matmul.hpp>

#include <array>   // std::array
#include <memory>  // std::align
#include <string>  // std::string
#include <vector>  // std::vector

namespace {

namespace cuda = tetromino::cuda;
using tetromino::batch_view;
using tetromino::bfloat16;
using tetromino::e4m3;
using tetromino::errc;
using tetromino::matrix_view;
using tetromino_test::contains;

/// The last calls of the kernels.
cuda::detail::matmul_job<bfloat16> multiplied{};
cuda::detail::matmul_job<e4m3> multiplied_e4m3{};
std::byte* repacked_to = nullptr;
tetromino::detail::quantize_e4m3_job<bfloat16> rounded{};
int calls = 0;

}  // namespace

namespace TETROMINO_NAMESPACE::cuda::detail {
template <>
result<void> repack<bfloat16>(const stream&, const packed_view<any_format>&, const repacked_shape&, std::byte* out) {
  repacked_to = out, ++calls;
  return {};
}
template <>
result<void> repack<e4m3>(const stream&, const packed_view<any_format>&, const repacked_shape&, std::byte* out) {
  repacked_to = out, ++calls;
  return {};
}
template <class Byte>
result<void> repack_block_scaled(const stream&, const packed_view<any_format, Byte>&,
                                 const block_scaled_view<std::uint8_t, float>&) {
  ++calls;
  return {};
}
template <>
result<void> quantize_e4m3<bfloat16>(const stream&, const tetromino::detail::quantize_e4m3_job<bfloat16>& job) {
  rounded = job, ++calls;
  return {};
}
template <>
result<void> matmul<bfloat16>(const stream&, const matmul_job<bfloat16>& job) {
  multiplied = job, ++calls;
  return {};
}
template <>
result<void> matmul<e4m3>(const stream&, const matmul_job<e4m3>& job) {
  multiplied_e4m3 = job, ++calls;
  return {};
}
}  // namespace tetromino::cuda::detail

namespace {

const cuda::stream the_stream(nullptr);

/// Weights [2, 96, 160] and room for them in the kernels' order, at a multiple of 128 bytes.
struct fixture {
  tetromino::packed<tetromino::mxfp4> packed{tetromino::mxfp4{}, 2, 96, 160};
  cuda::repacked_shape shape{tetromino::mxfp4{}, 2, 96, 160};
  std::vector<std::byte> memory = std::vector<std::byte>(shape.bytes() + 256);
  std::vector<bfloat16> x = std::vector<bfloat16>(8 * 160), out = std::vector<bfloat16>(8 * 96);
  std::array<std::uint32_t, 3> offsets{0, 5, 8};

  [[nodiscard]] std::span<std::byte> room(std::size_t bytes) {
    void* at = memory.data();
    std::size_t left = memory.size();
    return {static_cast<std::byte*>(std::align(128, bytes, at, left)), bytes};
  }
  template <class T = bfloat16>
  [[nodiscard]] cuda::repacked_view<T, std::byte> weights() {
    return {shape, room(shape.bytes())};
  }
};

std::string message(const tetromino::result<void>& done, errc expected = errc::shape_mismatch) {
  REQUIRE_FALSE(done);
  CHECK(done.error().code() == expected);
  return done.error().what();
}

}  // namespace

TEST_CASE("cuda: factors of 2 bits lie in the tiles, and are refused as block-scaled operands") {
  fixture f;
  const tetromino::packed<tetromino::mbs<tetromino::mxfp4, 16, 2>> fine({}, 2, 96, 160);
  const cuda::repacked_shape shape{fine.format, 2, 96, 160};
  CHECK(shape.tile_bytes() * 8 == 64 * 64 * 9 / 2);
  CHECK(shape.bytes() == shape.macros_at());
  f.memory.resize(shape.bytes() + 256);
  calls = 0;
  tetromino::repack_to(the_stream, fine, cuda::repacked_view<bfloat16, std::byte>{shape, f.room(shape.bytes())});
  CHECK(calls == 1);

  const tetromino::block_scaled_shape operand{tetromino::block_scaled_kind::e8m0_32, 2, 96, 160};
  CHECK_THAT(message(tetromino::try_repack_to(the_stream, fine,
                                              tetromino::block_scaled_view<std::uint8_t, float>{operand, {}, {}, {}}),
                     errc::invalid_argument),
             contains("whose factors the tensor cores do not know, got factors of 2 bits for 16 elements"));
  const auto as_operand = cuda::try_as_block_scaled(fine.view());
  REQUIRE_FALSE(as_operand);
  CHECK_THAT(as_operand.error().what(), contains("got mxfp4-32 with macro blocks"));
  CHECK(calls == 1);
}

TEST_CASE("cuda: repack_to says what does not fit") {
  fixture f;
  calls = 0;
  tetromino::repack_to(the_stream, f.packed, f.weights());
  CHECK(calls == 1);
  CHECK(repacked_to == f.weights().data.data());

  auto out = f.weights();
  out.shape.rows = 97;
  CHECK_THAT(message(tetromino::try_repack_to(the_stream, f.packed, out)),
             contains("mxfp4-32 [2, 96, 160]") && contains("mxfp4-32 [2, 97, 160]"));
  out = f.weights(), out.shape.format = tetromino::nvfp4{};
  CHECK_THAT(message(tetromino::try_repack_to(the_stream, f.packed, out)), contains("nvfp4"));
  out = f.weights(), out.data = out.data.first(out.data.size() - 1);
  CHECK_THAT(message(tetromino::try_repack_to(the_stream, f.packed, out)),
             contains("need " + std::to_string(f.shape.bytes()) + " bytes at a multiple of 128"));
  out = f.weights(), out.data = {out.data.data() + 1, out.data.size()};
  CHECK_THAT(message(tetromino::try_repack_to(the_stream, f.packed, out)), contains("multiple of 128"));
  tetromino::packed<tetromino::mxfp4> odd(tetromino::mxfp4{}, 1, 95, 160);
  const cuda::repacked_shape gated{tetromino::mxfp4{}, 1, 95, 160, cuda::gating_rows::halves};
  CHECK_THAT(message(tetromino::try_repack_to(the_stream, odd,
                                              cuda::repacked_view<bfloat16, std::byte>{gated, f.room(gated.bytes())})),
             contains("pairs, got 95 rows"));
  auto torn = f.packed.view();
  torn.codes = torn.codes.first(7);
  CHECK_THAT(message(tetromino::try_repack_to(the_stream, torn, f.weights())), contains("codes"));
  CHECK_THROWS_AS(tetromino::repack_to(the_stream, torn, f.weights()), tetromino::error);
  CHECK(calls == 1);
}

TEST_CASE("cuda: repack_to for activations in e4m3 refuses what their products do") {
  fixture f;
  calls = 0;
  tetromino::repack_to(the_stream, f.packed, f.weights<e4m3>());
  CHECK(calls == 1);
  CHECK(repacked_to == f.weights<e4m3>().data.data());
  const auto refused = [&](const auto& packed) {
    const cuda::repacked_shape shape{packed.format, 2, 96, 160};
    f.memory.resize(shape.bytes() + 256);
    return message(tetromino::try_repack_to(the_stream, packed,
                                            cuda::repacked_view<e4m3, std::byte>{shape, f.room(shape.bytes())}),
                   errc::invalid_argument);
  };
  CHECK_THAT(refused(tetromino::packed<tetromino::nvfp4>({}, 2, 96, 160)),
             contains("repack: activations in E4M3 multiply mxfp4-32 weights without macro blocks, got nvfp4"));
  CHECK_THAT(refused(tetromino::packed<tetromino::mxfp4_16>({}, 2, 96, 160)), contains("got mxfp4-16"));
  CHECK_THAT(refused(tetromino::packed<tetromino::mbs<tetromino::mxfp4, 128>>({}, 2, 96, 160)),
             contains("got mxfp4-32 with macro blocks"));
  CHECK(calls == 1);
}

TEST_CASE("cuda: grouped_matmul hands rows, weights and options on") {
  fixture f;
  cuda::matmul_options options;
  options.settled_weights = true;
  calls = 0;
  // four matrices of two rows, each row four elements past the one before it
  std::vector<bfloat16> apart(8 * 164);
  batch_view<const bfloat16> x(apart.data(), 4, 2, 160);
  x.row_stride = 164, x.matrix_stride = 328;
  tetromino::grouped_matmul(the_stream, x, f.weights(), f.offsets, matrix_view<bfloat16>(f.out.data(), 8, 96), options);
  REQUIRE(calls == 1);
  CHECK(multiplied.x.data == apart.data());
  CHECK(multiplied.x.rows == 8);
  CHECK(multiplied.x.row_stride == 164);
  CHECK(multiplied.row_offsets == f.offsets.data());
  CHECK(multiplied.weights == f.weights().data.data());
  CHECK(multiplied.shape == f.shape);
  CHECK(multiplied.options.settled_weights);
  CHECK_FALSE(multiplied.portable);

  x.matrix_stride = 400;
  CHECK_THAT(message(tetromino::try_grouped_matmul(the_stream, x, f.weights(), f.offsets,
                                                   matrix_view<bfloat16>(f.out.data(), 8, 96))),
             contains("400 elements apart"));
  CHECK(calls == 1);
}

TEST_CASE("cuda: products say what does not fit") {
  fixture f;
  calls = 0;
  const matrix_view<const bfloat16> x(f.x.data(), 8, 160);
  const matrix_view<bfloat16> out(f.out.data(), 8, 96);
  const auto grouped = [&](const auto& w, std::span<const std::uint32_t> offsets, const auto&... more) {
    return message(tetromino::try_grouped_matmul(the_stream, x, w, offsets, out, more...));
  };
  CHECK_THAT(message(tetromino::try_matmul(the_stream, x, f.weights(), out)),
             contains("one weight matrix, got 2") && contains("grouped_matmul"));
  CHECK_THAT(grouped(f.weights(), std::span(f.offsets).first(2)), contains("3 row offsets, got 2"));
  auto w = f.weights();
  w.data = w.data.first(128);
  CHECK_THAT(grouped(w, f.offsets), contains("got 128"));
  w = f.weights(), w.shape.cols = 224;
  CHECK_THAT(grouped(w, f.offsets), contains("160 columns, the weights 224"));
  w = f.weights(), w.shape.gating = cuda::gating_rows::halves;
  CHECK_THAT(grouped(w, f.offsets), contains("the product is [8, 48], the output [8, 96]"));
  const std::vector<float> bias(96);
  cuda::matmul_options options;
  options.bias = bias;
  CHECK_THAT(grouped(f.weights(), f.offsets, options), contains("bias needs 192 entries") && contains("got 96"));
  CHECK_THROWS_AS(tetromino::matmul(the_stream, x, f.weights(), out), tetromino::error);
  CHECK(calls == 0);

  w = f.weights(), w.shape.matrices = 1, w.data = w.data.first(w.shape.bytes());
  const cuda::repacked_view<bfloat16> read_only = w;
  tetromino::matmul(the_stream, x, read_only, out);
  CHECK(calls == 1);
  CHECK(multiplied.row_offsets == nullptr);
}

TEST_CASE("cuda: quantize_e4m3_to says what does not fit, and hands rows on") {
  std::vector<bfloat16> numbers(5 * 200);
  tetromino::e4m3_matrix out(4, 150);
  const batch_view<const bfloat16> x(numbers.data(), 2, 2, 150, 200, 500);
  calls = 0;
  tetromino::quantize_e4m3_to(the_stream, x, out.view());
  REQUIRE(calls == 1);
  CHECK(rounded.in.data == numbers.data());
  CHECK((rounded.in.matrices == 2 && rounded.in.row_stride == 200 && rounded.in.matrix_stride == 500));
  CHECK((rounded.out.values.data() == out.values.data() && rounded.out.scales.data() == out.scales.data()));

  out.values.resize(out.values.size() + 8);
  auto view = tetromino::e4m3_view<std::uint8_t>{4, 150, std::span(out.values).subspan(8), out.scales};
  CHECK_THAT(message(tetromino::try_quantize_e4m3_to(the_stream, x, view), errc::invalid_argument),
             contains("multiple of 16 bytes"));
  view = {4, 150, std::span(out.values).first(4 * 150), out.scales};
  CHECK_THAT(message(tetromino::try_quantize_e4m3_to(the_stream, x, view)), contains("values need 1024 entries"));
  view = {3, 150, std::span(out.values).first(3 * 256), std::span(out.scales).first(3)};
  CHECK_THAT(message(tetromino::try_quantize_e4m3_to(the_stream, x, view)), contains("the input is [4, 150]"));
  const std::size_t many = (std::size_t{1} << 31) / 8;
  std::uint8_t* const nothing = nullptr;
  const batch_view<const bfloat16> tall(numbers.data(), 1, many, 128, 128, 0);
  const tetromino::e4m3_view<std::uint8_t> room{many, 128, {nothing, many * 128}, {out.scales.data(), many}};
  CHECK_THAT(message(tetromino::try_quantize_e4m3_to(the_stream, tall, room)), contains("fewer than 2^35 elements"));
  CHECK_THROWS_AS(tetromino::quantize_e4m3_to(the_stream, x, view), tetromino::error);
  CHECK(calls == 1);
}

TEST_CASE("cuda: products of e4m3 activations hand on what they are made of, and say what does not fit") {
  fixture f;
  calls = 0;
  std::vector<std::byte> bytes(8 * 256 + 16);
  void* at = bytes.data();
  std::size_t left = bytes.size();
  auto* const values = static_cast<std::uint8_t*>(std::align(16, 8 * 256, at, left));
  std::array<float, 8> scales{};
  const tetromino::e4m3_view<std::uint8_t> x{8, 160, {values, 8 * 256}, scales};
  const matrix_view<bfloat16> out(f.out.data(), 8, 96);
  cuda::matmul_options options;
  options.settled_weights = true;
  tetromino::grouped_matmul(the_stream, x, f.weights<e4m3>(), f.offsets, out, options);
  REQUIRE(calls == 1);
  CHECK(multiplied_e4m3.x.values.data() == values);
  CHECK(multiplied_e4m3.x.scales.data() == scales.data());
  CHECK(multiplied_e4m3.row_count == 8);
  CHECK(multiplied_e4m3.row_offsets == f.offsets.data());
  CHECK(multiplied_e4m3.weights == f.weights().data.data());
  CHECK(multiplied_e4m3.shape == f.shape);
  CHECK(multiplied_e4m3.out.data == f.out.data());
  CHECK(multiplied_e4m3.options.settled_weights);

  auto one = f.weights<e4m3>();
  one.shape.matrices = 1, one.data = one.data.first(one.shape.bytes());
  tetromino::matmul(the_stream, tetromino::e4m3_view<>(x), one, out);
  REQUIRE(calls == 2);
  CHECK(multiplied_e4m3.row_offsets == nullptr);

  const auto grouped = [&](const tetromino::e4m3_view<>& of, const auto& w, errc code) {
    return message(tetromino::try_grouped_matmul(the_stream, of, w, f.offsets, out), code);
  };
  const auto of_format = [&](const tetromino::any_format& format) {
    const cuda::repacked_shape shape{format, 2, 96, 160};
    f.memory.resize(shape.bytes() + 256);
    return grouped(x, cuda::repacked_view<e4m3>{shape, f.room(shape.bytes())}, errc::invalid_argument);
  };
  CHECK_THAT(of_format(tetromino::nvfp4{}), contains("mxfp4-32 weights without macro blocks, got nvfp4"));
  CHECK_THAT(of_format(tetromino::mxfp4_16{}), contains("mxfp4-32 weights without macro blocks, got mxfp4-16"));
  CHECK_THAT(of_format(tetromino::mbs<tetromino::mxfp4, 128>{}), contains("got mxfp4-32 with macro blocks"));
  CHECK_THAT(of_format(tetromino::mbs<tetromino::mxfp4, 16, 2>{}), contains("got mxfp4-32 with macro blocks"));

  auto torn = x;
  torn.scales = torn.scales.first(7);
  CHECK_THAT(grouped(torn, f.weights<e4m3>(), errc::shape_mismatch), contains("scales need 8 entries, got 7"));
  torn = x, torn.values = torn.values.first(8 * 160);
  CHECK_THAT(grouped(torn, f.weights<e4m3>(), errc::shape_mismatch), contains("values need 2048 entries, got 1280"));
  torn = x, torn.cols = 130;
  CHECK_THAT(grouped(torn, f.weights<e4m3>(), errc::shape_mismatch), contains("130 columns, the weights 160"));
  torn = x, torn.values = {values + 8, 8 * 256};
  CHECK_THAT(grouped(torn, f.weights<e4m3>(), errc::invalid_argument), contains("multiple of 16 bytes"));
  CHECK(calls == 2);
}
