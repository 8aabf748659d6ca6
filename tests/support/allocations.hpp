#pragma once

/// Counts what operator new is asked for. Include it in one file of a test program.

#include <cstddef>  // std::size_t
#include <cstdlib>  // std::malloc, std::free
#include <new>      // std::bad_alloc, std::nothrow_t

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TETROMINO_TEST_KEEPS_NEW  // ThreadSanitizer comes with an operator new that cannot be replaced
#endif
#endif

namespace tetromino_test {

inline std::size_t allocations = 0;
#if defined(TETROMINO_TEST_KEEPS_NEW)
inline constexpr bool counts_allocations = false;
#else
inline constexpr bool counts_allocations = true;
#endif

}  // namespace tetromino_test

#if !defined(TETROMINO_TEST_KEEPS_NEW)
// kept out of line, or g++ takes malloc and delete for a mismatch
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++tetromino_test::allocations;
  if (void* const p = std::malloc(bytes > 0 ? bytes : 1)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++tetromino_test::allocations;
  return std::malloc(bytes > 0 ? bytes : 1);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
#endif
