/// The calls that block_scaled_plan makes, against a model of cuBLASLt on the host: this program defines the functions
/// of the library that the header uses, as its manual describes them (cuBLAS 13, cublasLtMatmul and "1D Block
/// Scaling"), and multiplies what the descriptors say. No GPU and no driver is needed; host memory stands for the
/// device's.

#include "check.hpp"

#include <tetromino/cuda/cublaslt.hpp>

#include "block_scaled.hpp"

#include <cstring>  // std::memcpy
#include <map>      // std::map
#include <memory>   // std::unique_ptr
#include <numeric>  // std::inner_product
#include <string>   // std::string
#include <vector>   // std::vector

namespace {

namespace cuda = tetromino::cuda;
using harness::product_case;
using tetromino::block_scaled_kind;
using tetromino::errc;
using tetromino::matrix_view;
using tetromino_test::contains;

/// What the library and the GPU are said to be.
struct {
  std::size_t version = 130100;
  int major = 10, minor = 0;
  bool knows_the_product = true;
  std::size_t workspace = 4096;
} world;

struct described_layout {
  cudaDataType type;
  std::uint64_t rows, cols;
  std::int64_t stride;
};
struct described_product {
  cublasComputeType_t compute;
  cudaDataType_t scale_type;
  std::map<int, std::vector<unsigned char>> attributes;

  template <class Value>
  [[nodiscard]] Value get(cublasLtMatmulDescAttributes_t attribute, Value otherwise) const {
    const auto at = attributes.find(attribute);
    if (at == attributes.end()) return otherwise;
    REQUIRE(at->second.size() == sizeof(Value));
    std::memcpy(&otherwise, at->second.data(), sizeof(Value));
    return otherwise;
  }
};
std::map<const void*, described_layout> layouts;
std::map<const void*, described_product> products;
std::map<int, std::uint64_t> preferences;

bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// Whether the library has the product: the manual's requirements for block-scaled FP4.
bool has_product(const described_product& p, const described_layout& a, const described_layout& b,
                 const described_layout& c, const described_layout& d) {
  const auto scale = [&](cublasLtMatmulDescAttributes_t mode, cublasLtMatmulDescAttributes_t pointer) {
    const void* const at = p.get<const void*>(pointer, nullptr);
    return p.get(mode, CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F) == CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3 &&
           at != nullptr && is_aligned(at);
  };
  return p.compute == CUBLAS_COMPUTE_32F && p.scale_type == CUDA_R_32F &&
         p.get(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_N) == CUBLAS_OP_T &&
         p.get(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N) == CUBLAS_OP_N &&
         scale(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER) &&
         scale(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER) && a.type == CUDA_R_4F_E2M1 &&
         b.type == CUDA_R_4F_E2M1 && (d.type == CUDA_R_16F || d.type == CUDA_R_16BF) && c.type == d.type &&
         a.rows == b.rows && a.cols == d.rows && b.cols == d.cols && a.rows % 32 == 0 && a.stride % 32 == 0 &&
         b.stride % 32 == 0 && d.stride % 8 == 0 && d.rows % 8 == 0;
}

/// The values of an operand, [outer, k].
std::vector<double> values(const void* codes, const void* scales, const described_layout& layout) {
  const auto* const bytes = static_cast<const std::uint8_t*>(codes);
  const std::size_t inner_dim = (layout.rows / 16 + 3) / 4 * 4;
  std::vector<double> out;
  for (std::size_t outer = 0; outer < layout.cols; ++outer) {
    for (std::size_t k = 0; k < layout.rows; ++k) {
      const std::size_t element = outer * static_cast<std::size_t>(layout.stride) + k, inner = k / 16;
      const unsigned code = bytes[element / 2] >> (element % 2 * 4) & 15u;
      const std::size_t at =
          (inner / 4 * 4 + outer / 128 * inner_dim) * 128 + outer % 128 % 32 * 16 + outer % 128 / 32 * 4 + inner % 4;
      out.push_back(reference::e4m3_value(static_cast<const std::uint8_t*>(scales)[at] & 0x7Fu) *
                    reference::e2m1_value(code));
    }
  }
  return out;
}

}  // namespace

