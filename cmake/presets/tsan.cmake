# ThreadSanitizer: cmake -C cmake/presets/tsan.cmake -B build
set(sanitizer "-fsanitize=thread")
include(${CMAKE_CURRENT_LIST_DIR}/sanitized.cmake)
