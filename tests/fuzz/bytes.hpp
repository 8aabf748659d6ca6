#pragma once

/// Splits the bytes of a fuzz input into choices, and numbers or buffers made of what is left.

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <cstring>    // std::memcpy
#include <vector>     // std::vector

class fuzz_bytes {
 public:
  fuzz_bytes(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

  [[nodiscard]] std::size_t left() const noexcept { return left_; }

  /// The next bytes as a plain value; zeros once they run out.
  template <class T>
  T next() {
    T value{};
    const std::size_t n = std::min(sizeof(T), left_);
    std::memcpy(&value, data_, n);
    data_ += n;
    left_ -= n;
    return value;
  }
  /// A number below `end`, from one byte.
  std::size_t below(std::size_t end) { return next<std::uint8_t>() % end; }

  /// `count` values of the next bytes, which are used again from their start once they run out.
  template <class T>
  std::vector<T> fill(std::size_t count) {
    std::vector<T> out(count);
    auto* const to = reinterpret_cast<std::uint8_t*>(out.data());
    const std::size_t n = left_ == 0 ? 0 : count * sizeof(T);
    for (std::size_t i = 0; i < n; ++i) to[i] = data_[i % left_];
    const std::size_t used = std::min(n, left_);
    data_ += used;
    left_ -= used;
    return out;
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};
