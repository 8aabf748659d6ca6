#pragma once

#include "check.hpp"

#include <tetromino/execution.hpp>
#include <tetromino/packed.hpp>

#include "support/oracle.hpp"

#include <cstdint>  // std::uint32_t, std::uint64_t
#include <cstring>  // std::memcmp
#include <thread>   // std::thread
#include <utility>  // std::pair
#include <vector>   // std::vector

/// What a program may have set of its floating-point state, and calls under it.
namespace tetromino_test {

#if defined(__x86_64__)
using word = std::uint32_t;
inline constexpr word exception_flags = 0x3F;
inline const std::vector<std::pair<const char*, word> > states{{"flush to zero", 0x8000},
                                                               {"denormals are zero", 0x0040},
                                                               {"both", 0x8040},
                                                               {"downward", 0x2000},
                                                               {"upward", 0x4000},
                                                               {"towards zero", 0x6000},
                                                               {"upward, flushing", 0xC040}};
inline word state() {
  word out;
  asm volatile("stmxcsr %0" : "=m"(out));
  return out;
}
inline void set_state(word in) { asm volatile("ldmxcsr %0" : : "m"(in) : "memory"); }
#elif defined(__aarch64__)
using word = std::uint64_t;
inline constexpr word exception_flags = 0;
inline const std::vector<std::pair<const char*, word> > states{{"flush to zero", 1u << 24},
                                                               {"upward", 1u << 22},
                                                               {"downward", 2u << 22},
                                                               {"towards zero", 3u << 22},
                                                               {"upward, flushing", 5u << 22}};
inline word state() {
  word out;
  asm volatile("mrs %0, fpcr" : "=r"(out));
  return out;
}
inline void set_state(word in) { asm volatile("msr fpcr, %0" : : "r"(in) : "memory"); }
#else
using word = std::uint32_t;
inline constexpr word exception_flags = 0;
inline const std::vector<std::pair<const char*, word> > states;
inline word state() { return 0; }
inline void set_state(word) {}
#endif

/// Runs f with these bits set beside the usual ones, and looks whether they are still there.
template <class F>
auto under(word bits, const F& f) {
  const word usual = state();
  set_state(usual | bits);
  auto out = f();
  const word left = state();
  set_state(usual);
  CHECK((left & ~exception_flags) == ((usual | bits) & ~exception_flags));
  return out;
}

/// Two threads that have the same bits set.
struct odd_threads {
  word bits;
  void operator()(std::size_t count, tetromino::task_ref task) const {
    std::thread other([&] {
      set_state(state() | bits);
      for (std::size_t i = 1; i < count; i += 2) task(i);
    });
    for (std::size_t i = 0; i < count; i += 2) task(i);
    other.join();
  }
};

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
inline bool same(const tetromino::packed<tetromino::any_format>& a, const tetromino::packed<tetromino::any_format>& b) {
  return same(a.codes, b.codes) && same(a.scales, b.scales) && same(a.macros, b.macros) &&
         same(a.tensor_scales, b.tensor_scales);
}

/// Every recipe of rules, formats and macro blocks.
inline std::vector<tetromino::recipe> all_recipes() {
  std::vector<tetromino::recipe> out = plain_recipes();
  for (const char* macro : {"mbs-static", "mbs-search", "mbs-search256"}) {
    for (const tetromino::recipe& r : macro_recipes(macro)) out.push_back(r);
  }
  return out;
}

}  // namespace tetromino_test
