#pragma once

#include "../../../config.hpp"   // TETROMINO_ISA, TETROMINO_VECTOR_BITS, TETROMINO_INLINE, bit_cast
#include "../../../float16.hpp"  // bfloat16

/// Sixteen numbers side by side, in as many registers as the instruction set needs for them: one source for all widths,
/// and one order of every sum. The only header that includes xsimd (8.1 to 14).

#if TETROMINO_SIMD

#if TETROMINO_VECTOR_BITS > 128
#include <xsimd/xsimd.hpp>  // xsimd::batch
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#include <emmintrin.h>
#endif

#include <cstddef>      // std::size_t
#include <cstdint>      // std::int32_t, std::uintptr_t
#include <cstring>      // std::memcpy
#include <type_traits>  // std::conditional_t, std::integral_constant, std::is_same_v
#include <utility>      // std::index_sequence

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

// What a register holds is the compiler's own vector, and so are the operators; xsimd::batch does what has no operator.
// As the type of everything, batch took g++ three times as long to compile, in calls to inline. Registers of 128 bits
// do without: they are many, so that operators serve as well and compile faster, and to read xsimd takes longer than
// all that is left to read.
#if TETROMINO_VECTOR_BITS > 128
using architecture = std::conditional_t<TETROMINO_VECTOR_BITS == 512, xsimd::avx512bw, xsimd::avx2>;
using float_batch = xsimd::batch<float, architecture>;
using word_batch = xsimd::batch<std::int32_t, architecture>;
using flag_batch = float_batch::batch_bool_type;
using float_register = float_batch::register_type;
using word_register = word_batch::register_type;
#elif defined(__aarch64__)
using float_register = float32x4_t;
using word_register = int32x4_t;
#else
using float_register = __m128;
using word_register = __m128i;
#endif

/// The lanes of a word_register; unsigned ones wrap around and shift zeros in.
using signed_lanes = std::int32_t __attribute__((vector_size(TETROMINO_VECTOR_BITS / 8)));
using unsigned_lanes = std::uint32_t __attribute__((vector_size(TETROMINO_VECTOR_BITS / 8)));
TETROMINO_INLINE signed_lanes lanes_of(word_register a) { return __builtin_bit_cast(signed_lanes, a); }
TETROMINO_INLINE unsigned_lanes unsigned_of(word_register a) { return __builtin_bit_cast(unsigned_lanes, a); }
TETROMINO_INLINE word_register word_of(signed_lanes a) { return __builtin_bit_cast(word_register, a); }
TETROMINO_INLINE word_register word_of(unsigned_lanes a) { return __builtin_bit_cast(word_register, a); }
TETROMINO_INLINE word_register bits_of(float_register a) { return __builtin_bit_cast(word_register, a); }
TETROMINO_INLINE float_register floats_of(word_register a) { return __builtin_bit_cast(float_register, a); }

