/// Most verbs on the CPU. link_order.sh compiles this file for several instruction sets, each with a name of its own
/// for SET, and links the objects into one program.

#include <tetromino/block_scaled.hpp>
#include <tetromino/layout.hpp>
#include <tetromino/metrics.hpp>
#include <tetromino/repacked.hpp>
#include <tetromino/simd.hpp>

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t
#include <string>   // std::string

#define JOIN(a, b) a##_##b
#define NAMED(a, b) JOIN(a, b)

namespace {

namespace tt = tetromino;

tt::matrix<float> numbers() {
  tt::matrix<float> x(2, 8, 256);
  std::uint32_t state = 1;
  for (float& v : x.data) {
    state = state * 1664525u + 1013904223u;
    v = static_cast<float>(static_cast<int>(state >> 20) - 2048) / 512.0f;
  }
  return x;
}

double round_trips(const tt::matrix<float>& x, const char* name) {
  const tt::recipe r = tt::recipe::parse(name);
  if (r.name() != name) return 0;
  const auto packed = tt::quantize(tt::scalar, x, r);
  tt::matrix<float> back = tt::dequantize<float>(tt::scalar, packed), again(2, 8, 256);
  if (r.rotation != 0) tt::rotate_back(tt::simd, back, {r.rotation, {}}, back.view());
  tt::fake_quantize(tt::scalar, x, r, again.view());
  if (again.data != back.data) return 0;
  const tt::bfloat16 least = tt::dequantize<tt::bfloat16>(tt::scalar, packed).data[0];
  return tt::qsnr(x, back) + static_cast<double>(tt::detail::to_float(least));
}

bool refuses(const tt::matrix<float>& x) {
  const auto unknown = tt::recipe::try_parse("mxfp4-32/none");
  const auto wrong = tt::try_quantize<tt::nvfp4>(tt::scalar, x, {.rule = tt::scale_rule::floor});
#if TETROMINO_EXCEPTIONS
  try {
    (void)tt::layout::as_modelopt(tt::packed<tt::mxfp4>({}, 1, 1, 32));
    return false;
  } catch (const tt::error& e) {
    if (std::string(e.what()).empty()) return false;
  }
#endif
  return !unknown && !wrong && !std::string(wrong.error().what()).empty();
}

bool multiplies(const tt::matrix<float>& x) {
  const auto w = tt::quantize<tt::mbs<tt::mxfp4_16>>(tt::scalar, x);
  const auto repacked = tt::repack(tt::scalar, w);
  if (tt::to_packed(tt::scalar, repacked).codes != w.codes) return false;
  tt::matrix<float> a(16, 8), b(16, 8);
  const std::uint32_t offsets[] = {0, 9, 16};
  tt::grouped_matmul(tt::scalar, tt::quantize_int8(tt::automatic, x), w, offsets, a.view()[0]);
  tt::grouped_matmul(tt::scalar, tt::quantize_int8(tt::automatic, x), repacked, offsets, b.view()[0]);
  return a.data == b.data;
}

bool orders(const tt::matrix<float>& x) {
  const auto mx = tt::quantize<tt::mxfp4>(tt::scalar.on(tt::executor_ref()), x);
  const auto nv = tt::quantize<tt::nvfp4>(tt::scalar, x, {.scope = tt::tensor_scale_scope::batch});
  const auto blocks = tt::layout::to_ggml(mx);
  const auto read = tt::layout::from_ggml(tt::mxfp4{}, blocks, 2, 8, 256);
  return read.codes == mx.codes && tt::layout::as_modelopt(nv).weight.size() == nv.codes.size() &&
         tt::repack(tt::scalar, mx, tt::block_scaled_kind::e8m0_32).codes.size() == mx.codes.size();
}

}  // namespace

/// Storage that another object reads: data types are the same in all of them.
tt::packed<tt::any_format> NAMED(packed, SET)();
tt::packed<tt::any_format> NAMED(packed, SET)() {
  return tt::quantize(tt::scalar, numbers(), tt::recipe::parse(RECIPE));
}
bool NAMED(reads, SET)(const tt::packed<tt::any_format>& other);
bool NAMED(reads, SET)(const tt::packed<tt::any_format>& other) { return other.codes == NAMED(packed, SET)().codes; }

/// 0 where everything is right.
int NAMED(run, SET)();
int NAMED(run, SET)() {
  const tt::matrix<float> x = numbers();
  for (const char* name : {"mxfp4-32/floor", "mxfp4-16/oas/mbs-search", "nvfp4/four-over-six", "nvfp4/min-error",
                           "mxfp4-32/min-error/hadamard-32"}) {
    if (!(round_trips(x, name) > 12)) return 1;
  }
  return refuses(x) && multiplies(x) && orders(x) ? 0 : 2;
}
