# Builds and runs the consumer in one way: find_package, add_subdirectory, fetch_content, pkg_config, copy or
# single_header; with `flags`, such as those of a sanitizer that tetromino::cpu was built with, and `warnings`, a list with
# | between its words. It checks the bytes that it packs.
cmake_minimum_required(VERSION 3.25)
set(consumer ${CMAKE_CURRENT_LIST_DIR}/consumer)
file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})
string(REPLACE "|" ";" strict "-std=c++20|${warnings}")
string(REPLACE "|" " " cmake_flags "${flags} ${warnings}")
separate_arguments(flags UNIX_COMMAND "${flags}")

if(way MATCHES "copy|single_header")
  if(way STREQUAL "single_header")
    execute_process(
      COMMAND ${CMAKE_COMMAND} -D output=${work}/include/tetromino/tetromino.hpp -P ${source}/cmake/single_header.cmake
              COMMAND_ERROR_IS_FATAL ANY)
  else()
    file(COPY ${source}/include/tetromino DESTINATION ${work}/include)
  endif()
  execute_process(COMMAND ${compiler} ${strict} ${flags} -I ${work}/include ${consumer}/main.cpp -o ${work}/consumer
                          COMMAND_ERROR_IS_FATAL ANY)
elseif(way STREQUAL "pkg_config")
  set(ENV{PKG_CONFIG_PATH} ${prefix}/share/pkgconfig)
  execute_process(COMMAND ${pkg_config} --modversion tetromino OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE
                          COMMAND_ERROR_IS_FATAL ANY)
  if(NOT found STREQUAL version)
    message(FATAL_ERROR "pkg-config says version ${found}, not ${version}")
  endif()
  execute_process(COMMAND ${pkg_config} --cflags tetromino OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE
                          COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(found UNIX_COMMAND "${found}")
  execute_process(COMMAND ${compiler} ${strict} ${flags} ${found} ${consumer}/main.cpp -o ${work}/consumer
                          COMMAND_ERROR_IS_FATAL ANY)
  if(with_c)
    execute_process(COMMAND ${pkg_config} --cflags --libs tetromino-c OUTPUT_VARIABLE found
                            OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    separate_arguments(found UNIX_COMMAND "${found}")
    set(rpath ${found})
    list(FILTER rpath INCLUDE REGEX "^-L")
    list(TRANSFORM rpath REPLACE "^-L" "-Wl,-rpath,")
    execute_process(COMMAND ${c_compiler} -std=c99 ${flags} ${consumer}/c.c ${found} ${rpath} -o ${work}/consumer_c
                            COMMAND_ERROR_IS_FATAL ANY)
  endif()
else()
  string(REPLACE "|" ";" packages_path "${packages_path}")
  string(REPLACE "|" ";" cuda_components "${cuda_components}")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S ${consumer} -B ${work} -G ${generator} -D CMAKE_CXX_COMPILER=${compiler} -D
            CMAKE_CXX_FLAGS=${cmake_flags} -D CMAKE_CXX_SCAN_FOR_MODULES=OFF -D way=${way} -D with_cpu=${with_cpu} -D with_c=${with_c} -D CMAKE_C_FLAGS=${cmake_flags} -D "cuda_components=${cuda_components}" -D tetromino_source=${source} -D tetromino_version=${version} -D "CMAKE_PREFIX_PATH=${prefix};${packages_path}"
            COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${CMAKE_COMMAND} --build ${work} COMMAND_ERROR_IS_FATAL ANY)
endif()

execute_process(COMMAND ${work}/consumer COMMAND_ERROR_IS_FATAL ANY)
if(EXISTS ${work}/consumer_cpu)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env TETROMINO_FORCE_BACKEND=scalar ${work}/consumer_cpu scalar
                          COMMAND_ERROR_IS_FATAL ANY)
endif()
foreach(name IN ITEMS consumer_io consumer_c consumer_cuda consumer_cublaslt)
  if(EXISTS ${work}/${name})
    execute_process(COMMAND ${work}/${name} COMMAND_ERROR_IS_FATAL ANY)
  endif()
endforeach()
