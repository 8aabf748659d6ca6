# Every public header compiles alone, with our warnings, next to the packages that it names: what a program or another such
# header includes first, there. (Those that few but headers of ours include do in a slow test: detail/, moe/search,
# moe/formats, and io/checkpoint and io/gguf but for their doors pack.hpp and verify.hpp.) And two translation units that
# include all of them share what they define: one in order, one in reverse, without exceptions and without vectors; both
# after others have defined words that we use as macros.
file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/tetromino/*.hpp)
list(FILTER headers EXCLUDE REGEX "/detail/macros_(off|back)[.]hpp$")  # the two ends of other headers
# What differs between instruction sets is in detail/simd/isa: other vector code has names for it.
file(GLOB_RECURSE vector_headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/tetromino/detail/simd/*.hpp)
list(FILTER vector_headers EXCLUDE REGEX "/simd/isa/")
foreach(header IN LISTS vector_headers)
  file(STRINGS ${header} lines REGEX "TETROMINO_(VECTOR_BITS|HAS_)|__(aarch64|AVX|SSE)|_mm[0-9]*_|v[a-z0-9]+q_[suf][0-9]")
  if(lines)
    message(SEND_ERROR "${header} is not in detail/simd/isa, but asks for the instruction set:\n${lines}")
  endif()
endforeach()

# Sets `out` to the header that `file` includes before anything else, and what that one includes first, and so on: where
# `file` is compiled, each of them is compiled alone.
function(tetromino_included_first file out)
  set(chain "")
  while(file)
    cmake_path(GET file PARENT_PATH folder)
    file(STRINGS ${file} lines REGEX "^#include " LIMIT_COUNT 2)
    list(FILTER lines EXCLUDE REGEX "/?detail/macros_off[.]hpp")
    set(file "")
    if(lines MATCHES "^#include [<\"]([^>\"]+)")
      foreach(root IN ITEMS ${folder} ${PROJECT_SOURCE_DIR}/include)
        cmake_path(ABSOLUTE_PATH CMAKE_MATCH_1 BASE_DIRECTORY ${root} NORMALIZE OUTPUT_VARIABLE candidate)
        if(candidate IN_LIST headers)
          set(file ${candidate})
        endif()
      endforeach()
    endif()
    list(APPEND chain ${file})
  endwhile()
  set(${out} "${chain}" PARENT_SCOPE)
endfunction()

# What few but headers of ours include.
set(details ${headers})
list(FILTER details INCLUDE REGEX "/detail/|/moe/(search|formats)/|/io/(checkpoint|gguf)/")
list(FILTER details EXCLUDE REGEX "/(pack|verify)[.]hpp$")

# Where headers are compiled alone anyway: in programs, in the two files of all headers, and in other headers.
set(first_of_all ${PROJECT_SOURCE_DIR}/include/tetromino/io/imatrix.hpp)  # of those that take long
set(last_of_all ${PROJECT_SOURCE_DIR}/include/tetromino/moe/rebalance.hpp)
set(compiled_alone ${first_of_all} ${last_of_all})
file(GLOB programs ${PROJECT_SOURCE_DIR}/examples/*.cpp ${PROJECT_SOURCE_DIR}/examples/tools/*.cpp)
foreach(source IN LISTS headers programs)
  cmake_path(GET source STEM name)
  tetromino_needs(${source} targets missing)
  if(TARGET ${name} OR (source IN_LIST headers AND NOT source IN_LIST details AND NOT missing))
    tetromino_included_first(${source} first)
    list(APPEND compiled_alone ${first})
  endif()
endforeach()

set(usable "")
set(packages_of_all "")
set(sources_of_details "")
foreach(header IN LISTS headers)
  tetromino_packages_of(${header} packages)
  tetromino_needs(${header} targets missing)
  list(JOIN packages _and_ kind)
  if(packages)
    string(PREPEND kind headers_with_)
  else()
    set(kind headers)
  endif()
  if(missing)
    if(NOT TEST ${kind})
      tetromino_skip(${kind} "the package ${missing} is not installed")
    endif()
    continue()
  endif()
  list(APPEND usable ${header})
  list(APPEND packages_of_all ${targets})
  if(header IN_LIST compiled_alone)
    continue()
  endif()
  if(header IN_LIST details)
    cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${PROJECT_SOURCE_DIR}/include OUTPUT_VARIABLE name)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/alone/${name}.cpp)
    file(CONFIGURE OUTPUT ${source} CONTENT "#include <${name}>\n")
    list(APPEND sources_of_details ${source})
    continue()
  endif()
  if(NOT TARGET ${kind})
    add_library(${kind} INTERFACE)
    set_target_properties(${kind} PROPERTIES VERIFY_INTERFACE_HEADER_SETS ON)
    target_link_libraries(${kind} INTERFACE tetromino ${targets} tetromino_warnings)
  endif()
  target_sources(${kind} INTERFACE FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR}/include FILES ${header})
endforeach()
list(REMOVE_DUPLICATES packages_of_all)

tetromino_register(headers.compile_alone package ${CMAKE_COMMAND} --build ${PROJECT_BINARY_DIR} --target
                   all_verify_interface_header_sets)
set_tests_properties(headers.compile_alone PROPERTIES RESOURCE_LOCK build_tree)

add_library(headers_of_details OBJECT EXCLUDE_FROM_ALL ${sources_of_details})
target_link_libraries(headers_of_details PRIVATE tetromino ${packages_of_all} tetromino_warnings)
add_test(NAME headers.details_compile_alone.slow CONFIGURATIONS slow
         COMMAND ${CMAKE_COMMAND} --build ${PROJECT_BINARY_DIR} --target headers_of_details)
set_tests_properties(headers.details_compile_alone.slow PROPERTIES LABELS slow RESOURCE_LOCK build_tree TIMEOUT 7200)

# All public headers in one order, and in the other without exceptions and without vectors, behind what others define.
set(includes ${usable})
list(FILTER includes EXCLUDE REGEX "/detail/")  # public headers alone bear what others define
list(REMOVE_ITEM includes ${first_of_all} ${last_of_all})
list(PREPEND includes ${first_of_all})
list(APPEND includes ${last_of_all})
list(TRANSFORM includes REPLACE "^${PROJECT_SOURCE_DIR}/include/(.*)$" "#include <\\1>\n")
foreach(direction IN ITEMS forward backward)
  list(JOIN includes "" text)
  file(
    CONFIGURE
    OUTPUT odr/${direction}.cpp
    CONTENT
      "#include <support/foreign_macros.hpp>\n@text@\n#if !defined(max) || !defined(slots)\n#error what others defined is lost\n#endif\nvoid @direction@();\nvoid @direction@() {}\n"
    @ONLY)
  list(REVERSE includes)
  add_library(test_headers_${direction} OBJECT ${CMAKE_CURRENT_BINARY_DIR}/odr/${direction}.cpp)
  target_include_directories(test_headers_${direction} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  target_compile_options(test_headers_${direction} PRIVATE -O0)
  target_link_libraries(test_headers_${direction} PRIVATE tetromino ${packages_of_all} tetromino_warnings)
endforeach()
target_compile_options(test_headers_backward PRIVATE -fno-exceptions -DTETROMINO_SIMD=0)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # all functions by name, without the machine code that would take most of the time
  target_compile_options(test_headers_backward PRIVATE -fkeep-inline-functions -flto -fno-fat-lto-objects)
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CXX_FLAGS}")
  tetromino_register(
    headers.linkage package ${CMAKE_CURRENT_SOURCE_DIR}/linkage.sh ${CMAKE_NM} ${CMAKE_CXX_COMPILER}
    ${PROJECT_SOURCE_DIR}/include $<TARGET_OBJECTS:test_headers_forward> $<TARGET_OBJECTS:test_headers_backward> ${flags})
endif()
