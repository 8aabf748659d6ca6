#pragma once

#include "chunk.cuh"   // chunk
#include "rotate.cuh"  // rotated_chunk
#include "args.cuh"    // pack_args

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint32_t
#include <type_traits>  // std::conditional_t

/// How kernels that pack find and read their elements.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The elements of a thread block that packs the transpose in the same pass: `cols` of the output by 4096 / cols rows,
/// read along the rows of the input. The output's element [row, col] is the input's [col, row]. They wait in shared
/// memory as a chunk has them, in words of one or two columns.
template <real T>
struct transposed_tile {
  static constexpr std::uint32_t in_word = 4 / sizeof(T), at_once = 16 / sizeof(T);
  static constexpr std::uint32_t words = 4096 / in_word + 512;
  std::uint32_t* word;  ///< [words], shared memory

  /// Reads the tile at [first_row, first_col] of the output, and gives a thread its chunk, at [row, col] in the tile.
  __device__ void load(const pack_args& args, std::uint32_t cols, std::uint32_t first_row, std::uint32_t first_col,
                       std::uint32_t row, std::uint32_t col, chunk<T>& x) const {
    const std::uint32_t rows = 4096 / cols;
    const std::uint32_t matrix = args.rows.by_rows.quotient(first_row);
    const std::uint32_t in_matrix = first_row - matrix * args.rows.by_rows.divisor;
    const T* const from = static_cast<const T*>(args.in.data) + matrix * args.rows.matrix_stride + in_matrix;
    const bool is_whole = args.in.is_aligned && in_matrix % at_once == 0;
    for (std::uint32_t i = threadIdx.x; i < 4096 / (in_word * at_once); i += 256) {
      const std::uint32_t u = i / (rows / at_once), r = i % (rows / at_once) * at_once;
      std::uint32_t of[in_word][4];  // sixteen bytes of each input row
#pragma unroll
      for (std::uint32_t k = 0; k < in_word; ++k) {
        const std::uint32_t c = first_col + u * in_word + k;
        const T* const there = from + c * args.rows.row_stride + r;
        const std::uint32_t left = c < args.rows.cols && in_matrix + r < args.rows.by_rows.divisor
                                       ? args.rows.by_rows.divisor - in_matrix - r
                                       : 0;
        if (is_whole && left >= at_once) {
          const uint4 four = __ldg(reinterpret_cast<const uint4*>(there));
          of[k][0] = four.x, of[k][1] = four.y, of[k][2] = four.z, of[k][3] = four.w;
        } else {
#pragma unroll
          for (std::uint32_t w = 0; w < 4; ++w) {
            if constexpr (sizeof(T) == 4) {
              of[k][w] = w < left ? bit_cast<std::uint32_t>(there[w]) : 0;
            } else {
              const std::uint32_t low = 2 * w < left ? there[2 * w].bits : 0;
              of[k][w] = low | (2 * w + 1 < left ? std::uint32_t{there[2 * w + 1].bits} << 16 : 0);
            }
          }
        }
      }
      std::uint32_t* const to = word + place(u, rows) + r;
#pragma unroll
      for (std::uint32_t w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
          to[w] = of[0][w];
        } else {
          to[2 * w] = __byte_perm(of[0][w], of[1][w], 0x5410);
          to[2 * w + 1] = __byte_perm(of[0][w], of[1][w], 0x7632);
        }
      }
    }
    __syncthreads();
    const std::uint32_t* const own = word + place(col / in_word, rows) + row;
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_words<T>; ++i) x.word[i] = own[i * (rows + 1)];
  }

 private:
  /// Where column u of words starts, with gaps that spread what a warp reads, or writes, over the banks.
  [[nodiscard]] static __device__ std::uint32_t place(std::uint32_t u, std::uint32_t rows) {
    return u * (rows + 1) + u / 32 * 4;
  }
};

/// How a kernel finds its elements: as one row of whole blocks in whole chunks, row by row, or along the columns.
enum class pack_source : std::uint8_t { flat, rows, transposed };

/// Words of shared memory that load_chunk needs for elements of type T; void: of any type, since one block has them.
template <pack_source Source, class T>
inline constexpr std::uint32_t load_words = Source == pack_source::transposed ? transposed_tile<T>::words : 1;
template <pack_source Source>
inline constexpr std::uint32_t load_words<Source, void> = load_words<Source, float>;

/// Which elements a thread has: `used` of them, from column `col` on, `row` counted through all matrices.
struct chunk_place {
  std::size_t chunk = 0;
  std::uint32_t row = 0, col = 0, used = 0, matrix = 0;
  bool is_there = false;  ///< in a row that exists

  /// Where element i lies in the input, in reading order.
  template <pack_source Source>
  [[nodiscard]] __device__ std::size_t position(const pack_args& args, std::uint32_t i) const {
    if constexpr (Source == pack_source::flat) return chunk * chunk_size + i;
    const std::size_t cols = args.rows.cols;
    if constexpr (Source == pack_source::rows) return row * cols + col + i;
    const std::uint32_t in_matrix = row - matrix * args.rows.by_rows.divisor;
    return (matrix * cols + col + i) * args.rows.by_rows.divisor + in_matrix;
  }
};

