#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"                // bit_cast, round_in_place
#include "detail/for_each_row.hpp"   // for_each_row
#include "detail/rotation_part.hpp"  // rotation_part
#include "detail/sizes.hpp"          // check_sizes
#include "error.hpp"                 // error, result
#include "execution.hpp"             // scalar_t, attached
#include "float16.hpp"               // to_float, from_float
#include "matrix.hpp"                // batch_view
#include "rounding.hpp"              // philox4x32

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint64_t
#include <optional>   // std::optional
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE {

/// A block-Hadamard rotation along K: every `size` consecutive columns are multiplied by the orthonormal Hadamard
/// matrix H / sqrt(size), after random signs where a seed is given. It spreads outliers over their block before
/// packing. Weights and activations rotated alike have the same products as before, since (x R)(w R)^T = x w^T. A tail
/// shorter than `size` stays as it is.
struct hadamard {
  std::size_t size = 32;                     ///< 16, 32, 64 or 128
  std::optional<std::uint64_t> sign_seed{};  ///< column k changes sign where the stream's word k is odd

  friend TETROMINO_ABI bool operator==(const hadamard&, const hadamard&) = default;
};

namespace detail::inline TETROMINO_ISA {

/// Rotates on the CPU, one element at a time as far as the source goes: the reference.
struct scalar_rotation {
  /// Rotates row[n] in place; a tail shorter than a block stays as it is.
  static void rotate(const rotation_part& part, float* row, std::size_t n) {
    for (std::size_t k = 0; k + part.size <= n; k += part.size) {
      flip(part, row, k);
      butterflies(part, row + k);
    }
  }
  /// The inverse.
  static void revert(const rotation_part& part, float* row, std::size_t n) {
    for (std::size_t k = 0; k + part.size <= n; k += part.size) {
      butterflies(part, row + k);
      flip(part, row, k);
    }
  }

 private:
  static void flip(const rotation_part& part, float* row, std::size_t k) {
    if (part.signs == nullptr) return;
    for (std::size_t i = k; i < k + part.size; ++i) {
      row[i] = bit_cast<float>(bit_cast<std::uint32_t>(row[i]) ^ part.signs[i]);
    }
  }

  /// Sums and differences at distances size/2, size/4 ... 1, then one scaling: the same roundings at any vector width.
  static void butterflies(const rotation_part& part, float* block) {
    for (std::size_t half = part.size / 2; half >= 8; half /= 2) {
      for (std::size_t base = 0; base < part.size; base += 2 * half) {
        for (std::size_t i = base; i < base + half; ++i) {
          const float a = block[i], b = block[i + half];
          block[i] = a + b;
          block[i + half] = a - b;
        }
      }
    }
    for (std::size_t base = 0; base < part.size; base += 8) short_butterflies(part.scale, block + base);
  }
  static void short_butterflies(float scale, float* to) {
    float x[8];
    std::copy(to, to + 8, x);
    butterfly<4>(x);
    butterfly<2>(x);
    butterfly<1>(x);
    for (float& v : x) v *= scale;
    round_in_place(x);
    std::copy(x, x + 8, to);
  }
  /// With the distance known at compile time, this is a permutation, a change of signs and a sum of vectors.
  template <std::size_t Half>
  static void butterfly(float (&x)[8]) {
    float y[8];
    for (std::size_t i = 0; i < 8; ++i) y[i] = (i & Half) == 0 ? x[i] + x[i ^ Half] : x[i ^ Half] - x[i];
    std::copy(y, y + 8, x);
  }
};

/// 1 / sqrt(size), rounded to float.
[[nodiscard]] constexpr float inverse_root(std::size_t size) noexcept {
  return size == 16 ? 0.25f : size == 32 ? 0x1.6a09e6p-3f : size == 64 ? 0.125f : 0x1.6a09e6p-4f;
}

/// A rotation made ready for rows of one length.
class row_rotation {
 public:
  row_rotation() = default;  // none
  row_rotation(const hadamard& rotation, std::size_t cols) : size_(rotation.size), scale_(inverse_root(rotation.size)) {
    if (!rotation.sign_seed) return;
    signs_ = std::vector<std::uint32_t>(cols);
    for (std::size_t k = 0; k < cols; ++k) {
      signs_[k] = philox4x32(k / 4, *rotation.sign_seed).word[k % 4] << 31;
    }
  }

  explicit operator bool() const noexcept { return size_ != 0; }

  /// What happens to columns from `first` on, a multiple of 128.
  [[nodiscard]] rotation_part from(std::size_t first) const {
    return {size_, scale_, signs_.empty() ? nullptr : signs_.data() + first};
  }

  /// Rotates columns [first, first + n) of a row, where first is a multiple of 128, into out[n].
  template <class T>
  void apply(const T* in, std::size_t first, std::size_t n, float* out) const {
    for (std::size_t k = 0; k < n; ++k) out[k] = to_float(in[k]);
    scalar_rotation::rotate(from(first), out, n);
  }

 private:
  std::size_t size_ = 0;
  float scale_ = 1;
  std::vector<std::uint32_t> signs_;  // sign bits to flip
};

}  // namespace detail::inline TETROMINO_ISA

namespace detail {

/// What a backend is asked to rotate; already checked.
template <real T>
struct rotate_job {
  batch_view<const T> in;
  batch_view<T> out;
  hadamard rotation;
  bool forward;
};

}  // namespace detail

namespace detail::inline TETROMINO_ISA {

inline result<void> check_rotation(const hadamard& rotation) {
  if (rotation.size == 16 || rotation.size == 32 || rotation.size == 64 || rotation.size == 128) return {};
  return error(errc::invalid_argument, {"expected a Hadamard rotation of 16, 32, 64 or 128, got ", rotation.size});
}

template <matrix_like Input, class Output>
result<rotate_job<element_of<Input>>> checked(const Input& x, const hadamard& rotation, const Output& out) {
  using T = element_of<Input>;
  const auto in = as_batch(x);
  const batch_view<T> to(out);
  if (auto valid = check_rotation(rotation); !valid) return valid.error();
  if (auto fits = check_same_shape(in, to); !fits) return fits.error();
  if (auto fits = check_sizes(in.matrices, in.rows, in.cols); !fits) return fits.error();
  return rotate_job<T>{in, to, rotation, true};
}

/// Rotates rows on the CPU with the kernels of one backend.
template <class Kernels, real T>
void rotate_cpu(executor_ref executor, const rotate_job<T>& job, const Kernels& kernels = {}) {
  const auto& in = job.in;
  const row_rotation prepared(job.rotation, in.cols);
  for_each_row(executor, in.matrices * in.rows, in.cols, [&](std::size_t row) {
    constexpr std::size_t piece = 1024;
    float scratch[piece];
    const T* from = in.row(row / in.rows, row % in.rows);
    T* to = job.out.row(row / in.rows, row % in.rows);
    for (std::size_t k = 0; k < in.cols; k += piece) {
      const std::size_t n = std::min(piece, in.cols - k);
      for (std::size_t i = 0; i < n; ++i) scratch[i] = to_float(from[k + i]);
      if (job.forward) {
        kernels.rotate(prepared.from(k), scratch, n);
      } else {
        kernels.revert(prepared.from(k), scratch, n);
      }
      for (std::size_t i = 0; i < n; ++i) to[k + i] = from_float<T>(scratch[i]);
    }
  });
}

template <class Policy, class T>
concept has_rotate_on = requires(const Policy& policy, const rotate_job<T>& job) {
  { rotate_on(policy, job) } -> std::same_as<result<void>>;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// The hook of the scalar backend; see quantize.hpp.
template <real T>
result<void> rotate_on(const scalar_t& policy, const detail::rotate_job<T>& job) {
  detail::rotate_cpu<detail::scalar_rotation>(policy.executor, job);
  return {};
}

/// A policy whose backend can rotate elements of type T.
template <class Policy, class T>
concept can_rotate = real<T> && detail::attached<Policy, detail::has_rotate_on<Policy, T>>::value;

/// Rotates x[matrices, rows, cols] along its columns into `out` of the same shape and type, which may be x itself.
/// Arithmetic is in float, in one order on every backend. To rotate and pack in one pass, give the rotation to quantize
/// (quantize_options::rotation) instead. Errors: shape_mismatch; invalid_argument for another size.
template <class Policy, matrix_like Input, class Output>
  requires(can_rotate<Policy, element_of<Input>>)
result<void> try_rotate(const Policy& policy, const Input& x, const hadamard& rotation, const Output& out) {
  const auto job = detail::checked(x, rotation, out);
  if (!job) return job.error();
  return rotate_on(policy, *job);
}
template <class Policy, matrix_like Input, class Output>
  requires(can_rotate<Policy, element_of<Input>>)
void rotate(const Policy& policy, const Input& x, const hadamard& rotation, const Output& out) {
  try_rotate(policy, x, rotation, out).value();
}

/// The inverse of rotate, but for the rounding of each.
template <class Policy, matrix_like Input, class Output>
  requires(can_rotate<Policy, element_of<Input>>)
result<void> try_rotate_back(const Policy& policy, const Input& x, const hadamard& rotation, const Output& out) {
  auto job = detail::checked(x, rotation, out);
  if (!job) return job.error();
  job->forward = false;
  return rotate_on(policy, *job);
}
template <class Policy, matrix_like Input, class Output>
  requires(can_rotate<Policy, element_of<Input>>)
void rotate_back(const Policy& policy, const Input& x, const hadamard& rotation, const Output& out) {
  try_rotate_back(policy, x, rotation, out).value();
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
