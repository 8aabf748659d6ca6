#include "check.hpp"

#include <tetromino/block_scaled.hpp>
#include <tetromino/thread_executor.hpp>

#include <tetromino/dequantize.hpp>
#include <tetromino/detail/block_scaled_fragment.hpp>
#include <tetromino/quantize.hpp>

#include "reference/block_scaled.hpp"
#include "reference/layouts.hpp"
#include "reference/safetensors_reader.hpp"

#include <algorithm>  // std::fill, std::max, std::min
#include <cmath>      // std::fabs, std::ldexp
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <cstring>    // std::memcpy
#include <random>     // std::mt19937_64
#include <string>     // std::string
#include <vector>     // std::vector

using bytes = std::vector<std::uint8_t>;
using tetromino::any_format;
using tetromino::block_scaled_kind;
using tetromino::errc;
using tetromino::mxfp4;
using tetromino::mxfp4_16;
using tetromino::nvfp4;
using tetromino::packed;
using tetromino_test::contains;

namespace {

struct dims {
  std::size_t matrices, rows, cols;
};
const std::vector<dims> shapes{{1, 1, 64}, {1, 128, 128}, {2, 129, 192}, {3, 5, 320},  {1, 300, 64},
                               {2, 7, 96}, {1, 33, 160},  {1, 2, 16},    {1, 3, 50},   {2, 1, 1},
                               {2, 0, 64}, {0, 3, 64},    {1, 4, 0},     {1, 16, 2880}};

/// Random codes, and scale bytes from `low` to `high`.
packed<any_format> random_storage(const any_format& format, dims d, unsigned low, unsigned high,
                                  std::size_t tensor_scales = 1) {
  std::mt19937_64 random(tetromino_test::seed() + d.rows * 7 + d.cols);
  packed<any_format> out(format, d.matrices, d.rows, d.cols, tensor_scales);
  const std::size_t row_bytes = out.shape().code_bytes_per_row();
  for (std::size_t i = 0; i < out.codes.size(); ++i) {
    const std::size_t k = i % row_bytes * 2;  // packed storage has zeros past the last column
    const auto code = static_cast<unsigned>(random());
    out.codes[i] = static_cast<std::uint8_t>((k < d.cols ? code & 15u : 0u) | (k + 1 < d.cols ? code & 240u : 0u));
  }
  for (auto& scale : out.scales) scale = static_cast<std::uint8_t>(low + random() % (high - low + 1));
  for (auto& scale : out.tensor_scales) scale = 1e-3f + static_cast<float>(random() % 1000) * 1e-5f;
  return out;
}

unsigned code_at(const packed<any_format>& p, std::size_t e, std::size_t r, std::size_t k) {
  const std::uint8_t pair = p.view().row_codes(e, r)[k / 2];
  return k % 2 == 0 ? pair & 15u : pair >> 4;
}
std::uint8_t scale_at(const packed<any_format>& p, std::size_t e, std::size_t r, std::size_t k) {
  return p.view().row_scales(e, r)[k / p.format.block];
}
bool is_zero_block(const packed<any_format>& p, std::size_t e, std::size_t r, std::size_t k) {
  const std::size_t first = k / p.format.block * p.format.block;
  for (std::size_t i = first; i < std::min(p.cols, first + p.format.block); ++i) {
    if (code_at(p, e, r, i) % 8 != 0) return false;
  }
  return true;
}

/// An operand's bytes, one by one, from the documents: what must lie at each place.
struct expected_operand {
  bytes codes, scales;
  std::vector<double> factors;
};
expected_operand expected(const packed<any_format>& p, block_scaled_kind kind) {
  const std::size_t block = kind == block_scaled_kind::e4m3_16 ? 16 : 32, padded = (p.cols + 63) / 64 * 64;
  const bool is_nv = p.format.scale == tetromino::scale_type::e4m3;
  const bool is_rebased = !is_nv && kind == block_scaled_kind::e4m3_16;
  expected_operand out;
  for (std::size_t e = 0; e < p.matrices; ++e) {
    for (std::size_t r = 0; r < p.rows; ++r) {
      for (std::size_t k = 0; k < padded; k += 2) {
        const unsigned low = k < p.cols ? code_at(p, e, r, k) : 0, high = k + 1 < p.cols ? code_at(p, e, r, k + 1) : 0;
        out.codes.push_back(static_cast<std::uint8_t>(low | high << 4));
      }
    }
    double largest = 0;
    for (std::size_t r = 0; r < p.rows; ++r) {
      for (std::size_t k = 0; k < p.cols; k += p.format.block) {
        if (scale_at(p, e, r, k) == 255 || is_zero_block(p, e, r, k)) continue;
        largest = std::max(largest, reference::e8m0_value(scale_at(p, e, r, k)));
      }
    }
    const double factor = is_nv ? static_cast<double>(p.view().tensor_scale(e)) : largest == 0 ? 1 : largest / 256;
    if (kind == block_scaled_kind::e4m3_16) out.factors.push_back(factor);

    // whole tiles, padding zero
    const std::size_t per_row = (padded / block + 3) / 4 * 4, offsets = (p.rows + 127) / 128 * 128 * per_row;
    for (std::size_t at = 0; at < offsets; ++at) {
      const auto [row, inner] = reference::tiled_scale_at(at, per_row);
      std::uint8_t byte = 0;
      if (row < p.rows && inner * block < (p.cols + p.format.block - 1) / p.format.block * p.format.block) {
        const std::uint8_t scale = scale_at(p, e, row, inner * block);
        byte = scale;
        if (is_rebased && scale == 255) {
          byte = 0x7F;
        } else if (is_rebased) {
          byte = 0;
          if (!is_zero_block(p, e, row, inner * block)) {
            while (reference::e4m3_value(byte) * factor < reference::e8m0_value(scale)) ++byte;
            CHECK(reference::e4m3_value(byte) * factor == reference::e8m0_value(scale));
          }
        }
      }
      out.scales.push_back(byte);
    }
  }
  return out;
}

void check_operand(const packed<any_format>& p, block_scaled_kind kind) {
  INFO("[" << p.matrices << ", " << p.rows << ", " << p.cols << "], block " << p.format.block);
  const auto got = tetromino::repack(tetromino::scalar, p, kind);
  const auto want = expected(p, kind);
  CHECK(got.shape == tetromino::block_scaled_shape{kind, p.matrices, p.rows, p.cols});
  CHECK(got.rounded_blocks == 0);
  CHECK(got.codes == want.codes);
  CHECK(got.scales == want.scales);
  REQUIRE(got.factors.size() == want.factors.size());
  for (std::size_t e = 0; e < want.factors.size(); ++e) {
    CHECK(static_cast<double>(got.factors[e]) == want.factors[e]);
  }
}

/// Whether a tensor of the bundled model is what packing is for.
bool is_weight(const std::string& name) {
  return name.find(".attn.") != std::string::npos ||
         (name.find(".moe.") != std::string::npos && name.find("router") == std::string::npos);
}

/// What an operand stands for, [matrices * rows, cols].
std::vector<double> values(const tetromino::block_scaled& op) {
  const auto& s = op.shape;
  std::vector<double> out;
  for (std::size_t e = 0; e < s.matrices; ++e) {
    const auto one = op.view()[e];
    for (std::size_t r = 0; r < s.rows; ++r) {
      for (std::size_t k = 0; k < s.cols; ++k) {
        const unsigned code = one.codes[r * s.code_bytes_per_row() + k / 2] >> (k % 2 * 4) & 15u;
        const std::uint8_t scale =
            one.scales[reference::swizzled_scale(r, k / s.block(), (s.scales_per_row() + 3) / 4 * 4)];
        const double factor = one.factors.empty() ? 1.0 : static_cast<double>(one.factors[0]);
        const double unit =
            s.kind == block_scaled_kind::e4m3_16 ? reference::e4m3_value(scale) : reference::e8m0_value(scale);
        out.push_back(factor * unit * reference::e2m1_value(code));
      }
    }
  }
  return out;
}

}  // namespace

