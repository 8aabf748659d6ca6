# cmake -D compiler= -D source= -D includes= -P check.cmake
cmake_minimum_required(VERSION 3.25)
file(READ ${source} text)
if(NOT text MATCHES "// expect: ([^\n]+)")
  message(FATAL_ERROR "${source}: no line `// expect: <regular expression>`")
endif()
set(expected "${CMAKE_MATCH_1}")
set(breaking_flags -DMUST_FAIL)
if(text MATCHES "// with: ([^\n]+)")
  separate_arguments(breaking_flags UNIX_COMMAND "${CMAKE_MATCH_1}")
endif()

set(ENV{LC_ALL} C)  # messages in English
list(TRANSFORM includes PREPEND -I)
set(command ${compiler} -std=c++20 -fsyntax-only -Werror=unused-result ${includes} ${source})

execute_process(COMMAND ${command} RESULT_VARIABLE status ERROR_VARIABLE message)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${source}: must compile as it is, but:\n${message}")
endif()

execute_process(COMMAND ${command} ${breaking_flags} RESULT_VARIABLE status ERROR_VARIABLE message)
if(status EQUAL 0)
  message(FATAL_ERROR "${source}: must not compile with ${breaking_flags}, but does")
endif()
string(REGEX MATCH "[^\n]*error: [^\n]*" first_error "${message}")
if(NOT first_error MATCHES "${expected}")
  message(FATAL_ERROR "${source}: expected a first error that matches\n  ${expected}\ngot\n${message}")
endif()
