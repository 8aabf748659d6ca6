// expect: no header that is included multiplies these operands
// A device's products come with the header of its backend.
#include <tetromino/matmul.hpp>

struct my_device {
  static constexpr bool device_memory = true;
};
struct my_weights {};

#if !defined(MUST_FAIL)
tetromino::result<void> matmul_on(const my_device&, const tetromino::matrix_view<const float>&, const my_weights&,
                                  const tetromino::matrix_view<float>&) {
  return {};
}
#endif

int main() {
  const float x[32] = {};
  float out[32] = {};
  tetromino::matmul(my_device{}, tetromino::matrix_view(x, 1, 32), my_weights{}, tetromino::matrix_view(out, 1, 32));
  return static_cast<int>(out[0]);
}
