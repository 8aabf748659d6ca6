/// Block-scaled products through cuBLASLt, where the GPU has them; elsewhere, that they are refused in so many words.

#include "block_scaled.hpp"

#include <tetromino/cuda/cublaslt.hpp>

namespace {

using namespace harness;
namespace cuda = tetromino::cuda;
using tetromino::errc;
using tetromino::matrix_view;

template <class T>
void products(const cuda::cublaslt& library) {
  for (const product_case& c : product_cases(block_scaled_kind::e4m3_16)) {
    const device_operands x(c.x), w(c.w);
    const std::size_t rows = c.x.shape.rows, outputs = c.w.shape.rows, stride = outputs + 8;
    auto plan = cuda::block_scaled_plan<T>::try_create(library, rows, outputs, c.x.shape.cols, stride);
    if (!expect(plan.has_value(), "%s: %s", c.name.c_str(), plan ? "" : plan.error().what())) continue;
    const device<std::byte> workspace(plan->workspace_bytes());
    const device<T> out(rows * stride);
    const auto stream = cuda::stream().with_workspace(workspace.span());
    require(plan->try_multiply(stream, x.view(), w.view(), matrix_view<T>(out.data(), rows, outputs, stride)),
            c.name.c_str());
    require(cudaDeviceSynchronize(), c.name.c_str());
    c.check(out.values(), stride);
    expect(out.is_intact() && workspace.is_intact(), "%s: written past the end", c.name.c_str());
    expect_error(
        plan->try_multiply(cuda::stream(), x.view(), w.view(), matrix_view<T>(out.data(), rows, outputs, stride)),
        errc::shape_mismatch, "bytes of workspace");
  }
}

template <class T>
void refusals(const cuda::cublaslt& library) {
  const auto refused = [&](std::size_t outputs, std::size_t stride, errc code, const std::string& says) {
    const auto plan = cuda::block_scaled_plan<T>::try_create(library, 16, outputs, 128, stride);
    if (!expect(!plan.has_value(), "expected an error that says: %s", says.c_str())) return;
    const std::string what = plan.error().what();
    expect(plan.error().code() == code && what.find(says) != std::string::npos, "expected: %s, got: %s", says.c_str(),
           what.c_str());
  };
  refused(12, 16, errc::shape_mismatch, "multiples of 8");
  refused(16, 12, errc::shape_mismatch, "multiples of 8");
  refused(0, 16, errc::shape_mismatch, "not empty");
  if (device_major() < 10) {
    refused(16, 16, errc::device,
            "needs compute capability 10.0 or later, device 0 has " + std::to_string(device_major()) + ".");
  }
}

}  // namespace

int main() {
  need_device();
  const auto library = cuda::cublaslt::create();
  refusals<tetromino::half>(library);
  refusals<tetromino::bfloat16>(library);
  if (device_major() >= 10) {
    products<tetromino::half>(library);
    products<tetromino::bfloat16>(library);
  } else {
    std::printf("no product was run: cuBLASLt's need compute capability 10.0\n");
  }
  return finish("cublaslt");
}
