#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD, TETROMINO_VECTOR_BITS

/// What an instruction set provides beyond lanewise arithmetic (lanes.hpp): the one list.

#if TETROMINO_SIMD

#include "../../../float16.hpp"  // half, bfloat16
#include "../../../format.hpp"   // any_format
#include "amx.hpp"               // tiles_of
#include "avx2.hpp"              // floats, words ...
#include "avx512.hpp"            // floats, words ...
#include "four_registers.hpp"    // floats, words ...

#include <concepts>  // std::constructible_from, std::same_as
#include <cstddef>   // std::size_t
#include <cstdint>   // std::int8_t, std::int32_t, std::uint8_t, std::uint32_t

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// The types by which the concepts below find functions.
struct this_set {
  using real_lanes = floats;
  using word_lanes = words;
  using flag_lanes = flags;
  using decoder = e2m1_decoder;
  using float32 = float;
  using float16 = half;
  using brain16 = bfloat16;
  using byte = std::uint8_t;
  using signed_byte = std::int8_t;
};

/// Numbers of each type between memory and lanes.
template <class Set>
concept moves_numbers = requires(typename Set::real_lanes f, typename Set::word_lanes w,
                                 const typename Set::float32* singles, typename Set::float16* halves,
                                 typename Set::brain16* bfloats, typename Set::byte* bytes,
                                 typename Set::signed_byte* signed_bytes) {
  { load(static_cast<const typename Set::float16*>(halves)) } -> std::same_as<typename Set::real_lanes>;
  { load(static_cast<const typename Set::brain16*>(bfloats)) } -> std::same_as<typename Set::real_lanes>;
  store(halves, f);
  store(bfloats, f);
  // 16 bytes, one in each lane; 32 signed ones, from the lanes of two, or from 16-bit halves of lanes
  { load_bytes(static_cast<const typename Set::byte*>(bytes)) } -> std::same_as<typename Set::word_lanes>;
  store_bytes(bytes, w);
  store_signed_bytes(signed_bytes, w, w);
  store_signed_halves(signed_bytes, w);
  // 16 codes of E4M3
  { load_e4m3(static_cast<const typename Set::byte*>(bytes)) } -> std::same_as<typename Set::real_lanes>;
  // 32 numbers, even ones first where is_split says so
  load_pair(singles).first;
  load_pair(static_cast<const typename Set::float16*>(halves)).second;
  load_pair(static_cast<const typename Set::brain16*>(bfloats)).second;
  // 64 bytes past the caches
  stream_line(bytes, static_cast<const typename Set::byte*>(bytes));
};

/// Sums, maxima and questions over all lanes, in the one order of every set.
template <class Set>
concept works_across_lanes = requires(typename Set::real_lanes f, typename Set::word_lanes w,
                                      typename Set::flag_lanes g, const typename Set::float32* singles,
                                      const typename Set::float16* halves, const typename Set::brain16* bfloats,
                                      typename Set::real_lanes (*get)(std::size_t)) {
  // lanes 0 ... 7 get the first, the others the second
  { broadcast_halves(typename Set::float32{}, typename Set::float32{}) } -> std::same_as<typename Set::real_lanes>;
  // lane i gets what lane i ^ distance has
  { exchange<1>(w) } -> std::same_as<typename Set::word_lanes>;
  { exchange<2>(w) } -> std::same_as<typename Set::word_lanes>;
  { exchange<4>(w) } -> std::same_as<typename Set::word_lanes>;
  { exchange<8>(w) } -> std::same_as<typename Set::word_lanes>;
  { any_at_least(w, std::int32_t{}) } -> std::same_as<bool>;
  { all(g) } -> std::same_as<bool>;
  { zero_lanes(w) } -> std::same_as<std::uint32_t>;
  // lane b is the sum of all lanes of get(b), at distances 8, 4, 2, 1
  { sum_each(get) } -> std::same_as<typename Set::real_lanes>;
  // lane b is the largest magnitude of block b, as bits of a float
  { block_amax<block_size<16>>(std::size_t{}, singles) } -> std::same_as<typename Set::word_lanes>;
  { block_amax<block_size<16>>(std::size_t{}, halves) } -> std::same_as<typename Set::word_lanes>;
  { block_amax<block_size<16>>(std::size_t{}, bfloats) } -> std::same_as<typename Set::word_lanes>;
};

/// Arithmetic that has an instruction of its own in most sets.
template <class Set>
concept rounds_and_fuses = requires(typename Set::real_lanes f) {
  { nearest(f) } -> std::same_as<typename Set::word_lanes>;
  { multiply_add(f, f, f) } -> std::same_as<typename Set::real_lanes>;
  { subtract_product(f, f, f) } -> std::same_as<typename Set::real_lanes>;
};

