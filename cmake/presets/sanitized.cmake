# What asan.cmake and tsan.cmake share.
set(TETROMINO_TESTS ON CACHE BOOL "")
set(TETROMINO_EXAMPLES ON CACHE BOOL "")
set(TETROMINO_CPU ON CACHE BOOL "")
set(CMAKE_BUILD_TYPE Debug CACHE STRING "")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1" CACHE STRING "")
set(CMAKE_CXX_COMPILER clang++ CACHE STRING "")  # g++ takes several times as long and as much memory for this
include(${CMAKE_CURRENT_LIST_DIR}/instruction_set.cmake)
set(CMAKE_CXX_FLAGS "${sanitizer} -fno-omit-frame-pointer ${instruction_set}$ENV{CXXFLAGS}" CACHE STRING "")
set(TETROMINO_TEST_INSTRUCTION_SETS native CACHE STRING "")
set(TETROMINO_TEST_TIMEOUT 1800 CACHE STRING "")
