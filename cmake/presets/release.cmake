# Benchmarks and examples, as fast as this machine goes: cmake -C cmake/presets/release.cmake -B build
set(CMAKE_BUILD_TYPE Release CACHE STRING "")
set(CMAKE_CXX_FLAGS "-march=native" CACHE STRING "")
set(TETROMINO_TESTS OFF CACHE BOOL "")
set(TETROMINO_BENCHMARKS ON CACHE BOOL "")
