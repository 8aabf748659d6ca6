# Tests and examples, for one who changes things: cmake -C cmake/presets/dev.cmake -B build
set(CMAKE_BUILD_TYPE Release CACHE STRING "")
set(CMAKE_CXX_FLAGS_RELEASE "-O1" CACHE STRING "")
set(CMAKE_CUDA_FLAGS_RELEASE "-O1" CACHE STRING "")  # of host code
# with wide vectors this compiles several times faster than with SSE2, which the tests in isa/ look at
set(CMAKE_CXX_FLAGS "-march=x86-64-v3" CACHE STRING "")
set(CMAKE_EXPORT_COMPILE_COMMANDS ON CACHE BOOL "")
