#pragma once

#include "check.hpp"

#include <tetromino/error.hpp>

/// The kind of error that a call returned; fails the test if it returned a value.
template <class T>
tetromino::errc code_of(const tetromino::result<T>& r) {
  REQUIRE_FALSE(r.has_value());
  return r.error().code();
}