// What has no operator, or none that g++ makes one instruction of.
#if TETROMINO_VECTOR_BITS > 128
using flag_register = flag_batch::register_type;
TETROMINO_INLINE flag_register less(float_register a, float_register b) { return float_batch(a) < float_batch(b); }
TETROMINO_INLINE flag_register at_most(float_register a, float_register b) { return float_batch(a) <= float_batch(b); }
TETROMINO_INLINE float_register choose(flag_register f, float_register a, float_register b) {
  return xsimd::select(flag_batch(f), float_batch(a), float_batch(b));
}
TETROMINO_INLINE float_register smaller(float_register a, float_register b) {
  return xsimd::min(float_batch(a), float_batch(b));
}
TETROMINO_INLINE word_register smaller(word_register a, word_register b) {
  return xsimd::min(word_batch(a), word_batch(b));
}
TETROMINO_INLINE word_register larger(word_register a, word_register b) {
  return xsimd::max(word_batch(a), word_batch(b));
}
TETROMINO_INLINE flag_register both(flag_register a, flag_register b) { return flag_batch(a) & flag_batch(b); }
TETROMINO_INLINE flag_register either(flag_register a, flag_register b) { return flag_batch(a) | flag_batch(b); }
TETROMINO_INLINE float_register all_lanes(float x) { return float_batch(x); }
TETROMINO_INLINE word_register all_lanes(std::int32_t x) { return word_batch(x); }
TETROMINO_INLINE float_register load_lanes(const float* x) { return float_batch::load_unaligned(x); }
TETROMINO_INLINE word_register load_lanes(const std::int32_t* x) { return word_batch::load_unaligned(x); }
TETROMINO_INLINE void store_lanes(float* out, float_register a) { float_batch(a).store_unaligned(out); }
TETROMINO_INLINE void store_lanes(std::int32_t* out, word_register a) { word_batch(a).store_unaligned(out); }
TETROMINO_INLINE float_register real_lanes(word_register a) { return xsimd::to_float(word_batch(a)); }
#else
using flag_register = signed_lanes;
TETROMINO_INLINE flag_register both(flag_register a, flag_register b) { return a & b; }
TETROMINO_INLINE flag_register either(flag_register a, flag_register b) { return a | b; }
TETROMINO_INLINE float_register all_lanes(float x) { return x - float_register{}; }
TETROMINO_INLINE word_register all_lanes(std::int32_t x) { return word_of(x - signed_lanes{}); }
TETROMINO_INLINE float_register load_lanes(const float* x) {
  float_register r;
  std::memcpy(&r, x, sizeof r);
  return r;
}
TETROMINO_INLINE word_register load_lanes(const std::int32_t* x) {
  word_register r;
  std::memcpy(&r, x, sizeof r);
  return r;
}
TETROMINO_INLINE void store_lanes(float* out, float_register a) { std::memcpy(out, &a, sizeof a); }
TETROMINO_INLINE void store_lanes(std::int32_t* out, word_register a) { std::memcpy(out, &a, sizeof a); }
TETROMINO_INLINE float_register real_lanes(word_register a) {
  return __builtin_convertvector(lanes_of(a), float_register);
}
TETROMINO_INLINE flag_register less(float_register a, float_register b) { return a < b; }
TETROMINO_INLINE flag_register at_most(float_register a, float_register b) { return a <= b; }
TETROMINO_INLINE float_register choose(flag_register f, float_register a, float_register b) { return f ? a : b; }
TETROMINO_INLINE float_register smaller(float_register a, float_register b) { return a < b ? a : b; }
TETROMINO_INLINE word_register smaller(word_register a, word_register b) {
  return word_of(lanes_of(a) < lanes_of(b) ? lanes_of(a) : lanes_of(b));
}
TETROMINO_INLINE word_register larger(word_register a, word_register b) {
  return word_of(lanes_of(a) > lanes_of(b) ? lanes_of(a) : lanes_of(b));
}
#endif

inline constexpr std::size_t lane_count = 16;
inline constexpr std::size_t register_lanes = TETROMINO_VECTOR_BITS / 32, registers = lane_count / register_lanes;
/// Whether multiply_add and subtract_product round once.
inline constexpr bool has_fused_products = TETROMINO_HAS_FMA;
static_assert(sizeof(float_register) == register_lanes * sizeof(float));

/// The size of blocks where it is a template parameter: this, where it is known at run time only.
inline constexpr std::size_t any_size = 0;
/// That parameter for blocks of `Size` elements. Where a kernel works on many registers, a loop costs little beside
/// what it repeats, and what is written out for each size takes long to compile: there it is any_size.
template <std::size_t Size>
inline constexpr std::size_t block_size = registers > 2 ? any_size : Size;
/// f<block_size<16>>() or f<block_size<32>>(), for blocks of 16 or 32 elements.
template <class F>
TETROMINO_INLINE auto with_block(std::size_t block, const F& f) {
  if constexpr (registers > 2) {
    return static_cast<void>(block), f.template operator()<any_size>();
  } else {
    return block == 16 ? f.template operator()<16>() : f.template operator()<32>();
  }
}

/// The size of such a block, and in which one element k is; without a division.
template <std::size_t Block>
constexpr std::size_t size_of(std::size_t block) {
  return Block == any_size ? block : Block;
}
template <std::size_t Block>
constexpr std::size_t block_at(std::size_t block, std::size_t k) {
  if constexpr (Block == any_size) {
    return k >> (block == 16 ? 4 : 5);
  } else {
    return k / Block;
  }
}