/// Codes of E2M1 from values, and back.
template <class Set>
concept codes_e2m1 = requires(typename Set::real_lanes f, typename Set::word_lanes w,
                              const typename Set::decoder decode, const typename Set::float32* singles,
                              const typename Set::float16* halves, const typename Set::brain16* bfloats,
                              typename Set::byte* bytes) {
  { snap(f, f) } -> std::same_as<typename Set::real_lanes>;
  { encode_e2m1(f, f) } -> std::same_as<typename Set::word_lanes>;
  store_codes<typename Set::float32>(bytes, w, w, w, w);
  store_codes<typename Set::brain16>(bytes, w, w, w, w);
  // 32 codes in order, even ones first, or in the order of `place` with the scales of each 8, 16 or 32
  requires std::constructible_from<typename Set::decoder, typename Set::float32>;
  decode(bytes).first;
  decode.split(bytes).first;
  decode.template scaled<8>(bytes, singles).first;
  decode.template scaled<16>(bytes, singles).first;
  decode.template scaled<32>(bytes, singles).first;
  { Set::decoder::place(std::size_t{}) } -> std::same_as<std::size_t>;
  Set::decoder::load_in_place(singles).first;
  Set::decoder::load_in_place(halves).first;
  Set::decoder::load_in_place(bfloats).first;
};

/// Products of 16 outputs side by side. Values of weights are doubled and biased by value_bias.
template <class Set>
concept multiplies_bytes = requires(typename Set::word_lanes w, const typename Set::byte* const* rows,
                                    const typename Set::byte* codes, const typename Set::signed_byte* x,
                                    typename Set::signed_byte* out, std::int32_t* offsets) {
  { load_columns(rows, std::size_t{}).part[3] } -> std::same_as<typename Set::word_lanes&&>;
  { biased_values(w) } -> std::same_as<typename Set::word_lanes>;
  { add_products(w, w, w, w, w, x) } -> std::same_as<typename Set::word_lanes>;
  split_elements(x, out, offsets);
  split_codes(codes, out, offsets);
  // the same with a factor for each eight columns
  { begins_with_fine_offset } -> std::same_as<const bool&>;
  store_fine_offsets(x, offsets, offsets);
  { fine_multipliers<3>(w) } -> std::same_as<typename Set::word_lanes>;
  { fine_values(w, w) } -> std::same_as<typename Set::word_lanes>;
  { add_fine_products(w, w, w, x, offsets, w) } -> std::same_as<typename Set::word_lanes>;
};

// What some sets can do besides ---------------------------------------------------------------------------------------

/// A decoder that puts scales that are powers of two into the exponents of values.
template <class Decoder>
concept shifts_scales = requires(const Decoder decode, const std::uint8_t* codes, std::int32_t* shifts, words misfits) {
  decode.template shifted<32>(codes, shifts).first;
  Decoder::scale_shifts(codes, shifts, misfits);
};

/// Products of rows of weights as they lie, with the sums of each block in lanes of their own.
template <class Words>
concept multiplies_rows = requires(const std::uint8_t* const* rows, const std::int8_t* x, Words (&out)[4]) {
  multiply_rows<32>(rows, std::size_t{}, x, out);
};

/// The same with a factor of 2 bits for each 8 or 16 columns.
template <class Words>
concept multiplies_fine_rows = requires(const Words& w, const any_format& format, const std::uint8_t* const* bytes,
                                        const std::int32_t* offsets) {
  factors_of_rows(w, format, bytes, offsets);
};

/// Products of bfloat16 that are summed by pairs.
template <class Words>
concept multiplies_bfloat16 = requires(const Words& codes, const floats& sum, const std::uint16_t* x) {
  add_pair(sum, value_pairs(codes).pair[3], x);
};

/// Products of many rows of bytes by tiles; see byte_tiles.
template <class Words>
concept multiplies_by_tiles = requires(const Words& codes) {
  tiles_of(codes);
};

/// Says what is missing: the compiler names the function below these words. Instances of tetromino::cpu have one, so
/// that those who include headers need not wait for it.
template <class Set>
struct checked_set {
  static_assert(moves_numbers<Set>, "an instruction set lacks what moves numbers between memory and lanes");
  static_assert(works_across_lanes<Set>, "an instruction set lacks what works across lanes");
  static_assert(rounds_and_fuses<Set>, "an instruction set lacks rounding or products with a sum");
  static_assert(codes_e2m1<Set>, "an instruction set lacks what encodes and decodes E2M1");
  static_assert(multiplies_bytes<Set>, "an instruction set lacks what integer products are made of");
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