/// Finds and reads a thread's sixteen elements; those that do not exist are zero. `room` has load_words.
template <pack_source Source, real T>
[[nodiscard]] __device__ chunk_place load_chunk(const pack_args& args, std::uint32_t* room, chunk<T>& x) {
  const T* const in = static_cast<const T*>(args.in.data);
  chunk_place at;
  at.chunk = static_cast<std::size_t>(blockIdx.x) * 256 + threadIdx.x;
  if constexpr (Source == pack_source::flat) {
    if (at.chunk < args.chunks) {
      at.used = chunk_size;
      x.load(in + at.chunk * chunk_size);
    } else {
      x.clear();
    }
  } else if constexpr (Source == pack_source::transposed) {
    const transposed_tile<T> tile{room};
    // Neighbouring blocks read neighbouring parts of the same rows of the input.
    const std::uint32_t rows = 4096 / args.in.tile_cols, row_tiles = (args.rows.by_rows.divisor + rows - 1) / rows;
    const std::uint32_t tiles_of_matrix = args.rows.chunks_per_row * 16 / args.in.tile_cols * row_tiles;
    at.matrix = blockIdx.x / tiles_of_matrix;
    const std::uint32_t number = blockIdx.x - at.matrix * tiles_of_matrix, tile_row = number % row_tiles;
    const std::uint32_t in_tile = threadIdx.x / (args.in.tile_cols / 16);
    const std::uint32_t first_col = number / row_tiles * args.in.tile_cols;
    at.row = at.matrix * args.rows.by_rows.divisor + tile_row * rows;
    at.col = threadIdx.x % (args.in.tile_cols / 16) * 16;
    tile.load(args, args.in.tile_cols, at.row, first_col, in_tile, at.col, x);
    at.row += in_tile, at.col += first_col;
    if (tile_row * rows + in_tile < args.rows.by_rows.divisor) {
      at.is_there = true;
      if (at.col < args.rows.cols) at.used = min(chunk_size, args.rows.cols - at.col);
    }
  } else {
    const bool exists = at.chunk < args.chunks;
    at.is_there = exists;
    const auto number = exists ? static_cast<std::uint32_t>(at.chunk) : 0u;
    at.row = args.rows.by_chunks.quotient(number);
    at.col = (number - at.row * args.rows.chunks_per_row) * chunk_size;
    if (exists && at.col < args.rows.cols) at.used = min(chunk_size, args.rows.cols - at.col);
    at.matrix = args.rows.by_rows.quotient(at.row);
    const T* from = in + args.rows.offset(at.row) + at.col;
    if (at.used == chunk_size && args.in.is_aligned) {
      x.load(from);
    } else {
      x.load_some(from, at.used);
    }
  }
  return at;
}

/// What a rotated value beyond the floats becomes where special values saturate.
enum class overflowed : std::uint8_t {
  largest,  ///< the largest float: what is packed
  zero,     ///< nothing: tensor scales come from the values that are finite
};

/// The elements to pack, rotated if that is asked for, as the special-value policy admits them; their largest magnitude
/// goes to `largest`, and the first refused value is reported. All lanes of a warp call it together.
template <pack_source Source, bool Rotated, overflowed Overflowed = overflowed::largest, real T>
[[nodiscard]] __device__ chunk<std::conditional_t<Rotated, float, T>> admit_chunk(const pack_args& args,
                                                                                  const chunk_place& at, chunk<T>& x,
                                                                                  std::uint32_t& largest) {
  const auto admit = [&](auto& y, std::uint32_t infinity, overflowed to) {  // false if it refuses
    largest = y.largest();
    if (largest < infinity) return true;
    if (args.rules.special == special_values::saturate) {
      to == overflowed::zero ? y.clear_special() : y.saturate();
      largest = y.largest();
    }
    return args.rules.special != special_values::reject;
  };
  const bool is_admitted = admit(x, infinity_bits<T>, overflowed::largest);
  if (!is_admitted) report_rejection(args.rejected, at.position<Source>(args, x.first_special()));
  if constexpr (Rotated) {
    const bool is_spread = any_in_block(args.rotation, !is_admitted);  // a refused value is in all of its block now
    rotated_chunk rotated = as_floats(x);
    rotated.rotate(args.rotation, at.col, args.rows.cols);
    auto y = as_chunk<float>(rotated);
    if (!admit(y, infinity_bits<float>, Overflowed) && !is_spread) {
      report_rejection(args.rejected, at.position<Source>(args, y.first_special()));
    }
    return y;
  } else {
    return x;
  }
}

/// A batch whose rows are the columns of x; the strides are still those of x.
template <class T>
[[nodiscard]] batch_view<T> transposed(const batch_view<T>& x) {
  batch_view<T> out(x.data, x.matrices, x.cols, x.rows);
  out.row_stride = x.row_stride, out.matrix_stride = x.matrix_stride;
  return out;
}

/// Thread blocks for a transposed input.
[[nodiscard]] inline unsigned transposed_blocks(const pack_args& args) {
  const std::uint32_t of_matrix = args.rows.by_rows.divisor, tile_rows = 4096 / args.in.tile_cols;
  return args.rows.rows / of_matrix * ((of_matrix + tile_rows - 1) / tile_rows) *
         (args.rows.chunks_per_row * 16 / args.in.tile_cols);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
