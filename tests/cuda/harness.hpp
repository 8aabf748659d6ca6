#pragma once

/// What the tests of the CUDA backend share. They are plain programs, which need nothing but CUDA and these headers:
/// exit code 0 where all is well, 1 where a check failed, 77 where there is no device.

#include <tetromino/cuda.hpp>
#include <tetromino/execution.hpp>
#include <tetromino/float16.hpp>
#include <tetromino/packed.hpp>
#include <tetromino/rounding.hpp>
#include <tetromino/thread_executor.hpp>

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace harness {

using tetromino::bfloat16;
using tetromino::half;

inline int failures = 0;
inline long checks = 0;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline bool
expect(bool condition, const char* format, ...) {
  ++checks;
  if (condition) return true;
  if (++failures <= 40) {
    std::va_list arguments;
    va_start(arguments, format);
    std::fputs("FAILED: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputs("\n", stderr);
    va_end(arguments);
  }
  return false;
}

inline void require(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s (%s)\n", what, cudaGetErrorName(code), cudaGetErrorString(code));
  std::exit(1);
}
inline void require(const tetromino::result<void>& done, const char* what) {
  if (done) return;
  std::fprintf(stderr, "%s: %s\n", what, done.error().what());
  std::exit(1);
}

/// Whether TETROMINO_SMALL asks for a run short enough for a sanitizer.
inline bool is_short() { return std::getenv("TETROMINO_SMALL") != nullptr; }

/// Ends the program with 77 where no device can be used.
inline void need_device(int least_major = 8) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0) {
    std::printf("skipped: no CUDA device (%s)\n", cudaGetErrorName(code));
    std::exit(77);
  }
  int major = 0;
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
  if (major < least_major) {
    std::printf("skipped: needs compute capability %d.0, the device has %d\n", least_major, major);
    std::exit(77);
  }
}

inline int finish(const char* name) {
  require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  std::printf("%s: %ld checks, %d failed\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

/// Device memory, filled with a pattern that no test expects. `padding` bytes after the end must keep it.
template <class T>
class device {
 public:
  explicit device(std::size_t n) : size_(n) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), n * sizeof(T) + padding), "cudaMalloc");
    poison();
  }
  explicit device(std::span<const T> values) : device(values.size()) {
    if (!values.empty()) {
      require(cudaMemcpy(data_, values.data(), values.size_bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
  }
  explicit device(const std::vector<T>& values) : device(std::span<const T>(values)) {}
  device(device&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  device& operator=(device&&) = delete;
  ~device() { cudaFree(data_); }

  void poison() { require(cudaMemset(data_, 0xA5, size_ * sizeof(T) + padding), "cudaMemset"); }

  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::span<T> span() const { return {data_, size_}; }
  operator std::span<T>() const { return span(); }

  [[nodiscard]] std::vector<T> values() const {
    std::vector<T> out(size_);
    if (size_ != 0) require(cudaMemcpy(out.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return out;
  }
  /// Whether nothing was written past the end.
  [[nodiscard]] bool is_intact() const {
    unsigned char tail[padding];
    require(cudaMemcpy(tail, reinterpret_cast<const unsigned char*>(data_) + size_ * sizeof(T), padding,
                       cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    for (const unsigned char byte : tail) {
      if (byte != 0xA5) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t padding = 256;
  T* data_ = nullptr;
  std::size_t size_;
};

/// Packed storage on the device.
struct device_packed {
  tetromino::any_format format;
  std::size_t matrices, rows, cols;
  device<std::uint8_t> codes, scales, macros;
  device<float> tensor_scales;

  device_packed(const tetromino::packed_shape& shape, std::size_t tensor_scale_count)
      : format(shape.format),
        matrices(shape.matrices),
        rows(shape.rows),
        cols(shape.cols),
        codes(shape.code_bytes()),
        scales(shape.scale_bytes()),
        macros(shape.macro_bytes()),
        tensor_scales(shape.format.scale == tetromino::scale_type::e4m3 ? tensor_scale_count : 0) {}
  explicit device_packed(const tetromino::packed<tetromino::any_format>& p)
      : format(p.format),
        matrices(p.matrices),
        rows(p.rows),
        cols(p.cols),
        codes(p.codes),
        scales(p.scales),
        macros(p.macros),
        tensor_scales(p.tensor_scales) {}

  [[nodiscard]] tetromino::packed_view<tetromino::any_format, std::uint8_t> view() const {
    return {format, matrices, rows, cols, codes, scales, macros, tensor_scales};
  }
  [[nodiscard]] bool is_intact() const {
    return codes.is_intact() && scales.is_intact() && macros.is_intact() && tensor_scales.is_intact();
  }
};

/// Where two byte sequences first differ, or -1.
template <class A, class B>
long first_difference(const A& a, const B& b) {
  if (a.size() != b.size()) return 0;
  const auto* const x = reinterpret_cast<const unsigned char*>(a.data());
  const auto* const y = reinterpret_cast<const unsigned char*>(b.data());
  const std::size_t n = a.size() * sizeof(*a.data());
  if (n == 0 || std::memcmp(x, y, n) == 0) return -1;
  std::size_t i = 0;
  while (x[i] == y[i]) ++i;
  return static_cast<long>(i / sizeof(*a.data()));
}

/// Random numbers that are a function of their position, so that threads can share the work.
struct numbers {
  std::uint64_t seed;
  [[nodiscard]] std::uint64_t bits(std::uint64_t i) const {  // splitmix64
    std::uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  [[nodiscard]] float uniform(std::uint64_t i) const { return static_cast<float>(bits(i) >> 40) * 0x1p-24f; }
  /// About N(0, 1): a sum of four uniform numbers.
  [[nodiscard]] float normal(std::uint64_t i) const {
    const std::uint64_t b = bits(i);
    const auto part = [&](int s) { return static_cast<float>(b >> s & 0xFFFF) * 0x1p-16f; };
    return (part(0) + part(16) + part(32) + part(48) - 2.0f) * 1.7320508f;
  }
};

/// Fills [n] values in parallel with f(i).
template <class T, class F>
std::vector<T> generate(std::size_t n, const F& f) {
  std::vector<T> out(n);
  const tetromino::thread_executor threads;
  constexpr std::size_t piece = 1 << 16;
  const auto task = [&](std::size_t p) {
    for (std::size_t i = p * piece; i < n && i < (p + 1) * piece; ++i) out[i] = f(i);
  };
  threads((n + piece - 1) / piece, task);
  return out;
}

}  // namespace harness
