#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

/// Device memory that ends with its scope.
template <class T>
struct device_array {
  explicit device_array(std::size_t n) : size(n) {
    check(cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T) + 16), "cudaMalloc");
  }
  explicit device_array(std::span<const T> values) : device_array(values.size()) {
    check(cudaMemcpy(data, values.data(), values.size_bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  device_array(const device_array&) = delete;
  device_array& operator=(const device_array&) = delete;
  ~device_array() { cudaFree(data); }

  [[nodiscard]] std::span<T> span() const { return {data, size}; }
  [[nodiscard]] std::span<T> first(std::size_t n) const { return span().first(n); }
  /// Room for n at least; what was there is lost where it grows.
  void reserve(std::size_t n) {
    if (n <= size) return;
    check(cudaFree(data), "cudaFree");
    data = nullptr;
    check(cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T) + 16), "cudaMalloc");
    size = n;
  }
  [[nodiscard]] std::vector<T> host() const {
    std::vector<T> out(size);
    check(cudaMemcpy(out.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return out;
  }

  T* data = nullptr;
  std::size_t size;
};
