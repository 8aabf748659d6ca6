# AddressSanitizer: cmake -C cmake/presets/asan.cmake -B build
# Without use after scope, whose checks of every temporary make the vector code several times as long.
set(sanitizer "-fsanitize=address -fno-sanitize-address-use-after-scope")
include(${CMAKE_CURRENT_LIST_DIR}/sanitized.cmake)
