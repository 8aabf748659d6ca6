# What asan.cmake and tsan.cmake share.
set(CMAKE_BUILD_TYPE Debug CACHE STRING "")
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g1" CACHE STRING "")
set(CMAKE_CXX_COMPILER clang++ CACHE STRING "")  # g++ takes several times as long and as much memory for this
# with wide vectors this compiles many times faster than with SSE2
set(CMAKE_CXX_FLAGS "${sanitizer} -fno-omit-frame-pointer -march=x86-64-v3" CACHE STRING "")
set(TETROMINO_TEST_INSTRUCTION_SETS native CACHE STRING "")
set(TETROMINO_TEST_TIMEOUT 1800 CACHE STRING "")
