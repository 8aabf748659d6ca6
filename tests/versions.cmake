# cmake -D compiler= -D nm= -D source= -D work= -P versions.cmake: every header puts what it declares into the namespace
# of its version, so that objects built with two versions share no symbol of ours.
cmake_minimum_required(VERSION 3.25)
file(GLOB_RECURSE headers ${source}/include/*.hpp ${source}/cuda/include/*.hpp ${source}/cuda/include/*.cuh)
foreach(header IN LISTS headers)
  file(STRINGS ${header} plain REGEX "^ *(inline )?namespace tetromino")
  if(plain)
    message(SEND_ERROR "${header}: `${plain}` leaves out the version; write `namespace TETROMINO_NAMESPACE`")
  endif()
endforeach()

if(NOT nm)
  message("skipped: there is no nm")
  return()
endif()
file(REMOVE_RECURSE ${work})
file(COPY ${source}/include/tetromino DESTINATION ${work}/next)
file(READ ${work}/next/tetromino/version.hpp text)
string(REGEX REPLACE "(VERSION_MAJOR) [0-9]+" "\\1 99" text "${text}")
file(WRITE ${work}/next/tetromino/version.hpp "${text}")
file(WRITE ${work}/use.cpp "#include <tetromino/packed.hpp>
#include <tetromino/scaling.hpp>
int main() {
  const auto recipe = tetromino::recipe::parse(\"nvfp4/amax\");
  return static_cast<int>(tetromino::packed<tetromino::any_format>(recipe.format, 1, 0, 16).bytes());
}
")
set(symbols_this "")
set(symbols_next "")
foreach(version IN ITEMS this next)
  set(include ${work}/next)
  if(version STREQUAL "this")
    set(include ${source}/include)
  endif()
  execute_process(COMMAND ${compiler} -std=c++20 -O0 -I${include} -c ${work}/use.cpp -o ${work}/${version}.o
                          COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${nm} --defined-only ${work}/${version}.o OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "_ZN?K?[a-zA-Z]*9tetromino[^\n]*" symbols_${version} "${text}")
  list(LENGTH symbols_${version} count)
  if(count LESS 10)
    message(FATAL_ERROR "expected at least 10 symbols of ours, got ${count}")
  endif()
endforeach()
foreach(symbol IN LISTS symbols_this)
  if(symbol IN_LIST symbols_next)
    message(SEND_ERROR "two versions share ${symbol}")
  endif()
endforeach()
