# Benchmarks and examples, for this machine alone: cmake -C cmake/presets/release.cmake -B build
set(CMAKE_BUILD_TYPE Release CACHE STRING "")
set(CMAKE_CXX_FLAGS "-march=native $ENV{CXXFLAGS}" CACHE STRING "")
set(TETROMINO_EXAMPLES ON CACHE BOOL "")
set(TETROMINO_CPU ON CACHE BOOL "")
set(TETROMINO_BENCHMARKS ON CACHE BOOL "")