TEST_CASE("block_scaled: each byte of an operand lies where the documents say") {
  for (const dims d : shapes) {
    check_operand(random_storage(nvfp4{}, d, 0, 0x7F), block_scaled_kind::e4m3_16);
    check_operand(random_storage(nvfp4{}, d, 0, 0x7F, d.matrices), block_scaled_kind::e4m3_16);
    check_operand(random_storage(mxfp4{}, d, 0, 255), block_scaled_kind::e8m0_32);
    for (const any_format format : {any_format(mxfp4{}), any_format(mxfp4_16{})}) {
      check_operand(random_storage(format, d, 110, 127), block_scaled_kind::e4m3_16);
      check_operand(random_storage(format, d, 0, 8), block_scaled_kind::e4m3_16);
      check_operand(random_storage(format, d, 237, 254), block_scaled_kind::e4m3_16);
      auto with_nan = random_storage(format, d, 238, 255);
      check_operand(with_nan, block_scaled_kind::e4m3_16);
    }
  }
}

TEST_CASE("block_scaled: blocks of zeros do not widen the range of a matrix's scales") {
  for (const any_format format : {any_format(mxfp4{}), any_format(mxfp4_16{})}) {
    auto p = random_storage(format, {2, 9, 256}, 120, 137);
    for (std::size_t i = 0; i < p.scales.size(); i += 3) {
      p.scales[i] = i % 2 == 0 ? 0 : 254;
      for (std::size_t j = 0; j < format.block / 2; ++j) p.codes[i * format.block / 2 + j] &= 0x88;
    }
    check_operand(p, block_scaled_kind::e4m3_16);
    for (auto& code : p.codes) code = 0x80;
    check_operand(p, block_scaled_kind::e4m3_16);
  }
}

