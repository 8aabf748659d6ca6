#pragma once

#include "../../config.hpp"   // TETROMINO_ISA, TETROMINO_VECTOR_BITS, TETROMINO_INLINE, bit_cast
#include "../../float16.hpp"  // bfloat16

/// Sixteen numbers side by side, in as many registers as the instruction set needs for them: one source for all widths,
/// and one order of every sum. The only header that names xsimd (8.1 to 14).

#if TETROMINO_SIMD

#include <xsimd/xsimd.hpp>  // xsimd::batch

#include <cstddef>      // std::size_t
#include <cstdint>      // std::int32_t, std::uintptr_t
#include <cstring>      // std::memcpy
#include <type_traits>  // std::integral_constant, std::is_same_v
#include <utility>      // std::index_sequence

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

#if TETROMINO_VECTOR_BITS == 512
using architecture = xsimd::avx512bw;
#elif TETROMINO_VECTOR_BITS == 256
using architecture = xsimd::avx2;
#elif defined(__aarch64__)
using architecture = xsimd::neon64;
#else
using architecture = xsimd::sse2;
#endif
using float_register = xsimd::batch<float, architecture>;
using word_register = xsimd::batch<std::int32_t, architecture>;

inline constexpr std::size_t lane_count = 16;
inline constexpr std::size_t registers = lane_count * 32 / TETROMINO_VECTOR_BITS;
static_assert(float_register::size * registers == lane_count);

/// Copies registers one by one: g++ moves arrays of them through memory.
template <class Register>
TETROMINO_INLINE void copy_registers(const Register* from, Register* to) {
  to[0] = from[0];
  if constexpr (registers > 1) to[1] = from[1];
  if constexpr (registers > 2) {
    to[2] = from[2];
    to[3] = from[3];
  }
}

/// f(0), f(1) ... f(N - 1), with the index as a constant, so that arrays of registers stay in registers.
template <class F, std::size_t... I>
TETROMINO_INLINE void repeat(const F& f, std::index_sequence<I...>) {
  (f(std::integral_constant<std::size_t, I>{}), ...);
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
  TETROMINO_INLINE floats& operator=(const floats& a) { return copy_registers(a.r, r), *this; }
};
/// Integers, or the bits of floats.
struct words {
  word_register r[registers];

  words() = default;
  template <class... Registers>
  TETROMINO_INLINE explicit words(word_register first, Registers... more) : r{first, more...} {}
  TETROMINO_INLINE words(const words& a) { copy_registers(a.r, r); }
  TETROMINO_INLINE words& operator=(const words& a) { return copy_registers(a.r, r), *this; }
};
/// The outcome of a comparison, lane by lane.
struct flags {
  float_register::batch_bool_type r[registers];
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

// One instruction, or a few, for each register.
#define TETROMINO_LANEWISE(Out, In, name, expression)                           \
  TETROMINO_INLINE Out name(const In& a, const In& b) {                         \
    return by_register<Out>([&](std::size_t i) TETROMINO_INLINE_LAMBDA -> auto{ \
      const auto x = a.r[i], y = b.r[i];                                        \
      return expression;                                                        \
    });                                                                         \
  }
TETROMINO_LANEWISE(floats, floats, operator+, x + y)
TETROMINO_LANEWISE(floats, floats, operator-, x - y)
TETROMINO_LANEWISE(floats, floats, operator*, x* y)
#if defined(__aarch64__)
TETROMINO_LANEWISE(floats, floats, operator/, float_register(vdivq_f32(x, y)))  // xsimd 8 approximates
#else
TETROMINO_LANEWISE(floats, floats, operator/, x / y)
#endif
TETROMINO_LANEWISE(floats, floats, min, xsimd::min(x, y))  // of NaN and y: either of them
TETROMINO_LANEWISE(words, words, operator+, x + y)
TETROMINO_LANEWISE(words, words, operator-, x - y)
TETROMINO_LANEWISE(words, words, operator&, x& y)
TETROMINO_LANEWISE(words, words, operator|, x | y)
TETROMINO_LANEWISE(words, words, max, xsimd::max(x, y))
TETROMINO_LANEWISE(words, words, min, xsimd::min(x, y))
TETROMINO_LANEWISE(flags, floats, operator<, x < y)
TETROMINO_LANEWISE(flags, floats, operator<=, x <= y)
TETROMINO_LANEWISE(flags, flags, operator&, x& y)
TETROMINO_LANEWISE(flags, flags, operator|, x | y)
#undef TETROMINO_LANEWISE

template <int N>
TETROMINO_INLINE words shift_left(const words& a) {
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA { return a.r[i] << N; });
}
/// Keeps the sign.
template <int N>
TETROMINO_INLINE words shift_right(const words& a) {
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA { return a.r[i] >> N; });
}

