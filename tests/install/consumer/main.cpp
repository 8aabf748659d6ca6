#include <tetromino/tetromino.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  std::vector<float> weights(8 * 256);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = std::sin(static_cast<float>(i));

  const tetromino::matrix_view w(weights.data(), 8, 256);
  const auto packed = tetromino::quantize<tetromino::mxfp4>(tetromino::automatic, w);
  const auto back = tetromino::dequantize<float>(tetromino::automatic, packed);
  const double decibels = tetromino::qsnr(w, back);
  std::printf("tetromino %d.%d.%d: %.2f dB\n", TETROMINO_VERSION_MAJOR, TETROMINO_VERSION_MINOR,
              TETROMINO_VERSION_PATCH, decibels);
  return decibels > 15 ? 0 : 1;
}