TEST_CASE("block_scaled: an operand stands for the values of the packed storage") {
  for (const any_format format : {any_format(nvfp4{}), any_format(mxfp4{}), any_format(mxfp4_16{})}) {
    const bool is_nv = format == any_format(nvfp4{});
    auto p = random_storage(format, {2, 130, 96}, is_nv ? 0 : 119, is_nv ? 0x7E : 136, 2);
    for (auto& scale : p.tensor_scales) scale = 0.03125f;
    const std::vector<float> unpacked = tetromino::dequantize<float>(tetromino::scalar, p).data;
    const std::vector<double> got = values(tetromino::repack(tetromino::scalar, p, block_scaled_kind::e4m3_16));
    REQUIRE(got.size() == unpacked.size());
    std::size_t different = 0;
    for (std::size_t i = 0; i < got.size(); ++i) different += got[i] != static_cast<double>(unpacked[i]) ? 1u : 0u;
    CHECK(different == 0);
  }
}

TEST_CASE("block_scaled: scales past the range of E4M3 take low bits from codes, and are counted") {
  for (const any_format format : {any_format(mxfp4{}), any_format(mxfp4_16{})}) {
    auto p = random_storage(format, {1, 40, 128}, 100, 130);
    p.scales[5] = 130, p.codes[5 * format.block / 2] = 0x33;
    const auto op = tetromino::repack(tetromino::scalar, p, block_scaled_kind::e4m3_16);
    const std::vector<float> unpacked = tetromino::dequantize<float>(tetromino::scalar, p).data;
    const std::vector<double> got = values(op);
    const double largest = std::ldexp(1.0, 3);
    std::size_t rounded = 0;
    for (std::size_t i = 0; i < got.size(); i += format.block) {
      bool is_exact = true;
      for (std::size_t k = i; k < i + format.block; ++k) {
        const double error = std::fabs(got[k] - static_cast<double>(unpacked[k]));
        is_exact = is_exact && error == 0;
        CHECK(error <= std::ldexp(largest, -19));
      }
      rounded += is_exact ? 0u : 1u;
    }
    CHECK(rounded > 0);
    CHECK(op.rounded_blocks == rounded);
  }
  // to nearest, ties to the even code: 6, 4, 3, 2, 1.5, 1, 0.5 divided by 2, 4 ...
  const bytes codes{0x67, 0x45, 0x23, 0x81};
  CHECK(tetromino::detail::shifted_codes(codes[0], 1) == 0x45);
  CHECK(tetromino::detail::shifted_codes(codes[1], 1) == 0x23);
  CHECK(tetromino::detail::shifted_codes(codes[2], 1) == 0x12);
  CHECK(tetromino::detail::shifted_codes(codes[3], 1) == 0x80);
  CHECK(tetromino::detail::shifted_codes(codes[0], 3) == 0x12);
  for (unsigned shift = 6; shift < 300; ++shift) CHECK(tetromino::detail::shifted_codes(0x7F, shift) == 0x08);
}

