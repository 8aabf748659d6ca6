#pragma once

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TETROMINO_TEST_SHADOW_MEMORY
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TETROMINO_TEST_SHADOW_MEMORY
#endif

namespace tetromino_test {

/// Whether the memory of a program is all its own: a sanitizer keeps more for each byte, and freed bytes for a while.
#if defined(TETROMINO_TEST_SHADOW_MEMORY)
inline constexpr bool measures_memory = false;
#else
inline constexpr bool measures_memory = true;
#endif

}  // namespace tetromino_test
