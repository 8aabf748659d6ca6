#pragma once

#include <tetromino/detail/macros_off.hpp>

#include "block_scaled.hpp"  // block_scaled_job, multiply_factors
#include "stream.hpp"        // stream

#include <tetromino/block_scaled.hpp>  // block_scaled_view
#include <tetromino/error.hpp>         // error, result
#include <tetromino/float16.hpp>       // half, bfloat16
#include <tetromino/matrix.hpp>        // matrix_view

#include <cublasLt.h>  // cublasLtMatmul

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uintptr_t
#include <type_traits>  // std::is_same_v
#include <utility>      // std::exchange, std::swap

#if CUBLAS_VERSION < 120800
#error "tetromino/cuda/cublaslt.hpp needs the cuBLAS of CUDA 12.8 or newer, the first with 4-bit operands"
#endif

/// Products of block-scaled operands through cuBLASLt, the one header that names it. Link tetromino::cublaslt.
///
/// cuBLASLt multiplies kind e4m3_16 alone, by itself (cuBLAS 13.1, "16/32-Element 1D Block Scaling"): NVFP4, and MXFP4
/// whose scales repack_to has brought into the range of E4M3. NOT RUN on a GPU that has these tensor cores, for
/// want of one; elsewhere a plan is refused.
///
///     const auto library = cuda::cublaslt::create();                                            // once
///     tetromino::repack_to(stream, packed_weights, weights);                                    // once for each model
///     const auto plan = cuda::block_scaled_plan<bfloat16>::create(library, tokens, N, K, N);    // once for each shape
///     cuda::quantize_swizzled_to(stream, x, packed, options);                                   // x is now an operand
///     plan.multiply(stream.with_workspace(memory), cuda::as_block_scaled(packed), weights[expert], out);
namespace TETROMINO_NAMESPACE::cuda {

namespace detail {

/// Success, or an error with the status' name and the call that returned it.
[[nodiscard]] inline result<void> status_of(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  return error(errc::device,
               {"cuBLASLt: ", cublasLtGetStatusName(status), " (", cublasLtGetStatusString(status), ") from ", call});
}

/// A product's descriptors, on the stack: out[m, n], by rows, is the library's by columns, transposed, so that the
/// weights come first and both operands lie as it wants them, K first.
class cublaslt_product {
 public:
  [[nodiscard]] result<void> set_up(std::size_t rows, std::size_t outputs, std::size_t cols, std::size_t out_stride,
                                    cudaDataType_t out_type) {
    if (auto done =
            status_of(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
        !done) {
      return done;
    }
    const cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
    const cublasLtMatmulMatrixScale_t scales = CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3;
    const cublasLtPointerMode_t factors = CUBLASLT_POINTER_MODE_DEVICE;
    for (const auto& done :
         {set(CUBLASLT_MATMUL_DESC_TRANSA, transposed), set(CUBLASLT_MATMUL_DESC_TRANSB, plain),
          set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, scales), set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, scales),
          set(CUBLASLT_MATMUL_DESC_POINTER_MODE, factors), lay_out(weights, CUDA_R_4F_E2M1, cols, outputs, cols),
          lay_out(activations, CUDA_R_4F_E2M1, cols, rows, cols), lay_out(out, out_type, outputs, rows, out_stride)}) {
      if (!done) return done;
    }
    return {};
  }
  [[nodiscard]] result<void> set_scales(const void* of_weights, const void* of_activations) {
    if (auto done = set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, of_weights); !done) return done;
    return set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, of_activations);
  }

  cublasLtMatmulDescOpaque_t product{};
  cublasLtMatrixLayoutOpaque_t weights{}, activations{}, out{};

 private:
  template <class Value>
  [[nodiscard]] result<void> set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    return status_of(cublasLtMatmulDescSetAttribute(&product, attribute, &value, sizeof value),
                     "cublasLtMatmulDescSetAttribute");
  }
  [[nodiscard]] static result<void> lay_out(cublasLtMatrixLayoutOpaque_t& layout, cudaDataType_t type, std::size_t rows,
                                            std::size_t cols, std::size_t stride) {
    return status_of(cublasLtMatrixLayoutInit(&layout, type, rows, cols, static_cast<std::int64_t>(stride)),
                     "cublasLtMatrixLayoutInit");
  }
};

