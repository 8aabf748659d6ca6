# Configures without any option and installs without building: headers and package files, nothing else, arrive.
cmake_minimum_required(VERSION 3.25)
file(REMOVE_RECURSE ${work})
unset(ENV{DESTDIR})
execute_process(COMMAND ${CMAKE_COMMAND} -S ${source} -B ${work}/build -D CMAKE_CXX_COMPILER=${compiler}
                        COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_COMMAND} --install ${work}/build --prefix ${work}/prefix COMMAND_ERROR_IS_FATAL ANY)

file(GLOB_RECURSE installed RELATIVE ${work}/prefix ${work}/prefix/*)
file(GLOB_RECURSE headers RELATIVE ${source} ${source}/include/*.hpp)
list(FILTER installed EXCLUDE REGEX "/cmake/tetromino/tetromino-[a-z-]+[.]cmake$|^share/(pkgconfig|licenses)/")
list(SORT installed)
list(SORT headers)
if(NOT installed STREQUAL headers)
  message(FATAL_ERROR "expected the headers and package files, got ${installed}")
endif()

file(WRITE ${work}/user/CMakeLists.txt
     "cmake_minimum_required(VERSION 3.25)\nproject(user LANGUAGES CXX)\nfind_package(tetromino REQUIRED)\n")
execute_process(COMMAND ${CMAKE_COMMAND} -S ${work}/user -B ${work}/user/build -D CMAKE_CXX_COMPILER=${compiler} -D
                        CMAKE_PREFIX_PATH=${work}/prefix COMMAND_ERROR_IS_FATAL ANY)