// The CUDA runtime and the library, as far as they are called.
extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int) {
  *out = attribute == cudaDevAttrComputeCapabilityMajor ? world.major : world.minor;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
const char* cublasLtGetStatusName(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_INVALID_VALUE";
}
const char* cublasLtGetStatusString(cublasStatus_t) { return "a status"; }
std::size_t cublasLtGetVersion() { return world.version; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  static int library = 0;
  *handle = reinterpret_cast<cublasLtHandle_t>(&library);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t product, std::size_t, cublasComputeType_t compute,
                                               cudaDataType_t scale_type) {
  products[product] = {compute, scale_type, {}};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t size) {
  const auto* const bytes = static_cast<const unsigned char*>(value);
  products.at(product).attributes[attribute].assign(bytes, bytes + size);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, std::size_t, cudaDataType type,
                                                 std::uint64_t rows, std::uint64_t cols, std::int64_t stride) {
  layouts[layout] = {type, rows, cols, stride};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t, std::size_t) {
  preferences.clear();
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    std::size_t size) {
  std::uint64_t number = 0;
  std::memcpy(&number, value, size);
  preferences[attribute] = number;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t, int,
                                              cublasLtMatmulHeuristicResult_t found[], int* count) {
  *count = 0;
  const bool is_known = world.knows_the_product &&
                        has_product(products.at(product), layouts.at(a), layouts.at(b), layouts.at(c), layouts.at(d));
  if (!is_known || preferences[CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES] < world.workspace) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  for (const auto alignment : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    CHECK(preferences[alignment] == 16);  // not more than the product later checks
  }
  *count = 1;
  found[0] = {};
  found[0].algo.data[0] = 4711;
  found[0].workspaceSize = world.workspace;
  found[0].state = CUBLAS_STATUS_SUCCESS;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void*, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              std::size_t workspace_bytes, cudaStream_t stream) {
  const described_product& p = products.at(product);
  const described_layout &of_a = layouts.at(a_layout), &of_b = layouts.at(b_layout), &of_d = layouts.at(d_layout);
  if (!has_product(p, of_a, of_b, layouts.at(c_layout), of_d) || algorithm->data[0] != 4711 ||
      workspace_bytes < world.workspace || !is_aligned(a) || !is_aligned(b) || !is_aligned(d) ||
      p.get(CUBLASLT_MATMUL_DESC_POINTER_MODE, CUBLASLT_POINTER_MODE_HOST) != CUBLASLT_POINTER_MODE_DEVICE) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  CHECK(stream == reinterpret_cast<cudaStream_t>(std::uintptr_t{0x5000}));
  std::memset(workspace, 0xEE, workspace_bytes);
  const void* const a_scales = p.get<const void*>(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, nullptr);
  const void* const b_scales = p.get<const void*>(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, nullptr);
  CHECK(*static_cast<const float*>(beta) == 0.0f);
  const auto factor = static_cast<double>(*static_cast<const float*>(alpha));
  const std::vector<double> a_values = values(a, a_scales, of_a), b_values = values(b, b_scales, of_b);
  for (std::size_t j = 0; j < of_d.cols; ++j) {
    const double* const of_column = b_values.data() + j * of_b.rows;
    for (std::size_t i = 0; i < of_d.rows; ++i) {
      const double* const of_row = a_values.data() + i * of_a.rows;
      const double sum = std::inner_product(of_row, of_row + of_a.rows, of_column, 0.0);
      const auto out = static_cast<float>(factor * sum);
      const std::size_t at = j * static_cast<std::size_t>(of_d.stride) + i;
      static_cast<std::uint16_t*>(d)[at] =
          of_d.type == CUDA_R_16F ? tetromino::half(out).bits : tetromino::bfloat16(out).bits;
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}
}

namespace tetromino::cuda::detail {
template <>
result<void> multiply_factors(const stream&, const float* x, const float* w, float* out) {
  out[0] = *x * *w, out[1] = 0;
  return {};
}
}  // namespace tetromino::cuda::detail

namespace {

/// Bytes at a multiple of 256.
struct scratch {
  explicit scratch(std::size_t bytes) : memory(bytes + 256) {}
  [[nodiscard]] std::span<std::byte> span() {
    void* at = memory.data();
    std::size_t room = memory.size();
    std::align(256, room - 256, at, room);
    return {static_cast<std::byte*>(at), memory.size() - 256};
  }
  std::vector<std::byte> memory;
};

const cuda::stream the_stream(reinterpret_cast<cudaStream_t>(std::uintptr_t{0x5000}));

template <class T>
void check_products(const std::vector<product_case>& cases) {
  world = {};
  const auto library = cuda::cublaslt::create();
  for (const product_case& c : cases) {
    const std::size_t rows = c.x.shape.rows, outputs = c.w.shape.rows, stride = outputs + 8;
    const auto plan = cuda::block_scaled_plan<T>::create(library, rows, outputs, c.x.shape.cols, stride);
    CHECK(plan.workspace_bytes() == 256 + 4096);
    scratch workspace(plan.workspace_bytes());
    std::vector<T> out(rows * stride, T::from_bits(0xA5A5));
    plan.multiply(the_stream.with_workspace(workspace.span()), c.x.view(), c.w.view(),
                  matrix_view<T>(out.data(), rows, outputs, stride));
    c.check(out, stride);
  }
  CHECK(harness::failures == 0);
}

std::string refusal(std::size_t rows, std::size_t outputs, std::size_t cols, std::size_t stride,
                    errc code = errc::device) {
  const auto library = cuda::cublaslt::try_create();
  if (!library) return library.error().what();
  const auto plan = cuda::block_scaled_plan<tetromino::half>::try_create(*library, rows, outputs, cols, stride);
  REQUIRE(!plan);
  CHECK(plan.error().code() == code);
  return plan.error().what();
}

}  // namespace

TEST_CASE("cublaslt: what the descriptors say is the product of the operands") {
  const std::vector<product_case> cases = harness::product_cases(block_scaled_kind::e4m3_16);
  check_products<tetromino::half>(cases);
  check_products<tetromino::bfloat16>(cases);
}

TEST_CASE("cublaslt: a GPU or a library without the product is an error that says what was expected and found") {
  world = {};
  world.major = 9;
  CHECK_THAT(refusal(16, 16, 64, 16), contains("needs compute capability 10.0 or later, device 0 has 9.0"));
  world = {};
  world.version = 120700;
  CHECK_THAT(refusal(16, 16, 64, 16), contains("need version 120800 (CUDA 12.8), got 120700"));
  world = {};
  world.major = 12, world.knows_the_product = false;
  CHECK_THAT(refusal(16, 16, 64, 16), contains("CUBLAS_STATUS_NOT_SUPPORTED"));
  CHECK_THAT(refusal(16, 16, 64, 16), contains("from cublasLtMatmulAlgoGetHeuristic for [16, 64] x [16, 64]"));
  CHECK_THAT(refusal(16, 16, 64, 16), contains("on compute capability 12.x matmul without a plan"));
  world = {};
  world.workspace = std::size_t{64} << 20;
  CHECK_THAT(refusal(16, 16, 64, 16), contains("CUBLAS_STATUS_NOT_SUPPORTED"));
  world = {};
  CHECK_THAT(refusal(16, 12, 64, 16, errc::shape_mismatch), contains("multiples of 8"));
  CHECK_THAT(refusal(16, 16, 64, 20, errc::shape_mismatch), contains("multiples of 8"));
  CHECK_THAT(refusal(16, 16, 64, 8, errc::shape_mismatch), contains("stride 8"));
  CHECK_THAT(refusal(0, 16, 64, 16, errc::shape_mismatch), contains("not empty"));
}

TEST_CASE("cublaslt: operands that a plan was not made for are errors") {
  world = {};
  const auto library = cuda::cublaslt::create();
  const product_case c(block_scaled_kind::e4m3_16, 16, 8, 64), longer(block_scaled_kind::e4m3_16, 16, 8, 128),
      other(block_scaled_kind::e8m0_32, 16, 8, 64);
  const auto plan = cuda::block_scaled_plan<tetromino::half>::create(library, 16, 8, 64, 8);
  scratch workspace(plan.workspace_bytes());
  std::vector<tetromino::half> out(17 * 8);
  const auto multiply = [&](const product_case& of, std::size_t bytes, const tetromino::half* at) {
    const matrix_view<tetromino::half> to(const_cast<tetromino::half*>(at), 16, 8);
    const auto done =
        plan.try_multiply(the_stream.with_workspace(workspace.span().first(bytes)), of.x.view(), of.w.view(), to);
    return std::string(done ? "" : done.error().what());
  };
  const std::size_t enough = plan.workspace_bytes();
  CHECK(multiply(c, enough, out.data()).empty());
  CHECK_THAT(multiply(c, enough - 1, out.data()), contains("needs 4352 bytes of workspace"));
  CHECK_THAT(multiply(c, enough, out.data() + 1), contains("an output at a multiple of 16 bytes"));
  CHECK_THAT(multiply(longer, enough, out.data()), contains("made for [16, 8] over K = 64"));
  CHECK_THAT(multiply(other, enough, out.data()), contains("kind e4m3_16, got e8m0_32"));
}
