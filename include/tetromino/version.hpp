#pragma once

/// The version of Tetromino, read by CMake from this header.
#define TETROMINO_VERSION_MAJOR 0
#define TETROMINO_VERSION_MINOR 1
#define TETROMINO_VERSION_PATCH 0

/// The namespace that all of this version is in: `tetromino`, and inside it an inline one named after the version, so
/// that a program can hold two libraries which were built with different versions.
#define TETROMINO_VERSIONED(major, minor) tetromino::inline v##major##_##minor
#define TETROMINO_NAMESPACE_OF(major, minor) TETROMINO_VERSIONED(major, minor)
#define TETROMINO_NAMESPACE TETROMINO_NAMESPACE_OF(TETROMINO_VERSION_MAJOR, TETROMINO_VERSION_MINOR)
