# tetromino_warnings: what our own programs are compiled with. Nothing that users link carries it.
add_library(tetromino_warnings INTERFACE)
if(MSVC)
  target_compile_options(tetromino_warnings INTERFACE /W4 /WX)
else()
  target_compile_options(
    tetromino_warnings
    INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror>
              # g++ sees this in the standard library under sanitizers, and g++ 12 a thousand times in its own AVX-512
              # intrinsics, where it is not so
              $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>
              # Catch2's macros use __COUNTER__, to which clang objects from version 22 on
              $<$<AND:$<COMPILE_LANG_AND_ID:CXX,Clang>,$<VERSION_GREATER_EQUAL:$<CXX_COMPILER_VERSION>,22>>:-Wno-c2y-extensions>)
endif()