/// Copies registers one by one: g++ moves arrays of them through memory. Each may be copied to itself.
template <class Register>
TETROMINO_INLINE void copy_registers(const Register* from, Register* to) {
  to[0] = from[0];
  if constexpr (registers > 1) to[1] = from[1];
  if constexpr (registers > 2) {
    to[2] = from[2];
    to[3] = from[3];
  }
}

/// The same to memory.
template <class Register>
TETROMINO_INLINE void copy_registers(const Register* from, char* to) {
  std::memcpy(to, from, sizeof *from);
  if constexpr (registers > 1) std::memcpy(to + sizeof *from, from + 1, sizeof *from);
  if constexpr (registers > 2) {
    std::memcpy(to + 2 * sizeof *from, from + 2, sizeof *from);
    std::memcpy(to + 3 * sizeof *from, from + 3, sizeof *from);
  }
}

/// f(0), f(1) ... f(N - 1), with the index as a constant, so that arrays of registers stay in registers.
template <class F, std::size_t... Index>
TETROMINO_INLINE void repeat(const F& f, std::index_sequence<Index...>) {
  (f(std::integral_constant<std::size_t, Index>{}), ...);
}
template <std::size_t N, class F>
TETROMINO_INLINE void repeat(const F& f) {
  repeat(f, std::make_index_sequence<N>{});
}

/// Lane i is element i.
struct floats {
  float_register r[registers];

  floats() = default;
  template <class... Registers>
  TETROMINO_INLINE explicit floats(float_register first, Registers... more) : r{first, more...} {}
  TETROMINO_INLINE floats(const floats& a) { copy_registers(a.r, r); }
  // NOLINTNEXTLINE(bugprone-unhandled-self-assignment): see copy_registers
  TETROMINO_INLINE floats& operator=(const floats& a) { return copy_registers(a.r, r), *this; }
};
/// Integers, or the bits of floats.
struct words {
  word_register r[registers];

  words() = default;
  template <class... Registers>
  TETROMINO_INLINE explicit words(word_register first, Registers... more) : r{first, more...} {}
  TETROMINO_INLINE words(const words& a) { copy_registers(a.r, r); }
  // NOLINTNEXTLINE(bugprone-unhandled-self-assignment): see copy_registers
  TETROMINO_INLINE words& operator=(const words& a) { return copy_registers(a.r, r), *this; }
};
/// The outcome of a comparison, lane by lane.
struct flags {
  flag_register r[registers];
};

/// Two registers' worth of elements x[0, 32): even ones first for bfloat16 (whose halves of a word are taken apart at
/// no cost), else in order.
template <class T>
inline constexpr bool is_split = std::is_same_v<T, bfloat16>;
struct floats_pair {
  floats first, second;
};

/// Out with register i = f(i).
template <class Out, class F>
TETROMINO_INLINE Out by_register(const F& f) {
  Out out;
  out.r[0] = f(std::size_t{0});
  if constexpr (registers > 1) out.r[1] = f(std::size_t{1});
  if constexpr (registers > 2) {
    out.r[2] = f(std::size_t{2});
    out.r[3] = f(std::size_t{3});
  }
  return out;
}

// One instruction, or a few, for register i of each operand; written out, as lambdas are slow to compile.
#define TETROMINO_LANEWISE(Out, signature, expression) \
  TETROMINO_INLINE Out signature {                     \
    Out out;                                           \
    {                                                  \
      constexpr std::size_t i = 0;                     \
      out.r[i] = expression;                           \
    }                                                  \
    if constexpr (registers > 1) {                     \
      constexpr std::size_t i = 1 % registers;         \
      out.r[i] = expression;                           \
    }                                                  \
    if constexpr (registers > 2) {                     \
      constexpr std::size_t i = 2 % registers;         \
      out.r[i] = expression;                           \
    }                                                  \
    if constexpr (registers > 3) {                     \
      constexpr std::size_t i = 3 % registers;         \
      out.r[i] = expression;                           \
    }                                                  \
    return out;                                        \
  }
