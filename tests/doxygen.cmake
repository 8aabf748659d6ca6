# cmake -D doxygen= -D source= -D work= -P doxygen.cmake: Doxygen reads the public headers as cmake/Doxyfile says; a comment
# that it cannot make sense of, or a class or enumeration without one, is an error. (A throwing call shares the comment of
# its try_ form.)
cmake_minimum_required(VERSION 3.25)
file(MAKE_DIRECTORY ${work})
file(REMOVE ${work}/warnings.log)
file(
  WRITE ${work}/Doxyfile
  "
@INCLUDE = ${source}/cmake/Doxyfile
INPUT = ${source}/include/tetromino ${source}/cuda/include/tetromino/cuda.hpp
USE_MDFILE_AS_MAINPAGE =
GENERATE_HTML = NO
GENERATE_XML = YES
WARN_LOGFILE = ${work}/warnings.log
OUTPUT_DIRECTORY = ${work}
")
execute_process(COMMAND ${doxygen} ${work}/Doxyfile COMMAND_ERROR_IS_FATAL ANY)

file(STRINGS ${work}/warnings.log warnings)
list(FILTER warnings EXCLUDE REGEX "Member .* is not documented|Internal inconsistency|Compound .*<.* is not documented")
if(warnings)
  list(JOIN warnings "\n" text)
  message(FATAL_ERROR "Doxygen complains:\n${text}")
endif()
