# Tests and examples, for one who changes things: cmake -C cmake/presets/dev.cmake -B build
set(TETROMINO_TESTS ON CACHE BOOL "")
set(TETROMINO_EXAMPLES ON CACHE BOOL "")
set(TETROMINO_CPU ON CACHE BOOL "")
set(TETROMINO_C ON CACHE BOOL "")
set(CMAKE_BUILD_TYPE Release CACHE STRING "")
set(CMAKE_CXX_FLAGS_RELEASE "-Og" CACHE STRING "")  # three quarters of what g++ takes for -O1; for clang, the same
set(CMAKE_CUDA_FLAGS_RELEASE "-O1" CACHE STRING "")  # of host code
include(${CMAKE_CURRENT_LIST_DIR}/instruction_set.cmake)
set(CMAKE_CXX_FLAGS "${instruction_set}$ENV{CXXFLAGS}" CACHE STRING "")
set(CMAKE_EXPORT_COMPILE_COMMANDS ON CACHE BOOL "")
