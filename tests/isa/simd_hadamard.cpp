#include "check.hpp"

/// Rotations of the simd backend against the scalar ones, bit by bit. Run for each backend of tetromino::cpu.

#include <tetromino/float16.hpp>
#include <tetromino/hadamard.hpp>

#include "isa/backend.hpp"
#include "reference/generators.hpp"

#include <cstring>  // std::memcmp
#include <vector>   // std::vector

#if !TETROMINO_TEST_VECTORS
TEST_CASE("the simd backend exists") { WARN("xsimd was not found: there is nothing to test"); }
#else

namespace {

using tetromino::batch_view;
using tetromino::hadamard;
using tetromino_test::vectors;

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
void compare(reference::generator& random, const hadamard& rotation) {
  const std::size_t rows = 1 + random.below(3), cols = 1 + random.below(2500);
  std::vector<T> x(rows * cols), expected(x.size()), got(x.size());
  for (T& v : x) {
    v = tetromino::detail::from_float<T>(random.below(9) == 0 ? -0.0f : static_cast<float>(random.student_t4()));
  }
  const auto view = [&](std::vector<T>& v) { return batch_view<T>(v.data(), 1, rows, cols, cols, 0); };
  rotate(tetromino::scalar, view(x), rotation, view(expected));
  rotate(vectors, view(x), rotation, view(got));
  CHECK(same(expected, got));
  rotate_back(tetromino::scalar, view(x), rotation, view(expected));
  rotate_back(vectors, view(x), rotation, view(got));
  CHECK(same(expected, got));
}

TEST_CASE("simd rotates as scalar does") {
  reference::generator random(tetromino_test::seed());
  for (const std::size_t size : {16u, 32u, 64u, 128u}) {
    for (int round = 0; round < 20; ++round) {
      hadamard rotation{size, {}};
      if (round % 2 != 0) rotation.sign_seed = random.bits();
      INFO("size " << size << (round % 2 != 0 ? ", signs" : ""));
      compare<float>(random, rotation);
      compare<tetromino::half>(random, rotation);
      compare<tetromino::bfloat16>(random, rotation);
    }
  }
}

}  // namespace

#endif
