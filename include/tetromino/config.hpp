#pragma once

#include "detail/macros_off.hpp"

/// The only header that asks the compiler anything. Everything else uses the names defined here.

#if !defined(__cplusplus) || __cplusplus < 202002L
#error "tetromino needs C++20 (pass -std=c++20 or newer)"
#endif

#if defined(__FAST_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(_M_FP_FAST) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error \
    "tetromino gives the same bytes everywhere, which -ffast-math breaks: compile what includes it with -fno-fast-math"
#endif

#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error \
    "tetromino gives the same bytes everywhere, for which floats must be computed as floats: compile with -mfpmath=sse"
#endif

#include "version.hpp"  // TETROMINO_NAMESPACE

#include <cstddef>      // std::size_t
#include <type_traits>  // std::is_constant_evaluated

static_assert(sizeof(1.0) == sizeof(double),
              "tetromino gives the same bytes everywhere, which -fsingle-precision-constant breaks");

/// 1 while device code is being compiled, 0 on the host.
#if defined(__CUDA_ARCH__)
#define TETROMINO_DEVICE_CODE 1
#else
#define TETROMINO_DEVICE_CODE 0
#endif

/// 1 when exceptions are enabled. Without them an unhandled tetromino::error prints its message and aborts;
/// use the `try_` forms, which return a tetromino::result instead.
#if defined(__cpp_exceptions)
#define TETROMINO_EXCEPTIONS 1
#else
#define TETROMINO_EXCEPTIONS 0
#endif

/// The instruction set that this translation unit is compiled for, as far as the `simd` backend makes use of it.
/// TETROMINO_ISA is its name, TETROMINO_VECTOR_BITS the width of its registers, and
/// TETROMINO_HAS_FMA, _F16C, _VNNI (with VBMI on AVX-512; the dot product on NEON), _BF16 (AVX512_BF16 beside them) and
/// _AMX (AMX_INT8 beside all of these) are 1 where it may use those.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TETROMINO_VECTOR_BITS 512
#define TETROMINO_HAS_FMA 1
#define TETROMINO_HAS_F16C 1
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define TETROMINO_HAS_VNNI 1
#if defined(__AVX512BF16__)
#define TETROMINO_HAS_BF16 1
#if defined(__AMX_INT8__) || defined(__AMXINT8__)  // clang 14
#define TETROMINO_HAS_AMX 1
#define TETROMINO_ISA avx512_amx
#else
#define TETROMINO_HAS_AMX 0
#define TETROMINO_ISA avx512_bf16
#endif
#else
#define TETROMINO_HAS_BF16 0
#define TETROMINO_HAS_AMX 0
#define TETROMINO_ISA avx512_vnni
#endif
#else
#define TETROMINO_HAS_VNNI 0
#define TETROMINO_HAS_BF16 0
#define TETROMINO_HAS_AMX 0
#define TETROMINO_ISA avx512
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TETROMINO_VECTOR_BITS 256
#define TETROMINO_HAS_FMA 1
#define TETROMINO_HAS_F16C 1
#if defined(__AVXVNNI__)
#define TETROMINO_HAS_VNNI 1
#define TETROMINO_ISA avx2_vnni
#else
#define TETROMINO_HAS_VNNI 0
#define TETROMINO_ISA avx2_f16c
#endif
#elif defined(__AVX2__)
#define TETROMINO_VECTOR_BITS 256
#define TETROMINO_HAS_F16C 0
#define TETROMINO_HAS_VNNI 0
#if defined(__FMA__)
#define TETROMINO_HAS_FMA 1
#define TETROMINO_ISA avx2_fma
#else
#define TETROMINO_HAS_FMA 0
#define TETROMINO_ISA avx2
#endif
#elif defined(__SSE2__) || defined(_M_X64)
#define TETROMINO_VECTOR_BITS 128
#define TETROMINO_HAS_FMA 0
#define TETROMINO_HAS_F16C 0
#define TETROMINO_HAS_VNNI 0
#if defined(__AVX__)
#define TETROMINO_ISA avx
#elif defined(__SSE4_1__)
#define TETROMINO_ISA sse4
#elif defined(__SSSE3__) || defined(__SSE3__)
#define TETROMINO_ISA ssse3
#else
#define TETROMINO_ISA sse2
#endif
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define TETROMINO_VECTOR_BITS 128
#define TETROMINO_HAS_FMA 1
#define TETROMINO_HAS_F16C 0
#if defined(__ARM_FEATURE_DOTPROD)
#define TETROMINO_HAS_VNNI 1
#define TETROMINO_ISA neon_dotprod
#else
#define TETROMINO_HAS_VNNI 0
#define TETROMINO_ISA neon
#endif
#else
#define TETROMINO_VECTOR_BITS 0
#define TETROMINO_ISA generic
#endif

/// 1 where the `simd` backend is available: the instruction set is one of those above, its one dependency, xsimd, is
/// found, and the compiler (g++ or clang++) has vectors with operators. Define it to 0 to do without.
#if !defined(TETROMINO_SIMD)
#if defined(__GNUC__) && __has_include(<xsimd/xsimd.hpp>) && TETROMINO_VECTOR_BITS && !defined(__CUDACC__)
#define TETROMINO_SIMD 1
#else
#define TETROMINO_SIMD 0
#endif
#endif

/// Marks a type that lies over memory which other code reads and writes as another type, such as its own halves.
#if defined(__GNUC__)
#define TETROMINO_MAY_ALIAS __attribute__((may_alias))
#else
#define TETROMINO_MAY_ALIAS
#endif

