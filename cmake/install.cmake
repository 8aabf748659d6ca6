# What `cmake --install` puts in place: headers, the CMake package, the pkg-config file and the licence.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/tetromino)
configure_package_config_file(
  cmake/tetromino-config.cmake.in tetromino-config.cmake INSTALL_DESTINATION ${package_dir}
  NO_SET_AND_CHECK_MACRO)
set(architecture ARCH_INDEPENDENT)
if(TETROMINO_CPU OR TETROMINO_C OR TETROMINO_CUDA)
  set(architecture "")
endif()
write_basic_package_version_file(tetromino-config-version.cmake COMPATIBILITY SameMinorVersion ${architecture})
configure_file(cmake/tetromino.pc.in tetromino.pc @ONLY)

install(TARGETS tetromino tetromino_io EXPORT tetromino-targets FILE_SET HEADERS)
install(EXPORT tetromino-targets NAMESPACE tetromino:: DESTINATION ${package_dir})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/tetromino-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/tetromino-config-version.cmake DESTINATION ${package_dir})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/tetromino.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/tetromino)

# All headers that need no package, as one file in the build folder.
add_custom_target(
  tetromino_single_header
  COMMAND ${CMAKE_COMMAND} -D output=${CMAKE_CURRENT_BINARY_DIR}/single/tetromino.hpp -P
          ${CMAKE_CURRENT_SOURCE_DIR}/cmake/single_header.cmake
  BYPRODUCTS ${CMAKE_CURRENT_BINARY_DIR}/single/tetromino.hpp)
