#pragma once

#include <tetromino/cuda/repacked.hpp>  // activation, gating_rows

#include "../arch/sm80.cuh"  // multiply_by

#include <concepts>  // std::same_as
#include <cstdint>   // std::uint32_t

/// The order of repacked weights, and its decoding.
///
/// A tile is 64 rows by 64 columns: four warps of 16 rows; in a warp, lane l = 4 g + t holds of rows g and g + 8, for
/// each step of 16 columns, the columns 2t, 2t + 1, 2t + 8 and 2t + 9, which is what the tensor cores' A operand wants
/// of it. These eight codes are one word, whose bits are spread so that few instructions bring each to where a 16-bit
/// float keeps its sign, the end of its exponent and the start of its fraction. For activations in E4M3 the lane holds
/// columns 4t to 4t + 3, and the word is one for byte permutes: see e4m3_decoding.
///   tile    codes [warp 4][lane 32][step 4] words, then scales [g 8][warp 4][block][row g, row g + 8] bytes
///   macros  [macro block][g 8][warp 4][row g, row g + 8] bytes
///
/// Factors of 2 bits lie in the tile, in place of macros, one for each eight columns: [g 8][warp 4] of scales
/// [row g, row g + 8][block] bytes, then a word of factors. They are the fraction of the power of two that the scale
/// is, so that one multiplication applies both.
namespace TETROMINO_NAMESPACE::cuda::detail {

enum class weight_kind : std::uint8_t {
  mx32,
  mx16,
  nv,
  mx32_fine,  ///< with factors of 2 bits
};

/// Sizes of a tile: its codes, then its block scales.
template <weight_kind Kind>
struct weight_tile {
  static constexpr bool is_fine = Kind == weight_kind::mx32_fine;
  static constexpr std::uint32_t block = Kind == weight_kind::mx32 || is_fine ? 32 : 16;
  static constexpr std::uint32_t scales_at = 64 * 64 / 2;
  static constexpr std::uint32_t lane_factors = is_fine ? 4 : 0;  ///< bytes behind the scales of a lane
  static constexpr std::uint32_t scale_bytes = 64 * 64 / block + 32 * lane_factors;
  static constexpr std::uint32_t bytes = scales_at + scale_bytes;
  /// What a lane needs of each: the codes of its warp's 16 rows, and the scales of its two rows, factors among them.
  static constexpr std::uint32_t warp_codes = scales_at / 4;
  static constexpr std::uint32_t lane_codes = warp_codes / 32;
  static constexpr std::uint32_t lane_scales = scale_bytes / 32;

