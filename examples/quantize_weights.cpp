#include <tetromino/tetromino.hpp>

#include <cstdio>
#include <vector>

int main() {
  namespace tt = tetromino;
  std::vector<float> weights(64 * 4096);  // [64 rows, K = 4096]
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = float(int(i * 2654435761u >> 16 & 1023) - 512) / 512;

  const tt::matrix_view w(weights.data(), 64, 4096);
  const auto packed = tt::quantize<tt::mbs<tt::mxfp4_16>>(tt::automatic, w);  // the fastest backend of this build
  const auto back = tt::dequantize<float>(tt::automatic, packed);
  std::printf("%zu bytes -> %zu bytes, %.2f dB\n", weights.size() * sizeof(float), packed.bytes(), tt::qsnr(w, back));
}
