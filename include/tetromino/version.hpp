#pragma once

/// The version of Tetromino, read by CMake from this header.
#define TETROMINO_VERSION_MAJOR 0
#define TETROMINO_VERSION_MINOR 1
#define TETROMINO_VERSION_PATCH 0
