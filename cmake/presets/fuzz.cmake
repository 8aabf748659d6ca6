# libFuzzer on every target in tests/fuzz, a minute each: cmake -C cmake/presets/fuzz.cmake -B build
# For longer: -D TETROMINO_FUZZ_SECONDS=3600. What it finds is kept in build/tests/fuzz.
set(CMAKE_CXX_COMPILER clang++ CACHE STRING "")
set(CMAKE_BUILD_TYPE Debug CACHE STRING "")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1" CACHE STRING "")
set(CMAKE_CXX_FLAGS "-march=x86-64-v3" CACHE STRING "")  # the widest vectors against the scalar reference
set(TETROMINO_EXAMPLES OFF CACHE BOOL "")
set(TETROMINO_FUZZ_SECONDS 60 CACHE STRING "")
set(TETROMINO_TEST_TIMEOUT 86400 CACHE STRING "")