/// The upper halves of lanes of `even` and `odd`, in turns.
TETROMINO_INLINE words join_upper_halves(const words& even, const words& odd) {
  using unsigned_register = xsimd::batch<std::uint32_t, architecture>;
  const word_register upper(static_cast<std::int32_t>(0xFFFF0000u));
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    const unsigned_register low = detail::bit_cast<unsigned_register>(even.r[i]) >> 16;
    return detail::bit_cast<word_register>(low) | (odd.r[i] & upper);
  });
}

TETROMINO_INLINE floats broadcast(float x) {
  return by_register<floats>([&](std::size_t) TETROMINO_INLINE_LAMBDA { return float_register(x); });
}
TETROMINO_INLINE words broadcast(std::int32_t x) {
  return by_register<words>([&](std::size_t) TETROMINO_INLINE_LAMBDA { return word_register(x); });
}

TETROMINO_INLINE floats load(const float* x) {
  return by_register<floats>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    return float_register::load_unaligned(x + i * float_register::size);
  });
}
TETROMINO_INLINE words load(const std::int32_t* x) {
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    return word_register::load_unaligned(x + i * word_register::size);
  });
}
TETROMINO_INLINE void store(float* out, const floats& a) {
  for (std::size_t i = 0; i < registers; ++i) a.r[i].store_unaligned(out + i * float_register::size);
}
/// To 64 bytes of any kind.
TETROMINO_INLINE void store_words(void* out, const words& a) {
  for (std::size_t i = 0; i < registers; ++i) {
    const word_register r = a.r[i];
    std::memcpy(static_cast<char*>(out) + i * sizeof r, &r, sizeof r);
  }
}
TETROMINO_INLINE void store(std::int32_t* out, const words& a) {
  for (std::size_t i = 0; i < registers; ++i) a.r[i].store_unaligned(out + i * word_register::size);
}

/// Asks for what lies `ahead` bytes after x, which may be past the end of everything.
TETROMINO_INLINE void prefetch([[maybe_unused]] const void* x, [[maybe_unused]] std::size_t ahead) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(x) + ahead));
#endif
}

TETROMINO_INLINE words bits_of(const floats& a) {
  return by_register<words>([&](std::size_t i)
                                TETROMINO_INLINE_LAMBDA { return detail::bit_cast<word_register>(a.r[i]); });
}
TETROMINO_INLINE floats floats_of(const words& a) {
  return by_register<floats>([&](std::size_t i)
                                 TETROMINO_INLINE_LAMBDA { return detail::bit_cast<float_register>(a.r[i]); });
}
TETROMINO_INLINE floats magnitude(const floats& a) { return floats_of(bits_of(a) & broadcast(0x7FFFFFFF)); }

/// a where the flag is set, b elsewhere.
TETROMINO_INLINE floats select(const flags& f, const floats& a, const floats& b) {
  return by_register<floats>([&](std::size_t i)
                                 TETROMINO_INLINE_LAMBDA { return xsimd::select(f.r[i], a.r[i], b.r[i]); });
}
TETROMINO_INLINE words select(const flags& f, const words& a, const words& b) {
  return bits_of(select(f, floats_of(a), floats_of(b)));
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
  return shift_right<16>(bits) & broadcast(0xFFFF);
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

/// Hands back products as the rounded floats that they are; see detail::rounded.
TETROMINO_INLINE floats rounded(floats a) {
#if defined(__GNUC__)
  for (auto& r : a.r) {
    typename float_register::register_type raw = r;
#if TETROMINO_VECTOR_BITS == 512
    asm("" : "+v"(raw));
#elif defined(__aarch64__)
    asm("" : "+w"(raw));
#else
    asm("" : "+x"(raw));
#endif
    r = float_register(raw);
  }
#endif
  return a;
}

}  // namespace TETROMINO_ISA
}  // namespace tetromino::detail

TETROMINO_VECTOR_CODE_END

#endif
