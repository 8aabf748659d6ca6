# UndefinedBehaviorSanitizer: cmake -C cmake/presets/ubsan.cmake -B build
# Without what the fuzz targets look for, since in every test it would take minutes to compile each: null pointers,
# alignment, sizes of objects.
set(sanitizer "-fsanitize=undefined -fno-sanitize=null,alignment,object-size,vptr -fno-sanitize-recover=all")
include(${CMAKE_CURRENT_LIST_DIR}/sanitized.cmake)
# the tests in isa/ look at the same kernels for this machine
set(TETROMINO_CPU_OPTIONS -fno-sanitize=undefined CACHE STRING "")
