// expect: no header that is included puts weights into this storage
// A device's order of weights comes with the header of its backend.
#include <tetromino/repacked.hpp>

struct my_device {
  static constexpr bool device_memory = true;
};
struct my_storage {};

#if !defined(MUST_FAIL)
tetromino::result<void> repack_on(const my_device&, const tetromino::packed_view<tetromino::any_format>&,
                                  const my_storage&) {
  return {};
}
#endif

int main() {
  const tetromino::packed<tetromino::mxfp4> weights;
  tetromino::repack_to(my_device{}, weights, my_storage{});
  return 0;
}