/// Marks the small functions that vector kernels are made of: a call between them would cost more than their work.
#if defined(__GNUC__)
#define TETROMINO_INLINE inline __attribute__((always_inline))
#define TETROMINO_INLINE_LAMBDA __attribute__((always_inline))
#else
#define TETROMINO_INLINE inline
#define TETROMINO_INLINE_LAMBDA
#endif

/// Marks a function that stays one, and is not copied into its callers; and one that is seldom called besides, such as
/// one that makes an error: compilers then look for a short program rather than a quick one.
#if defined(__GNUC__)
#define TETROMINO_OUTLINE __attribute__((noinline))
#define TETROMINO_COLD __attribute__((noinline, cold))
#else
#define TETROMINO_OUTLINE
#define TETROMINO_COLD
#endif

/// Around code that uses vector intrinsics: those of g++ 12 leave a register undefined on purpose, and are warned of it
/// where they are inlined; without optimization some are macros that mix signs.
#if defined(__GNUC__) && !defined(__clang__)
#define TETROMINO_VECTOR_CODE_BEGIN                                                    \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wuninitialized\"") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")                      \
          _Pragma("GCC diagnostic ignored \"-Wsign-conversion\"")
#define TETROMINO_VECTOR_CODE_END _Pragma("GCC diagnostic pop")
#else
#define TETROMINO_VECTOR_CODE_BEGIN
#define TETROMINO_VECTOR_CODE_END
#endif

/// What happens when a caller breaks a precondition (a bug in the caller, not bad data): by default, the place, the
/// message and the values are printed and the program is aborted. Define it before the first include, the same in the
/// whole program, to do something else, such as throw. `message` is a literal; `values` is a const char* such as
/// "layer = 7, layers_ = 4", which may be empty.
#if !defined(TETROMINO_PRECONDITION_FAILED)
#define TETROMINO_PRECONDITION_FAILED(message, values) \
  ::tetromino::detail::precondition_failed(message, values, __FILE__, __LINE__)
#endif

/// States a precondition of a public call, what it means, and the numbers to show when it is broken: checked in debug
/// builds, or whenever TETROMINO_CHECKED is defined.
#if (!defined(NDEBUG) || defined(TETROMINO_CHECKED)) && !TETROMINO_DEVICE_CODE
#define TETROMINO_EXPECTS(condition, message, ...)                                                                  \
  static_cast<void>((condition) ||                                                                                  \
                    (TETROMINO_PRECONDITION_FAILED(                                                                 \
                         message, ::tetromino::detail::named_values(#__VA_ARGS__ __VA_OPT__(, ) __VA_ARGS__).text), \
                     false))
#else
#define TETROMINO_EXPECTS(condition, message, ...) static_cast<void>(0)
#endif

#define TETROMINO_TEXT(x) #x
#define TETROMINO_TEXT_OF(x) TETROMINO_TEXT(x)
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {
inline constexpr const char* isa_name = TETROMINO_TEXT_OF(TETROMINO_ISA);
}

/// A kernel of tetromino::cpu shares no code with what the program is made of; see detail/dispatch/instance.hpp.
#if defined(TETROMINO_CPU_INSTANCE)
#undef TETROMINO_ISA
#define TETROMINO_ISA TETROMINO_CPU_INSTANCE
#endif

/// Translation units compiled for different instruction sets can be linked into one program: data types are the same in
/// all of them, functions are not, since linkers keep one copy of an inline function, and it could be one that the CPU
/// at hand cannot run. Functions are in the inline namespace TETROMINO_ISA; members of shared types, which cannot be,
/// carry its name as a tag. What calls either is one of them.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define TETROMINO_ABI __attribute__((abi_tag(TETROMINO_TEXT_OF(TETROMINO_ISA))))
#else
#define TETROMINO_ABI
#endif

/// Marks a function that CUDA device code may call too.
#if defined(__CUDACC__)
#define TETROMINO_HD __host__ __device__
#else
#define TETROMINO_HD TETROMINO_ABI
#endif

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// False whatever T is: for a static_assert that says why a call is wrong.
template <class T>
inline constexpr bool never = false;

/// std::bit_cast for device code too.
template <class To, class From>
[[nodiscard]] TETROMINO_HD constexpr To bit_cast(const From& from) noexcept {
  return __builtin_bit_cast(To, from);
}

/// Hands back `x` as the rounded float that it is. Compilers may contract a product into a following addition
/// (fused multiply-add), which would change results between instruction sets; where the specification counts on two
/// roundings, the product goes through here.
TETROMINO_HD constexpr float rounded(float x) noexcept {
#if TETROMINO_DEVICE_CODE
  return __fadd_rn(x, -0.0f);
#else
  if (!std::is_constant_evaluated()) {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__)) && defined(__SSE__)
    asm("" : "+x"(x));
#elif defined(__GNUC__) && defined(__aarch64__)
    asm("" : "+w"(x));
#else
    volatile float kept = x;
    x = kept;
#endif
  }
  return x;
#endif
}
/// The same for products in memory, which compilers can then compute as vectors.
template <std::size_t N>
void round_in_place(float (&x)[N]) noexcept {
#if defined(__GNUC__)
  asm("" : "+m"(x));
#else
  for (float& v : x) v = rounded(v);
#endif
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "detail/precondition.hpp"  // named_values, precondition_failed

#include "detail/macros_back.hpp"