// clang-format off
TETROMINO_LANEWISE(floats, operator+(const floats& a, const floats& b), a.r[i] + b.r[i])
TETROMINO_LANEWISE(floats, operator-(const floats& a, const floats& b), a.r[i] - b.r[i])
TETROMINO_LANEWISE(floats, operator*(const floats& a, const floats& b), a.r[i] * b.r[i])
TETROMINO_LANEWISE(floats, operator/(const floats& a, const floats& b), a.r[i] / b.r[i])
TETROMINO_LANEWISE(words, operator+(const words& a, const words& b), word_register(unsigned_lanes(a.r[i]) + unsigned_lanes(b.r[i])))
TETROMINO_LANEWISE(words, operator-(const words& a, const words& b), word_register(unsigned_lanes(a.r[i]) - unsigned_lanes(b.r[i])))
TETROMINO_LANEWISE(words, operator&(const words& a, const words& b), a.r[i] & b.r[i])
TETROMINO_LANEWISE(words, operator|(const words& a, const words& b), a.r[i] | b.r[i])
TETROMINO_LANEWISE(words, operator^(const words& a, const words& b), a.r[i] ^ b.r[i])
TETROMINO_LANEWISE(flags, operator&(const flags& a, const flags& b), both(a.r[i], b.r[i]))
TETROMINO_LANEWISE(flags, operator|(const flags& a, const flags& b), either(a.r[i], b.r[i]))
TETROMINO_LANEWISE(flags, operator<(const floats& a, const floats& b), less(a.r[i], b.r[i]))
TETROMINO_LANEWISE(flags, operator<=(const floats& a, const floats& b), at_most(a.r[i], b.r[i]))
/// Of NaN and a number: either of them.
TETROMINO_LANEWISE(floats, min(const floats& a, const floats& b), smaller(a.r[i], b.r[i]))
TETROMINO_LANEWISE(words, min(const words& a, const words& b), smaller(a.r[i], b.r[i]))
TETROMINO_LANEWISE(words, max(const words& a, const words& b), larger(a.r[i], b.r[i]))
/// a where the flag is set, b elsewhere.
TETROMINO_LANEWISE(floats, select(const flags& f, const floats& a, const floats& b),
                   choose(f.r[i], a.r[i], b.r[i]))

template <int N>
TETROMINO_LANEWISE(words, shift_left(const words& a), word_register(unsigned_lanes(a.r[i]) << N))
/// Keeps the sign.
template <int N>
TETROMINO_LANEWISE(words, shift_right(const words& a), word_register(signed_lanes(a.r[i]) >> N))
/// The upper halves of lanes, alone.
TETROMINO_LANEWISE(words, upper_halves(const words& a), word_register(unsigned_lanes(a.r[i]) >> 16))

TETROMINO_LANEWISE(words, bits_of(const floats& a), word_register(a.r[i]))
TETROMINO_LANEWISE(floats, floats_of(const words& a), float_register(a.r[i]))
TETROMINO_LANEWISE(floats, to_floats(const words& a), real_lanes(a.r[i]))

TETROMINO_LANEWISE(floats, broadcast(float x), (static_cast<void>(i), all_lanes(x)))
TETROMINO_LANEWISE(words, broadcast(std::int32_t x), (static_cast<void>(i), all_lanes(x)))
TETROMINO_LANEWISE(floats, load(const float* x), load_lanes(x + i * register_lanes))
TETROMINO_LANEWISE(words, load(const std::int32_t* x), load_lanes(x + i * register_lanes))
#undef TETROMINO_LANEWISE
    // clang-format on

    TETROMINO_INLINE words select(const flags& f, const words& a, const words& b) {
  return bits_of(select(f, floats_of(a), floats_of(b)));
}
TETROMINO_INLINE floats magnitude(const floats& a) { return floats_of(bits_of(a) & broadcast(0x7FFFFFFF)); }
/// The upper halves of lanes of `even` and `odd`, in turns.
TETROMINO_INLINE words join_upper_halves(const words& even, const words& odd) {
  return upper_halves(even) | (odd & broadcast(static_cast<std::int32_t>(0xFFFF0000u)));
}

/// To 64 bytes of any kind.
TETROMINO_INLINE void store_words(void* out, const words& a) { copy_registers(a.r, static_cast<char*>(out)); }
TETROMINO_INLINE void store(std::int32_t* out, const words& a) {
  for (std::size_t i = 0; i < registers; ++i) store_lanes(out + i * register_lanes, a.r[i]);
}
TETROMINO_INLINE void store(float* out, const floats& a) {
  for (std::size_t i = 0; i < registers; ++i) store_lanes(out + i * register_lanes, a.r[i]);
}