  /// Where they start for lane `lane` of the `warp`th 16 rows.
  [[nodiscard]] __device__ static std::uint32_t codes_of(std::uint32_t warp, std::uint32_t lane) {
    return warp * warp_codes + lane * lane_codes;
  }
  [[nodiscard]] __device__ static std::uint32_t scales_of(std::uint32_t warp, std::uint32_t lane) {
    return scales_at + (lane / 4 * 4 + warp) * lane_scales;
  }
};

/// Steps of a tile's columns: each is a product of the tensor cores with an A operand of 16 rows by 32 bytes.
template <class X>
inline constexpr int tile_steps = std::same_as<X, e4m3> ? 2 : 4;

static_assert(weight_tile<weight_kind::mx32>::bytes == repacked_shape{mxfp4{}}.tile_bytes());
static_assert(weight_tile<weight_kind::nv>::bytes == repacked_shape{nvfp4{}}.tile_bytes());
static_assert(weight_tile<weight_kind::mx32_fine>::bytes == repacked_shape{mbs<mxfp4, 16, 2>{}}.tile_bytes());

/// The word of four pairs of codes, each as a byte: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); for E4M3 (g,
/// 4t), (g + 8, 4t), (g, 4t + 2), (g + 8, 4t + 2).
template <repackable T>
[[nodiscard]] __device__ inline std::uint32_t spread_codes(const std::uint32_t (&pair)[4]) {
  std::uint32_t word = 0;
  if constexpr (std::same_as<T, e4m3>) {
#pragma unroll
    for (std::uint32_t i = 0; i < 8; ++i) {
      const std::uint32_t is_high = i / 4, column = i % 4;
      const std::uint32_t code = pair[column / 2 * 2 + is_high] >> column % 2 * 4;
      word |= (code & 7u) << (is_high * 16 + column * 4);
      word |= (code >> 3 & 1u) << (column * 8 + (is_high != 0 ? 3 : 7));
    }
  } else {
    // Bits of the word that hold (fraction, low exponent, high exponent, sign) of the first code of each pair; the
    // second code lies 16 bits higher, around the end.
    constexpr int place_for_bfloat16[4][4] = {{0, 1, 2, 9}, {10, 11, 12, 19}, {4, 5, 6, 13}, {14, 7, 8, 15}};
    constexpr int place_for_half[4][4] = {{0, 1, 2, 6}, {7, 8, 9, 13}, {10, 11, 12, 15}, {3, 4, 5, 14}};
#pragma unroll
    for (int p = 0; p < 4; ++p) {
#pragma unroll
      for (int bit = 0; bit < 4; ++bit) {
        const int at = std::same_as<T, half> ? place_for_half[p][bit] : place_for_bfloat16[p][bit];
        word |= (pair[p] >> bit & 1u) << at % 32;
        word |= (pair[p] >> (4 + bit) & 1u) << (at + 16) % 32;
      }
    }
  }
  return word;
}

/// The four pairs of a word as pairs of T, times 2^-126 for bfloat16 and 2^-14 for half.
template <activation T>
__device__ inline void gather_codes(std::uint32_t word, std::uint32_t (&pair)[4]) {
  if constexpr (std::same_as<T, bfloat16>) {
    constexpr std::uint32_t mask = 0x81C081C0u;
    pair[0] = word << 6 & mask;
    pair[1] = __funnelshift_r(word, word, 4) & mask;
    pair[2] = word << 2 & mask;
    pair[3] = (word & 0x81808180u) | (word >> 8 & 0x00400040u);
  } else {
    constexpr std::uint32_t mask = 0x8E008E00u;
    pair[0] = word << 9 & mask;
    pair[1] = word << 2 & mask;
    pair[2] = (word & 0x80008000u) | (word >> 1 & 0x0E000E00u);
    pair[3] = (word << 6 & 0x0E000E00u) | (word << 1 & 0x80008000u);
  }
}

/// How two of the four scale bytes of a word become multipliers for gathered codes: the even ones shifted up by
/// `even_up`, the odd ones by 8 less, then `mask` and `base`. And the power of two that is then missing from all
/// products.
template <activation T, weight_kind Kind>
struct scale_decoding {
  static constexpr bool is_half = std::same_as<T, half>;
  static constexpr bool is_nv = Kind == weight_kind::nv;
  static constexpr int even_up = is_nv ? (is_half ? 7 : 4) : (is_half ? 10 : 7);
  static constexpr std::uint32_t mask =
      is_nv ? (is_half ? 0x7F807F80u : 0x0FF00FF0u) : (is_half ? 0x7C007C00u : 0x7F807F80u);
  static constexpr std::uint32_t base = is_nv && !is_half ? 0x70007000u : 0;
  static constexpr float missing = is_nv ? (is_half ? 0x1p8f : 0x1p9f) : 1.0f;
  /// Stored bytes are one larger than this for an E4M3 exponent of -9, the least.
  static constexpr std::uint32_t e4m3_bias = is_half ? 11 : 10;
};

/// The multipliers of a word of scale bytes (block 0 of row g, of row g + 8, block 1 of row g, of row g + 8): those of
/// a row as a pair of T, block 0 below. Where there are factors of 2 bits, rows and blocks change places.
template <activation T, weight_kind Kind>
struct scale_pairs {
  std::uint32_t low, high;  ///< of rows g and g + 8

  __device__ explicit scale_pairs(std::uint32_t word) {
    using rule = scale_decoding<T, Kind>;
    constexpr int odd_up = rule::even_up - 8;
    low = (word << rule::even_up & rule::mask) | rule::base;
    if constexpr (odd_up > 0) {
      high = (word << odd_up & rule::mask) | rule::base;
    } else {
      high = (word >> -odd_up & rule::mask) | rule::base;
    }
  }
};

/// Weights for activations in E4M3 become E4M3: the magnitudes of four codes are picked at once out of eight bytes, the
/// magnitudes of E2M1 times a power of two; signs lie apart and are put in. A word has, of columns 4t + j, the
/// magnitude of row g in bits 4j to 4j + 2, its sign in bit 8j + 7; the magnitude of row g + 8 in bits 16 + 4j to
/// 18 + 4j, its sign in bit 8j + 3. A stored scale byte is eight times how many powers of two the scale lies below the
/// largest of its row, at most 30: where the table in shared memory has the magnitudes.
struct e4m3_decoding {
  static constexpr std::uint32_t entries = 32, table_bytes = entries * 8;
  static constexpr std::uint32_t least = entries - 2, nan = entries - 1;
  /// What a row's factor is for a largest scale of 2^n: 2^(n + factor_shift), since magnitudes are up to 384.
  static constexpr int factor_shift = -6;

