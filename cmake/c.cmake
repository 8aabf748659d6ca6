# tetromino::c: the C interface as a shared library, with the kernels of tetromino::cpu inside. Its one source is a line:
# it includes the header that has the functions.
set(source ${CMAKE_CURRENT_BINARY_DIR}/cpu/c.cpp)
file(CONFIGURE OUTPUT ${source} CONTENT "#include <tetromino/detail/c.hpp>\n" @ONLY)
add_library(tetromino_c SHARED ${source})
add_library(tetromino::c ALIAS tetromino_c)
set_target_properties(
  tetromino_c
  PROPERTIES EXPORT_NAME c
             OUTPUT_NAME tetromino
             VERSION ${PROJECT_VERSION}
             SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
             CXX_VISIBILITY_PRESET hidden
             VISIBILITY_INLINES_HIDDEN ON)
target_sources(tetromino_c PUBLIC FILE_SET HEADERS BASE_DIRS include FILES include/tetromino/c.h)
target_compile_definitions(tetromino_c PRIVATE TETROMINO_C_INSTANCE)
target_link_libraries(tetromino_c PRIVATE tetromino_cpu)
if(UNIX AND NOT APPLE)
  target_link_options(tetromino_c PRIVATE -Wl,--exclude-libs,ALL)  # the C functions alone are seen
endif()

if(TETROMINO_INSTALL)
  install(TARGETS tetromino_c EXPORT tetromino-c-targets FILE_SET HEADERS)
  install(EXPORT tetromino-c-targets NAMESPACE tetromino:: DESTINATION ${package_dir})
  configure_file(cmake/tetromino-c.pc.in tetromino-c.pc @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/tetromino-c.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
endif()