/// What is `ahead` bytes after x, which may be past the end of everything: where pointers must not go.
TETROMINO_INLINE const void* far_after(const void* x, std::size_t ahead) {
  const std::uintptr_t there = reinterpret_cast<std::uintptr_t>(x) + ahead;
  return reinterpret_cast<const void*>(there);  // NOLINT(performance-no-int-to-ptr)
}
/// Asks for what is there, in the first cache or in the second.
TETROMINO_INLINE void prefetch(const void* x, std::size_t ahead) { __builtin_prefetch(far_after(x, ahead)); }
TETROMINO_INLINE void prefetch_to_l2(const void* x, std::size_t ahead) {
  __builtin_prefetch(far_after(x, ahead), 0, 2);
}

/// 16-bit numbers in the low halves of lanes, and back. NaN stays NaN as in half and bfloat16.
TETROMINO_INLINE floats widen_bfloat16(const words& a) { return floats_of(shift_left<16>(a)); }
TETROMINO_INLINE floats widen_half(const words& a) {
  const words magnitude = shift_left<13>(a & broadcast(0x7FFF)), sign = shift_left<16>(a & broadcast(0x8000));
  const words normal = magnitude + broadcast(112 << 23);
  const words subnormal = bits_of(floats_of(magnitude + broadcast(113 << 23)) - broadcast(0x1p-14f));
  const words special = magnitude + broadcast(224 << 23);
  const floats m = floats_of(magnitude);  // exponents order floats as well as halves; nothing here is a NaN
  const words finite = select(m < floats_of(broadcast(1 << 23)), subnormal, normal);
  return floats_of(select(floats_of(broadcast(31 << 23)) <= m, special, finite) | sign);
}
/// Rounds floats that are no NaN to bfloat16, in the upper halves of lanes; the lower halves are left over.
TETROMINO_INLINE words round_bfloat16(const floats& a) {
  const words word = bits_of(a);
  return word + broadcast(0x7FFF) + (shift_right<16>(word) & broadcast(1));
}
TETROMINO_INLINE words narrow_bfloat16(const floats& a) {
  const words bits = select(a <= a, round_bfloat16(a), bits_of(a) | broadcast(0x400000));
  return upper_halves(bits);
}
TETROMINO_INLINE words narrow_half(const floats& a) {
  const floats m = magnitude(a);
  const words word = bits_of(m), sign = shift_right<16>(bits_of(a)) & broadcast(0x8000);
  const words odd = shift_right<13>(word) & broadcast(1);
  const words normal = shift_right<13>(word - broadcast(112 << 23) + broadcast(0xFFF) + odd);
  const words subnormal = bits_of(m + broadcast(0.5f)) - bits_of(broadcast(0.5f));  // steps of 2^-24
  const words finite = select(m < broadcast(0x1p-14f), subnormal, normal);
  const words infinite = select(m < broadcast(65520.0f), finite, broadcast(0x7C00));
  const words nan = (shift_right<13>(word) & broadcast(0x3FF)) | broadcast(0x7E00);
  return select(a <= a, infinite, nan) | sign;
}

/// The values of codes of E4M3, 0 ... 255.
TETROMINO_INLINE floats decode_e4m3(const words& code) {
  const words magnitude = shift_left<20>(code & broadcast(0x7F)), sign = shift_left<24>(code & broadcast(0x80));
  const floats normal = floats_of(magnitude + broadcast(120 << 23));
  const floats subnormal = floats_of(magnitude + broadcast(121 << 23)) - broadcast(0x1p-6f);
  const floats finite = select(normal < broadcast(0x1p-6f), subnormal, normal);
  return floats_of(select(broadcast(448.0f) < normal, broadcast(0x7FC00000), bits_of(finite)) | sign);
}

/// Hands back products as the rounded floats that they are; see detail::rounded.
TETROMINO_INLINE floats rounded(floats a) {
#if defined(__GNUC__)
  for (auto& r : a.r) {
#if TETROMINO_VECTOR_BITS == 512
    asm("" : "+v"(r));
#elif defined(__aarch64__)
    asm("" : "+w"(r));
#else
    asm("" : "+x"(r));
#endif
  }
#endif
  return a;
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