  [[nodiscard]] __device__ static std::uint32_t stored(std::uint32_t below) { return 8 * min(below, least); }

  /// Entry `number` of the table, as E4M3. The exact powers of two end 14 below the largest; what is less is rounded.
  [[nodiscard]] __device__ static uint2 entry(std::uint32_t number) {
    if (number == nan) return make_uint2(0x7F7F7F7Fu, 0x7F7F7F7Fu);
    const int below = static_cast<int>(number);
    std::uint64_t out = 0;
#pragma unroll
    for (int m = 1; m < 8; ++m) {
      constexpr std::uint64_t largest = 0x7C78'7470'6C68'6000u;
      const int normal = static_cast<int>(largest >> 8 * m & 0xFFu) - 8 * below;
      constexpr std::uint64_t twice = 0x0C08'0604'0302'0100u;  // the magnitudes of E2M1, doubled
      const float units = ldexpf(static_cast<float>(twice >> 8 * m & 0xFFu), 14 - below);  // of 2^-9
      out |= static_cast<std::uint64_t>(normal >= 8 ? normal : __float2int_rn(units)) << 8 * m;
    }
    return make_uint2(static_cast<std::uint32_t>(out), static_cast<std::uint32_t>(out >> 32));
  }
  /// Picks bytes of a pair of words by the last 16 bits of a selector.
  [[nodiscard]] __device__ static std::uint32_t pick(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    std::uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
    return out;
  }
  /// Entries of the table, of rows g and g + 8.
  struct pair_of_rows {
    uint2 low, high;
  };
  /// Those of the bytes `Byte` and Byte + 1 of a word of scales; `table`: the table's address, a multiple of 256.
  template <std::uint32_t Byte>
  [[nodiscard]] __device__ static pair_of_rows magnitudes(std::uint32_t scales, std::uint32_t table) {
    pair_of_rows out;
    load_shared(pick(scales, table, 0x7650u + Byte), out.low.x, out.low.y);
    load_shared(pick(scales, table, 0x7651u + Byte), out.high.x, out.high.y);
    return out;
  }
  /// Four columns of rows g and g + 8.
  __device__ static void decode(std::uint32_t word, const pair_of_rows& of, std::uint32_t& low, std::uint32_t& high) {
    const std::uint32_t selectors = word & 0x77777777u;
    low = pick(of.low.x, of.low.y, selectors) | (word & 0x80808080u);
    high = pick(of.high.x, of.high.y, selectors >> 16) | (word << 4 & 0x80808080u);
  }
};

/// Fills the table of e4m3_decoding; a block does it.
__device__ inline void fill_decoding_table(unsigned char* table) {
  if (threadIdx.x < e4m3_decoding::entries) {
    reinterpret_cast<uint2*>(table)[threadIdx.x] = e4m3_decoding::entry(threadIdx.x);
  }
}

/// Which bits of a word of factors of 2 bits are those of eight columns: behind a rotation to the right by twice their
/// number in the tile, the bits of `mask`, where a T's fraction begins; of row g in the low half, of row g + 8 above.
template <activation T>
struct fine_decoding {
  static constexpr int first = std::same_as<T, half> ? 8 : 5;
  static constexpr std::uint32_t mask = 0x00030003u << first;