TEST_CASE("block_scaled: a real model's MXFP4 becomes operands of kind e4m3_16 without rounding") {
  const auto file = reference::read_safetensors(tetromino_test::data_file("moe-16x2.safetensors"));
  std::size_t matrices = 0;
  for (const auto& [name, tensor] : file.tensors) {
    if (!is_weight(name)) continue;
    const std::size_t rank = tensor.shape.size();
    tetromino::matrix<tetromino::bfloat16> w(rank == 3 ? tensor.shape[0] : 1, tensor.shape[rank - 2],
                                             tensor.shape[rank - 1]);
    REQUIRE(tensor.bytes.size() == w.data.size() * sizeof w.data[0]);
    std::memcpy(w.data.data(), tensor.bytes.data(), tensor.bytes.size());
    for (const char* recipe : {"mxfp4-32/oas", "mxfp4-16/oas"}) {
      const auto p = tetromino::quantize(tetromino::scalar, w, tetromino::recipe::parse(recipe));
      CHECK(tetromino::repack(tetromino::scalar, p, block_scaled_kind::e4m3_16).rounded_blocks == 0);
    }
    matrices += w.matrices;
  }
  CHECK(matrices > 100);
}

TEST_CASE("block_scaled: what cannot be an operand is an error that says so") {
  const auto fails = [](const packed<any_format>& p, block_scaled_kind kind, errc code, const char* says) {
    const auto got = tetromino::try_repack(tetromino::scalar, p, kind);
    REQUIRE(!got);
    CHECK(got.error().code() == code);
    CHECK_THAT(got.error().what(), contains(says));
  };
  const dims d{1, 4, 128};
  const any_format macros(tetromino::scale_type::e8m0, 32, 128);
  fails(random_storage(macros, d, 100, 110), block_scaled_kind::e4m3_16, errc::invalid_argument,
        "factors of 8 bits for 128 elements");
  fails(random_storage(macros, d, 100, 110), block_scaled_kind::e8m0_32, errc::invalid_argument,
        "factors of 8 bits for 128 elements");
  fails(random_storage(nvfp4{}, d, 1, 9), block_scaled_kind::e8m0_32, errc::invalid_argument, "made of mxfp4-32");
  fails(random_storage(mxfp4_16{}, d, 1, 9), block_scaled_kind::e8m0_32, errc::invalid_argument, "kind e4m3_16 takes");
  fails(random_storage(nvfp4{}, d, 0x80, 0x80), block_scaled_kind::e4m3_16, errc::invalid_argument, "got code 128");
  auto broken = random_storage(nvfp4{}, d, 1, 9);
  broken.scales.pop_back();
  fails(broken, block_scaled_kind::e4m3_16, errc::shape_mismatch, "scales needs 32 entries, got 31");

  const auto p = random_storage(nvfp4{}, d, 1, 9);
  auto out = tetromino::repack(tetromino::scalar, p, block_scaled_kind::e4m3_16);
  auto view = out.view();
  view.shape.rows = 5;
  CHECK_THAT(tetromino::try_repack_to(tetromino::scalar, p, view).error().what(), contains("the operand [1, 5, 128]"));
  view = out.view(), view.codes = view.codes.first(8);
  CHECK_THAT(tetromino::try_repack_to(tetromino::scalar, p, view).error().what(),
             contains("codes needs 256 entries, got 8"));
  view = out.view(), view.scales = view.scales.first(8);
  CHECK_THAT(tetromino::try_repack_to(tetromino::scalar, p, view).error().what(),
             contains("scales needs 1024 entries, got 8"));
  view = out.view(), view.factors = {};
  CHECK_THAT(tetromino::try_repack_to(tetromino::scalar, p, view).error().what(),
             contains("factors needs 1 entries, got 0"));
  view = out.view();
  std::fill(out.codes.begin(), out.codes.end(), std::uint8_t{0xA5});
  std::fill(out.scales.begin(), out.scales.end(), std::uint8_t{0xA5});
  CHECK(tetromino::repack_to(tetromino::scalar, p, view) == 0);
  CHECK(out.codes == tetromino::repack(tetromino::scalar, p, block_scaled_kind::e4m3_16).codes);
  CHECK(out.scales == tetromino::repack(tetromino::scalar, p, block_scaled_kind::e4m3_16).scales);
}

