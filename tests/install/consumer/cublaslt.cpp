#include <tetromino/cuda/cublaslt.hpp>

#include <cstdio>

// Asks for a block-scaled product: a GPU that has none, or no GPU at all, is an error that says so.
int main() {
  const auto library = tetromino::cuda::cublaslt::try_create();
  if (!library) {
    std::printf("no cuBLASLt: %s\n", library.error().what());
    return library.error().code() == tetromino::errc::device ? 0 : 1;
  }
  const auto plan = tetromino::cuda::block_scaled_plan<tetromino::bfloat16>::try_create(*library, 16, 128, 256, 128);
  std::printf("%s\n", plan ? "planned" : plan.error().what());
  return plan || plan.error().code() == tetromino::errc::device ? 0 : 1;
}