template <activation T>
inline constexpr cudaDataType_t cuda_type = std::is_same_v<T, half> ? CUDA_R_16F : CUDA_R_16BF;

}  // namespace detail

/// The library's handle: made once, for the device that is current then; it allocates.
class cublaslt {
 public:
  /// Errors: device, also for a library older than that of CUDA 12.8.
  [[nodiscard]] static result<cublaslt> try_create() {
    if (const std::size_t version = cublasLtGetVersion(); version < 120800) {
      return error(errc::device, {"cuBLASLt: 4-bit operands need version 120800 (CUDA 12.8), got ", version});
    }
    cublaslt out;
    if (auto done = detail::status_of(cublasLtCreate(&out.handle_), "cublasLtCreate"); !done) return done.error();
    return result<cublaslt>(std::move(out));
  }
  static cublaslt create() { return try_create().value(); }

  cublaslt(cublaslt&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  cublaslt& operator=(cublaslt&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~cublaslt() {
    if (handle_ != nullptr) static_cast<void>(cublasLtDestroy(handle_));
  }

  [[nodiscard]] cublasLtHandle_t handle() const noexcept { return handle_; }

 private:
  cublaslt() = default;
  cublasLtHandle_t handle_ = nullptr;
};

/// How the library multiplies activations [rows, cols] and weights [outputs, cols] into out [rows, outputs] of type T,
/// rows `out_stride` elements apart: chosen once for a shape, since choosing takes the host longer than a launch does.
template <activation T>
class block_scaled_plan {
 public:
  /// Makes a plan for the current device. `most_workspace`: bytes of workspace that the product may take, 32 MiB being
  /// what the library advises there. Errors: shape_mismatch where outputs or the stride are no multiple of 8; device
  /// below compute capability 10.0, and where the library has no such product.
  [[nodiscard]] static result<block_scaled_plan> try_create(const cublaslt& library, std::size_t rows,
                                                            std::size_t outputs, std::size_t cols,
                                                            std::size_t out_stride,
                                                            std::size_t most_workspace = std::size_t{32} << 20) {
    using tetromino::detail::text;
    if (rows == 0 || outputs == 0 || cols == 0 || outputs % 8 != 0 || out_stride % 8 != 0 || out_stride < outputs) {
      return error(errc::shape_mismatch, {"block-scaled plan: expected a product that is not empty, outputs and "
                                          "their stride multiples of 8, got [",
                                          rows, ", ", outputs, "] over K = ", cols, " with stride ", out_stride});
    }
    if (auto fits = detail::check_capability("a block-scaled product through cuBLASLt", 10, 99, "10.0 or later");
        !fits) {
      return fits.error();
    }
    block_scaled_plan out;
    out.library_ = library.handle();
    out.rows_ = rows, out.outputs_ = outputs, out.cols_ = cols, out.out_stride_ = out_stride;
    detail::cublaslt_product product;
    if (auto done = out.set_up(product); !done) return done.error();
    // the library asks that there be scales, and does not look at them
    const auto* const scales = reinterpret_cast<const void*>(std::uintptr_t{256});
    if (auto done = product.set_scales(scales, scales); !done) return done.error();

    cublasLtMatmulPreferenceOpaque_t preference{};
    if (auto done = detail::status_of(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
        !done) {
      return done.error();
    }
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      return detail::status_of(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value),
                               "cublasLtMatmulPreferenceSetAttribute");
    };
    constexpr std::uint32_t alignment = 16;
    for (const auto& done : {prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most_workspace),
                             prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment),
                             prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment),
                             prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment),
                             prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment)}) {
      if (!done) return done.error();
    }
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(out.library_, &product.product, &product.weights, &product.activations,
                                       &product.out, &product.out, &preference, 1, &found, &count);
    if (status == CUBLAS_STATUS_SUCCESS) status = count == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : found.state;
    if (auto done = detail::status_of(status, "cublasLtMatmulAlgoGetHeuristic"); !done) {
      return error(errc::device, {done.error().what(), " for [", rows, ", ", cols, "] x [", outputs, ", ", cols,
                                  "]; on compute capability 12.x matmul without a plan multiplies "
                                  "these operands"});
    }
    out.algorithm_ = found.algo;
    out.library_workspace_ = found.workspaceSize;
    return out;
  }
  [[nodiscard]] static block_scaled_plan create(const cublaslt& library, std::size_t rows, std::size_t outputs,
                                                std::size_t cols, std::size_t out_stride,
                                                std::size_t most_workspace = std::size_t{32} << 20) {
    return try_create(library, rows, outputs, cols, out_stride, most_workspace).value();
  }

  /// Bytes of workspace that the stream must bring, at a multiple of 256.
  [[nodiscard]] std::size_t workspace_bytes() const noexcept { return 256 + library_workspace_; }

  /// out[m, n] = Σ_k x[m, k] · w[n, k] of two operands of kind e4m3_16, each one matrix, in device memory. Two
  /// launches, of which the first multiplies the factors. Errors: invalid_argument; shape_mismatch; device.
  [[nodiscard]] result<void> try_multiply(const stream& s, const block_scaled_view<>& x, const block_scaled_view<>& w,
                                          matrix_view<T> out) const {
    using tetromino::detail::text;
    if (auto fits = detail::check_block_scaled_product(x, w, out.rows, out.cols); !fits) return fits;
    if (x.shape.kind != block_scaled_kind::e4m3_16) {
      return error(errc::invalid_argument,
                   "block-scaled plan: cuBLASLt multiplies operands of kind e4m3_16, got e8m0_32");
    }
    if (x.shape.rows != rows_ || w.shape.rows != outputs_ || x.shape.cols != cols_ || out.row_stride != out_stride_) {
      return error(errc::shape_mismatch, {"block-scaled plan: made for [", rows_, ", ", outputs_, "] over K = ", cols_,
                                          " with stride ", out_stride_, ", got [", x.shape.rows, ", ", w.shape.rows,
                                          "] over K = ", x.shape.cols, " with stride ", out.row_stride});
    }
    if (!detail::is_aligned(out.data, 16)) {
      return error(errc::invalid_argument, "block-scaled plan: expected an output at a multiple of 16 bytes");
    }
    if (s.workspace.size() < workspace_bytes() || !detail::is_aligned(s.workspace.data(), 256)) {
      return error(errc::shape_mismatch, {"block-scaled plan: needs ", workspace_bytes(),
                                          " bytes of workspace at a multiple of 256, got ", s.workspace.size()});
    }
    auto* const factors = reinterpret_cast<float*>(s.workspace.data());
    if (auto done = detail::multiply_factors(s, x.factors.data(), w.factors.data(), factors); !done) return done;
    detail::cublaslt_product product;
    if (auto done = set_up(product); !done) return done;
    if (auto done = product.set_scales(w.scales.data(), x.scales.data()); !done) return done;
    return detail::status_of(
        cublasLtMatmul(library_, &product.product, factors, w.codes.data(), &product.weights, x.codes.data(),
                       &product.activations, factors + 1, out.data, &product.out, out.data, &product.out, &algorithm_,
                       s.workspace.data() + 256, library_workspace_, s.handle),
        "cublasLtMatmul");
  }
  void multiply(const stream& s, const block_scaled_view<>& x, const block_scaled_view<>& w, matrix_view<T> out) const {
    try_multiply(s, x, w, out).value();
  }

 private:
  block_scaled_plan() = default;
  [[nodiscard]] result<void> set_up(detail::cublaslt_product& product) const {
    return product.set_up(rows_, outputs_, block_scaled_shape{block_scaled_kind::e4m3_16, 1, 1, cols_}.padded_cols(),
                          out_stride_, detail::cuda_type<T>);
  }

  cublasLtHandle_t library_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_{};
  std::size_t library_workspace_ = 0;
  std::size_t rows_ = 0, outputs_ = 0, cols_ = 0, out_stride_ = 0;
};

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
