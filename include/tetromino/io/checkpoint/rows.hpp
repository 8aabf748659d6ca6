#pragma once

#include "../../detail/macros_off.hpp"

#include "../../dequantize.hpp"          // try_dequantize_to
#include "../../detail/float_state.hpp"  // default_float_state
#include "../../e4m3.hpp"                // e4m3
#include "../../e8m0.hpp"                // e8m0
#include "../../matrix.hpp"              // matrix_view
#include "../detail/transpose.hpp"       // transpose
#include "parameters.hpp"                // parameter

#include <algorithm>  // std::min
#include <array>      // std::array
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <cstring>    // std::memcpy
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::io {

/// Rows [first, first + count) of one matrix of a parameter.
struct row_range {
  std::size_t matrix = 0;
  std::size_t first = 0;
  std::size_t count = 0;
};

/// Memory that reading rows needs: keep one for each thread, so that it is made once.
struct row_buffers {
  std::vector<std::uint8_t> bytes;   ///< as stored
  std::vector<std::uint8_t> rows;    ///< turned into rows of K
  std::vector<std::uint8_t> scales;  ///< as stored
  std::vector<float> values;         ///< decoded
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// All values of the E4M3 codes.
inline const std::array<float, 256>& e4m3_values() noexcept {
  static constexpr std::array<float, 256> values = [] {
    std::array<float, 256> out{};
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = e4m3::from_bits(static_cast<std::uint8_t>(i)).value();
    return out;
  }();
  return values;
}

/// A tensor of real numbers as floats.
inline result<std::vector<float>> read_floats(const io::checkpoint& from, const io::checkpoint_tensor& tensor) {
  std::vector<std::uint8_t> bytes(tensor.bytes);
  if (auto read = from.try_read(tensor, 0, bytes); !read) return read.error();
  std::vector<float> out(tensor.elements());
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto as = [&]<class T>(T value) {
      std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
      return value;
    };
    switch (tensor.dtype) {
      case io::dtype::F32:
        out[i] = as(float{});
        break;
      case io::dtype::F16:
        out[i] = static_cast<float>(as(half{}));
        break;
      case io::dtype::BF16:
        out[i] = static_cast<float>(as(bfloat16{}));
        break;
      default:
        out[i] = e8m0::from_bits(bytes[i]).value();
        break;
    }
  }
  return out;
}

/// Reads the bytes of rows that lie in a row.
inline result<std::span<const std::uint8_t>> read_rows(const io::checkpoint& from, const io::checkpoint_tensor& tensor,
                                                       std::size_t row, std::size_t count, std::size_t bytes_per_row,
                                                       std::vector<std::uint8_t>& buffer) {
  buffer.resize(count * bytes_per_row);
  if (auto read = from.try_read(tensor, row * bytes_per_row, buffer); !read) return read.error();
  return std::span<const std::uint8_t>(buffer);
}

/// Calls f with a zero of the type that plain values have, and names the tensor where that is no real type.
template <class F>
result<void> with_plain_type(const io::parameter& p, const F& f) {
  switch (p.values->dtype) {
    case io::dtype::F32:
      return f(float{});
    case io::dtype::F16:
      return f(half{});
    case io::dtype::BF16:
      return f(bfloat16{});
    default:
      return error(errc::invalid_argument,
                   {"tensor ", printable(p.name), ": expected BF16, F16, F32, FP8, MXFP4 or NVFP4, found ",
                    io::name(p.values->dtype)});
  }
}

/// Of a parameter that is stored [.., K, outputs], reads `count` strips from the first-th on, each with the values that
/// a range of rows has at one place of K.
inline result<void> read_strips(const io::checkpoint& from, const io::parameter& p, const io::row_range& range,
                                std::size_t first, std::size_t count, std::span<std::uint8_t> to) {
  const std::size_t size = bits_per_element(p.values->dtype) / 8, strip = range.count * size;
  const std::size_t pieces = range.count == p.rows ? 1 : count;  // whole matrices lie in one piece
  for (std::size_t k = 0; k < pieces; ++k) {
    const std::size_t offset = ((range.matrix * p.cols + first + k) * p.rows + range.first) * size;
    const auto part = to.subspan(k * strip, count / pieces * strip);
    if (auto read = from.try_read(*p.values, offset, part); !read) return read;
  }
  return {};
}

/// Rows of K out of strips that begin `stride` values after one another.
template <real T>
matrix_view<const T> turn_strips(const T* strips, std::size_t stride, std::size_t rows, std::size_t cols,
                                 io::row_buffers& buffers) {
  buffers.rows.resize(rows * cols * sizeof(T));
  auto* const to = reinterpret_cast<T*>(buffers.rows.data());
  transpose(strips, stride, cols, rows, to);
  return {to, rows, cols};
}

template <real T, class F>
result<void> visit_plain(const io::checkpoint& from, const io::parameter& p, const io::row_range& range,
                         io::row_buffers& buffers, const F& f) {
  if (p.kind.is_transposed) {
    buffers.bytes.resize(range.count * p.cols * sizeof(T));
    if (auto read = read_strips(from, p, range, 0, p.cols, buffers.bytes); !read) return read;
    return f(turn_strips(reinterpret_cast<const T*>(buffers.bytes.data()), range.count, range.count, p.cols, buffers));
  }
  const auto bytes =
      read_rows(from, *p.values, range.matrix * p.rows + range.first, range.count, p.cols * sizeof(T), buffers.bytes);
  if (!bytes) return bytes.error();
  return f(matrix_view<const T>(reinterpret_cast<const T*>(bytes->data()), range.count, p.cols));
}

template <class F>
result<void> visit_fp8(const io::checkpoint& from, const io::parameter& p, const io::row_range& range,
                       io::row_buffers& buffers, const F& f) {
  const auto codes = read_rows(from, *p.values, range.first, range.count, p.cols, buffers.bytes);
  if (!codes) return codes.error();
  const auto scales = read_floats(from, *p.scales);
  if (!scales) return scales.error();
  const auto& grid = p.scales->shape;
  const std::size_t grid_rows = scales->size() == 1 || grid.empty() ? 1 : grid[0];
  const std::size_t grid_cols = scales->size() / grid_rows;
  const auto per = [](std::size_t size, std::size_t parts) {  // blocks are powers of two, the last may be short
    if (parts == 1) return size;
    std::size_t block = 1;
    while ((size + block - 1) / block > parts) block *= 2;
    return (size + block - 1) / block == parts ? block : (size + parts - 1) / parts;
  };
  const std::size_t block_rows = per(p.rows, grid_rows), block_cols = per(p.cols, grid_cols);
  buffers.values.resize(range.count * p.cols);
  for (std::size_t r = 0; r < range.count; ++r) {
    const float* const row_scales = scales->data() + (range.first + r) / block_rows * grid_cols;
    for (std::size_t k = 0; k < p.cols; ++k) {
      const std::size_t i = r * p.cols + k;
      buffers.values[i] = e4m3_values()[(*codes)[i]] * row_scales[k / block_cols];
    }
  }
  return f(matrix_view<const float>(buffers.values.data(), range.count, p.cols));
}

/// Rows of a 4-bit parameter as packed storage, with the decode scale of their matrix.
struct packed_rows {
  packed_view<any_format> view;
  float tensor_scale = 1.0f;
};

template <class F>
result<void> visit_packed(const io::checkpoint& from, const io::parameter& p, const io::row_range& range,
                          io::row_buffers& buffers, const F& f) {
  const bool is_nvfp4 = p.encoding == io::value_encoding::nvfp4;
  const any_format format = is_nvfp4 ? any_format(nvfp4{}) : any_format(mxfp4{});
  const packed_shape shape{format, 1, range.count, p.cols};
  const std::size_t row = range.matrix * p.rows + range.first;
  const auto codes = read_rows(from, *p.values, row, range.count, shape.code_bytes_per_row(), buffers.bytes);
  if (!codes) return codes.error();
  const auto scales = read_rows(from, *p.scales, row, range.count, shape.blocks_per_row(), buffers.scales);
  if (!scales) return scales.error();
  float tensor_scale = 1.0f;
  if (is_nvfp4) {
    const auto all = read_floats(from, *p.tensor_scales);
    if (!all) return all.error();
    tensor_scale = (*all)[all->size() == 1 ? 0 : range.matrix];
    if (p.tensor_scales_divide) tensor_scale = 1.0f / tensor_scale;
    if (!(tensor_scale > 0.0f && tensor_scale <= largest<float>)) {
      return error(errc::malformed_file, {"tensor ", printable(p.tensor_scales->name),
                                          ": expected a positive, finite tensor scale, found ", tensor_scale});
    }
  }
  const std::span<const float> one(&tensor_scale, is_nvfp4 ? 1 : 0);
  return f(packed_view<any_format>{format, 1, range.count, p.cols, *codes, *scales, {}, one});
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

/// Reads rows of a weight and calls f(matrix_view<const T> [count, cols]), with T as stored, or float where it is
/// decoded from FP8 or 4-bit codes. f returns result<void>; its error comes back. The rows stay valid within the call.
/// Thread-safe with a row_buffers for each thread. Pre: the parameter is a matrix or a stack of them, and the rows
/// exist.
template <class Policy, class F>
result<void> try_visit_rows(const Policy& policy, const checkpoint& from, const parameter& p, const row_range& range,
                            row_buffers& buffers, const F& f) {
  TETROMINO_EXPECTS(range.matrix < p.matrices && range.first <= p.rows && range.count <= p.rows - range.first,
                    "rows of a parameter lie within it", range.matrix, p.matrices, range.first, p.rows, range.count,
                    p.rows - range.first);
  const detail::default_float_state usual;
  switch (p.encoding) {
    case value_encoding::fp8:
      return detail::visit_fp8(from, p, range, buffers, f);
    case value_encoding::mxfp4:
    case value_encoding::nvfp4:
      return detail::visit_packed(from, p, range, buffers, [&](const packed_view<any_format>& packed) {
        buffers.values.resize(packed.rows * packed.cols);
        const batch_view<float> values(buffers.values.data(), 1, packed.rows, packed.cols);
        if (auto done = try_dequantize_to(policy, packed, values); !done) return done;
        return f(matrix_view<const float>(buffers.values.data(), packed.rows, packed.cols));
      });
    case value_encoding::plain:
      break;
  }
  return detail::with_plain_type(p, [&]<class T>(T) { return detail::visit_plain<T>(from, p, range, buffers, f); });
}

/// try_visit_rows, throwing its error.
template <class Policy, class F>
void visit_rows(const Policy& policy, const checkpoint& from, const parameter& p, const row_range& range,
                row_buffers& buffers, const F& f) {
  try_visit_rows(policy, from, p, range, buffers, [&](const auto& rows) -> result<void> {
    f(rows);
    return {};
  }).value();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
