# AddressSanitizer and UndefinedBehaviorSanitizer: cmake -C cmake/presets/asan.cmake -B build
# Vector code takes minutes to compile with both: of the tests, those in isa/ have it; tetromino::cpu has the first alone.
set(sanitizer "-fsanitize=address,undefined -fno-sanitize-recover=all -DTETROMINO_SIMD=0")
include(${CMAKE_CURRENT_LIST_DIR}/sanitized.cmake)
set(TETROMINO_CPU_OPTIONS -UTETROMINO_SIMD -fno-sanitize=undefined CACHE STRING "")
