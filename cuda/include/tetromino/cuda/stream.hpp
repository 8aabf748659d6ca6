#pragma once

#include <tetromino/detail/macros_off.hpp>

#include <tetromino/error.hpp>   // error, result
#include <tetromino/matrix.hpp>  // batch_view

#include <cuda_runtime_api.h>  // cudaStream_t

#include <cstddef>  // std::size_t, std::byte
#include <cstdint>  // std::uint64_t
#include <span>     // std::span
#include <utility>  // std::exchange, std::move, std::swap

struct __half;
struct __nv_bfloat16;

namespace TETROMINO_NAMESPACE {

/// CUDA's own 16-bit floats may be viewed as the library's: `matrix_view<const bfloat16>(weights, rows, cols)`.
template <>
inline constexpr bool holds<__half, half> = true;
template <>
inline constexpr bool holds<__nv_bfloat16, bfloat16> = true;

}  // namespace TETROMINO_NAMESPACE

namespace TETROMINO_NAMESPACE::cuda {

class rejections;

/// Runs on the GPU, in the order of a CUDA stream. Calls only launch: they return before the work is done, allocate
/// nothing, never wait, and can be captured into a graph. All memory that a call is given, options included, is memory
/// that the device can reach, and stays as it is until the stream has passed the call. A call returns the errors that
/// show before a launch (shapes, options, a refusal by the CUDA runtime: errc::device); what shows only in the data
/// goes to `rejections`.
struct stream {
  static constexpr bool device_memory = true;

  cudaStream_t handle = nullptr;
  std::uint64_t* rejected = nullptr;  ///< one word of device memory, see reporting()
  std::span<std::byte> workspace{};   ///< device memory, see with_workspace()

  constexpr stream() = default;
  constexpr explicit stream(cudaStream_t handle_) noexcept : handle(handle_) {}

  /// The same stream, with values that special_values::reject refuses noted in `report`. Rejecting calls need one.
  [[nodiscard]] stream reporting(rejections& report) const noexcept;

  /// The same stream, with scratch memory for the calls that say they need some. Calls that share it must follow each
  /// other in one stream.
  [[nodiscard]] constexpr stream with_workspace(std::span<std::byte> memory) const noexcept {
    stream out = *this;
    out.workspace = memory;
    return out;
  }
};

namespace detail {

/// Success, or an error with the CUDA error's name and the call that met it.
[[nodiscard]] inline result<void> status_of(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return {};
  return error(errc::device, {"CUDA: ", cudaGetErrorName(code), " (", cudaGetErrorString(code), ") from ", call});
}

inline constexpr std::uint64_t none_rejected = ~std::uint64_t{0};

}  // namespace detail

/// Where special_values::reject leaves what it found, since a launch cannot throw: the position of the first value, in
/// reading order, that any call since reset() has refused. The blocks that held such values are packed as `poison`
/// does, so nothing that looks valid is made of them.
class rejections {
 public:
  /// Allocates one word of device memory; none is reported yet. Errors: device.
  [[nodiscard]] static result<rejections> try_create() {
    rejections out;
    if (auto done =
            detail::status_of(cudaMalloc(reinterpret_cast<void**>(&out.word_), sizeof *out.word_), "cudaMalloc");
        !done) {
      return done.error();
    }
    if (auto done = detail::status_of(cudaMemset(out.word_, 0xFF, sizeof *out.word_), "cudaMemset"); !done) {
      return done.error();
    }
    return result<rejections>(std::move(out));
  }
  static rejections create() { return try_create().value(); }

  rejections(rejections&& other) noexcept : word_(std::exchange(other.word_, nullptr)) {}
  rejections& operator=(rejections&& other) noexcept {
    std::swap(word_, other.word_);
    return *this;
  }
  ~rejections() {
    if (word_ != nullptr) static_cast<void>(cudaFree(word_));
  }

  /// Forgets what was reported, in the order of the stream.
  [[nodiscard]] result<void> try_reset(const stream& s) {
    return detail::status_of(cudaMemsetAsync(word_, 0xFF, sizeof *word_, s.handle), "cudaMemsetAsync");
  }
  void reset(const stream& s) { try_reset(s).value(); }

  /// Waits for the stream. Errors: non_finite, with the place of the first refused value in x[matrices, rows, cols],
  /// the shape that the packing call was given; device.
  template <class T>
  [[nodiscard]] result<void> try_check(const stream& s, const batch_view<T>& x) const {
    std::uint64_t position = 0;
    if (auto done = detail::status_of(
            cudaMemcpyAsync(&position, word_, sizeof position, cudaMemcpyDeviceToHost, s.handle), "cudaMemcpyAsync");
        !done) {
      return done;
    }
    if (auto done = detail::status_of(cudaStreamSynchronize(s.handle), "cudaStreamSynchronize"); !done) return done;
    if (position == detail::none_rejected) return {};
    return error(errc::non_finite,
                 {"expected finite values, got NaN, an infinity or one that overflows when rotated at matrix ",
                  position / x.cols / x.rows, ", row ", position / x.cols % x.rows, ", column ", position % x.cols});
  }
  template <class T>
  void check(const stream& s, const batch_view<T>& x) const {
    try_check(s, x).value();
  }

  [[nodiscard]] std::uint64_t* word() const noexcept { return word_; }

 private:
  rejections() = default;
  std::uint64_t* word_ = nullptr;
};

inline stream stream::reporting(rejections& report) const noexcept {
  stream out = *this;
  out.rejected = report.word();
  return out;
}

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
