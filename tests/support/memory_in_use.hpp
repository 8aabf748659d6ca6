#pragma once

/// Counts the bytes that operator new has given and not got back. Include it in one file of a test program; where a
/// sanitizer has its own operator new (see sanitized.hpp), nothing is counted.

#include "support/sanitized.hpp"

#include <malloc.h>  // ::malloc_usable_size

#include <atomic>   // std::atomic
#include <cstddef>  // std::size_t
#include <cstdlib>  // std::malloc, std::free
#include <new>      // std::bad_alloc

namespace tetromino_test {

inline std::atomic<std::size_t> memory_in_use = 0, most_memory_in_use = 0;

}  // namespace tetromino_test

#if !defined(TETROMINO_TEST_SHADOW_MEMORY)
// kept out of line, or g++ takes malloc and delete for a mismatch
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* const p = std::malloc(bytes > 0 ? bytes : 1);
  if (p == nullptr) throw std::bad_alloc();
  const std::size_t now = tetromino_test::memory_in_use += ::malloc_usable_size(p);
  if (now > tetromino_test::most_memory_in_use) tetromino_test::most_memory_in_use = now;
  return p;
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  if (p != nullptr) tetromino_test::memory_in_use -= ::malloc_usable_size(p);
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { operator delete(p); }
#endif