  /// The bits of factor m of the `eight`th columns of row g, or g + 8.
  [[nodiscard]] __device__ static std::uint32_t stored(std::uint32_t m, std::uint32_t eight, bool is_high) {
    const std::uint32_t up = first + 2 * eight + (is_high ? 16 : 0);
    return __funnelshift_l(m, m, up);
  }
  [[nodiscard]] __device__ static std::uint32_t fractions(std::uint32_t word, std::uint32_t eight) {
    return __funnelshift_r(word, word, 2 * eight) & mask;
  }
};

/// The stored byte of an E4M3 scale below NaN, without its sign: five exponent bits and three of fraction, so that no
/// scale is subnormal. Zero scales have zero codes.
[[nodiscard]] __device__ inline std::uint32_t stored_e4m3(std::uint32_t bits, std::uint32_t bias) {
  const std::uint32_t exponent = bits >> 3 & 15u, fraction = bits & 7u;
  if (exponent != 0) return (exponent + 3 + bias) << 3 | fraction;
  if (fraction == 0) return 0;
  const std::uint32_t power = 31 - static_cast<std::uint32_t>(__clz(static_cast<int>(fraction)));
  return (power + 1 + bias) << 3 | (fraction << (3 - power) & 7u);
}

/// Which row of the weights a row of the tiles is.
[[nodiscard]] __device__ inline std::uint32_t source_row(std::uint32_t row, std::uint32_t rows, gating_rows gating) {
  if (gating == gating_rows::none) return row;
  const std::uint32_t output = row / 16 * 8 + row % 8, is_up = row / 8 % 2;
  if (output >= rows / 2) return rows;
  return gating == gating_rows::halves ? is_up * (rows / 2) + output : 2 * output + is_up;
}

/// A lane's part of a tile of weights, still coded: a word of codes for each step of 16 columns, and block scales.
template <weight_kind Kind>
struct coded_tile {
  static constexpr int scale_words = weight_tile<Kind>::lane_scales / 4;
  std::uint32_t word[4];
  std::uint32_t scales[scale_words];

  /// Reads the lane's codes and scales from shared memory.
  __device__ void read(std::uint32_t codes_at, std::uint32_t scales_at) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(codes_at));
    if constexpr (Kind == weight_kind::mx32) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scales[0]) : "r"(scales_at));
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(scales[0]), "=r"(scales[1]) : "r"(scales_at));
    }
  }

  /// The same from global memory.
  __device__ void read_global(const std::uint8_t* codes, const std::uint8_t* scales_from) {
    const uint4 words = *reinterpret_cast<const uint4*>(codes);
    word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
#pragma unroll
    for (int i = 0; i < scale_words; ++i) scales[i] = reinterpret_cast<const std::uint32_t*>(scales_from)[i];
  }

  /// The magnitudes for step s, of 32 columns, in E4M3; `table`: that of e4m3_decoding, in shared memory.
  [[nodiscard]] __device__ e4m3_decoding::pair_of_rows e4m3_magnitudes(int s, std::uint32_t table) const {
    static_assert(Kind == weight_kind::mx32);
    return s == 0 ? e4m3_decoding::magnitudes<0>(scales[0], table) : e4m3_decoding::magnitudes<2>(scales[0], table);
  }
  /// The A operand of that step.
  __device__ void decode_e4m3(int s, const e4m3_decoding::pair_of_rows& of, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) e4m3_decoding::decode(word[2 * s + i], of, a[2 * i], a[2 * i + 1]);
  }

  /// The A operand of step s for activations X; `table`: that of e4m3_decoding, for E4M3.
  template <class X>
  __device__ void decode(int s, std::uint32_t table, std::uint32_t (&a)[4]) const {
    if constexpr (std::same_as<X, e4m3>) {
      decode_e4m3(s, e4m3_magnitudes(s, table), a);
    } else {
      decode<X>(s, a);
    }
  }

  /// The A operand of step s.
  template <activation T>
  __device__ void decode(int s, std::uint32_t (&a)[4]) const {
    const int block = s * 16 / static_cast<int>(weight_tile<Kind>::block);
    const scale_pairs<T, Kind> scale(scales[block / 2]);
    gather_codes<T>(word[s], a);
    if constexpr (weight_tile<Kind>::is_fine) {
      const std::uint32_t of_block = block == 0 ? scale.low : scale.high;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t by =
            of_block | fine_decoding<T>::fractions(scales[1], static_cast<std::uint32_t>(2 * s + i));
        a[2 * i] = multiply_by<T>(a[2 * i], by, 0), a[2 * i + 1] = multiply_by<T>(a[2 * i + 1], by, 1);
      }
      return;
    }
    a[0] = multiply_by<T>(a[0], scale.low, block % 2), a[1] = multiply_by<T>(a[1], scale.high, block % 2);
    a[2] = multiply_by<T>(a[2], scale.low, block % 2), a[3] = multiply_by<T>(a[3], scale.high, block % 2);
  }
};

}  // namespace TETROMINO_NAMESPACE::cuda::detail