TEST_CASE("block_scaled: threads share out matrices, with the same outcome") {
  const auto p = random_storage(any_format(tetromino::mxfp4{}), {7, 40, 128}, 0, 254);
  const tetromino::thread_executor threads(3);
  const auto alone = tetromino::repack(tetromino::scalar, p, block_scaled_kind::e4m3_16);
  const auto shared = tetromino::repack(tetromino::scalar.on(threads), p, block_scaled_kind::e4m3_16);
  CHECK(alone.rounded_blocks > 0);
  CHECK(shared.rounded_blocks == alone.rounded_blocks);
  CHECK(shared.codes == alone.codes);
  CHECK(shared.scales == alone.scales);
  CHECK(shared.factors == alone.factors);
}

TEST_CASE("block_scaled: registers gathered by the fragment rules give the product") {
  namespace detail = tetromino::detail;
  for (const bool is_mx : {false, true}) {
    const auto kind = is_mx ? block_scaled_kind::e8m0_32 : block_scaled_kind::e4m3_16;
    const any_format format = is_mx ? any_format(mxfp4{}) : any_format(nvfp4{});
    const unsigned low = is_mx ? 120 : 0, high = is_mx ? 135 : 0x7E;
    // 16 rows and 8 rows from the middle of larger operands, so that scales of several tiles take part
    constexpr std::size_t first_a = 48, first_b = 136, K = 256;
    const auto a = tetromino::repack(tetromino::scalar, random_storage(format, {1, 70, K}, low, high), kind);
    const auto b = tetromino::repack(tetromino::scalar, random_storage(format, {1, 150, K}, low, high), kind);
    const std::vector<double> of_a = values(a), of_b = values(b);
    const auto word = [](const tetromino::block_scaled& op, std::size_t r, std::size_t w) {
      std::uint32_t out = 0;
      std::memcpy(&out, op.codes.data() + r * op.shape.code_bytes_per_row() + w * 4, 4);
      return out;
    };
    const auto scales = [](const tetromino::block_scaled& op, std::size_t r, std::size_t k) {
      std::uint32_t out = 0;
      const std::size_t quad = k / op.shape.block() / 4 * 4;
      std::memcpy(&out, op.scales.data() + tetromino::layout::swizzled_offset(r, quad, op.shape.scales_per_row()), 4);
      return out;
    };
    double sums[16][8] = {};
    for (std::size_t k = 0; k < K; k += 64) {
      reference::block_scaled_mma mma;
      mma.ue8m0 = is_mx;
      mma.byte_id = is_mx && k % 128 != 0 ? 2 : 0;  // two of the four scales in a word belong to 64 columns
      for (std::uint32_t lane = 0; lane < 32; ++lane) {
        for (std::uint32_t i = 0; i < 4; ++i) {
          mma.a[lane][i] = word(a, first_a + detail::a_fragment_row(lane, i), k / 8 + detail::a_fragment_word(lane, i));
        }
        for (std::uint32_t i = 0; i < 2; ++i) {
          mma.b[lane][i] = word(b, first_b + detail::b_fragment_row(lane), k / 8 + detail::b_fragment_word(lane, i));
        }
        mma.scale_a[lane] = lane % 4 < 2 ? scales(a, first_a + detail::a_scale_row(lane), k) : 0xFFFFFFFFu;
        mma.scale_b[lane] = lane % 4 < 1 ? scales(b, first_b + detail::b_scale_row(lane), k) : 0xFFFFFFFFu;
      }
      const auto got = mma.sums();
      for (std::uint32_t lane = 0; lane < 32; ++lane) {
        for (std::uint32_t i = 0; i < 4; ++i) {
          const auto place = detail::sum_fragment(lane, i);
          sums[place.row][place.col] += got[lane][i];
        }
      }
    }
    const double factor = is_mx ? 1.0 : static_cast<double>(a.factors[0]) * static_cast<double>(b.factors[0]);
    for (std::size_t m = 0; m < 16; ++m) {
      for (std::size_t n = 0; n < 8; ++n) {
        double want = 0, size = 0;
        for (std::size_t k = 0; k < K; ++k) {
          const double product = of_a[(first_a + m) * K + k] * of_b[(first_b + n) * K + k];
          want += product, size += std::fabs(product);
        }
        CHECK(std::fabs(sums[m][n] * factor - want) <= size * 1e-12);
      }
    }
  }
}
