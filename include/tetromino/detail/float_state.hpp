#pragma once

#include "../config.hpp"  // TETROMINO_ISA

#include <cstdint>  // std::uint32_t

#if !defined(__GNUC__) || !(defined(__SSE__) || defined(__aarch64__))
#include <cfenv>  // std::fegetenv, std::fesetenv
#endif

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// While it lives, its thread rounds to nearest even, keeps subnormal numbers and traps nothing, whatever the program
/// has set, so that bytes do not depend on it. Afterwards the program's own settings and exception flags are back.
class default_float_state {
 public:
  default_float_state() noexcept {
    if ((saved_ & settings) != usual) write(usual);
  }
  ~default_float_state() {
    if ((saved_ & settings) != usual) write(saved_);
  }
  default_float_state(const default_float_state&) = delete;
  default_float_state& operator=(const default_float_state&) = delete;

 private:
  // The memory clobber keeps what is loaded, computed and stored between the two writes from moving past them.
#if defined(__GNUC__) && defined(__SSE__)
  using word = std::uint32_t;                                       // MXCSR
  static constexpr word usual = 0x1F80, settings = 0xFFFF & ~0x3F;  // without the exception flags
  static word read() noexcept {
    word state;
    asm volatile("stmxcsr %0" : "=m"(state));
    return state;
  }
  static void write(word state) noexcept { asm volatile("ldmxcsr %0" : : "m"(state) : "memory"); }
#elif defined(__GNUC__) && defined(__aarch64__)
  using word = std::uint64_t;  // FPCR
  static constexpr word usual = 0, settings = ~word{0};
  static word read() noexcept {
    word state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void write(word state) noexcept { asm volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
#else
  // The environment is kept beside a word that says "not the usual one".
  using word = std::uint32_t;
  static constexpr word usual = 0, settings = 1;
  word read() noexcept { return std::fegetenv(&environment_), word{1}; }
  void write(word state) noexcept { std::fesetenv(state == usual ? FE_DFL_ENV : &environment_); }
  std::fenv_t environment_;
#endif

  word saved_ = read();
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
