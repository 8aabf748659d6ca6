#include <tetromino/tetromino.hpp>

#include <cstdint>
#include <cstdio>
#include <vector>

/// Packs the same numbers in every kind of format; the bytes are the same however this is compiled.
int main() {
  namespace tt = tetromino;
  std::vector<float> weights(8 * 320);
  std::uint32_t random = 1;
  for (float& w : weights) {
    random = random * 1664525u + 1013904223u;
    w = (static_cast<float>(random >> 8) - 0x1p23f) / 777.0f;
  }
  const tt::matrix_view<const float> w(weights.data(), 8, 320);

  std::uint32_t checksum = 2166136261u;
  const auto add = [&](const std::vector<std::uint8_t>& bytes) {
    for (const std::uint8_t byte : bytes) checksum = (checksum ^ byte) * 16777619u;
  };
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/min-error/mbs-search", "mxfp4-32/even/mbs-static@64",
                           "nvfp4/amax/hadamard-32", "nvfp4/four-over-six", "nvfp4/min-error"}) {
    const auto recipe = tt::recipe::try_parse(name);
    if (!recipe) return 1;
    const auto packed = tt::try_quantize(tt::automatic, w, *recipe);
    if (!packed) return 1;
    add(packed->codes);
    add(packed->scales);
    add(packed->macros);
  }
  const auto packed = tt::quantize<tt::mxfp4>(tt::automatic, w);
  const auto back = tt::dequantize<float>(tt::automatic, packed);
  const double decibels = tt::qsnr(w, back);
  std::printf("tetromino %d.%d.%d: %.2f dB, checksum %08x\n", TETROMINO_VERSION_MAJOR, TETROMINO_VERSION_MINOR,
              TETROMINO_VERSION_PATCH, decibels, static_cast<unsigned>(checksum));
  return decibels > 15 && checksum == 0x1fa94007u ? 0 : 1;
}
