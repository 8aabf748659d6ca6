# tetromino::cpu: the kernels of the simd policy for each instruction set that the target CPU may have, and the choice
# between them at run time. Each source is one line: it includes the header that makes a table of kernels.
add_library(tetromino_cpu STATIC)
add_library(tetromino::cpu ALIAS tetromino_cpu)
set_target_properties(tetromino_cpu PROPERTIES EXPORT_NAME cpu POSITION_INDEPENDENT_CODE ON)
target_link_libraries(tetromino_cpu PUBLIC tetromino)

# tetromino_cpu_source(NAME HEADER OPTIONS...)
function(tetromino_cpu_source name header)
  set(source ${CMAKE_CURRENT_BINARY_DIR}/cpu/${name}.cpp)
  file(CONFIGURE OUTPUT ${source} CONTENT "#include <tetromino/detail/dispatch/${header}>\n" @ONLY)
  target_sources(tetromino_cpu PRIVATE ${source})
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${ARGN}")
endfunction()

# Options of the project, such as -march=native, must not reach the tables: the last -march counts. Without optimization
# inline functions would be shared between them.
set(TETROMINO_CPU_OPTIONS "" CACHE STRING "Further options of the compiler for the kernels of tetromino::cpu")
mark_as_advanced(TETROMINO_CPU_OPTIONS)
function(tetromino_cpu_tables name parts)
  foreach(part IN LISTS parts)
    string(TOLOWER ${part} file)
    tetromino_cpu_source(${file}_${name} instance.hpp -O2 ${ARGN} ${TETROMINO_CPU_OPTIONS}
                         -DTETROMINO_CPU_INSTANCE=cpu_${name}
                         -DTETROMINO_CPU_${part}=1)
  endforeach()
endfunction()

set(tables 1)
if((TARGET xsimd OR TARGET xsimd::xsimd) AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" AND NOT MSVC)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(tables 2)
    set(avx2 -march=x86-64 -mavx2 -mfma -mf16c)
    set(avx512 -march=x86-64 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd)
    tetromino_cpu_tables(sse2 "ROWS;MATMUL" -march=x86-64)
    tetromino_cpu_tables(avx2 "ROWS;MATMUL" ${avx2})
    tetromino_cpu_tables(avx2_vnni MATMUL ${avx2} -mavxvnni)
    tetromino_cpu_tables(avx512 "ROWS;MATMUL" ${avx512})
    tetromino_cpu_tables(avx512_vnni MATMUL ${avx512} -mavx512vnni -mavx512vbmi)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    set(tables 2)
    tetromino_cpu_tables(neon "ROWS;MATMUL" -march=armv8-a)
    tetromino_cpu_tables(neon_dotprod MATMUL -march=armv8.2-a+dotprod)
  endif()
endif()
if(tables EQUAL 1)
  message(STATUS "tetromino::cpu has the scalar backend alone: it needs xsimd, g++ or clang++, and x86-64 or 64-bit ARM")
endif()
tetromino_cpu_source(select select.hpp -DTETROMINO_CPU_SELECT=${tables})

if(TETROMINO_INSTALL)
  install(TARGETS tetromino_cpu EXPORT tetromino-cpu-targets)
  install(EXPORT tetromino-cpu-targets NAMESPACE tetromino:: DESTINATION ${package_dir})
endif()
