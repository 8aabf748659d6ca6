# libFuzzer on every target in tests/fuzz, a minute each: cmake -C cmake/presets/fuzz.cmake -B build
# For longer: -D TETROMINO_FUZZ_SECONDS=3600. What it finds is kept in build/tests/fuzz.
set(CMAKE_CXX_COMPILER clang++ CACHE STRING "")
set(CMAKE_BUILD_TYPE Debug CACHE STRING "")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1" CACHE STRING "")
include(${CMAKE_CURRENT_LIST_DIR}/instruction_set.cmake)
set(CMAKE_CXX_FLAGS "${instruction_set}$ENV{CXXFLAGS}" CACHE STRING "")
set(TETROMINO_TESTS ON CACHE BOOL "")
set(TETROMINO_FUZZ_SECONDS 60 CACHE STRING "")
set(TETROMINO_TEST_TIMEOUT 86400 CACHE STRING "")
