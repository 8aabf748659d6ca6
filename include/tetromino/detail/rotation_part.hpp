#pragma once

#include "../version.hpp"  // TETROMINO_NAMESPACE

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

namespace TETROMINO_NAMESPACE::detail {

/// A rotation of some columns of a row: how long its blocks are, what scales them at the end, and the sign bits to flip
/// before (null: none).
struct rotation_part {
  std::size_t size;
  float scale;
  const std::uint32_t* signs;
};

}  // namespace TETROMINO_NAMESPACE::detail
