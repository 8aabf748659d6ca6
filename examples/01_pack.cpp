// One matrix to 4 bits and back. Policy, input, format: every verb of the library has this form.
#include <tetromino/tetromino.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  namespace tt = tetromino;
  const std::size_t rows = 64, cols = 4096;
  std::vector<tt::bfloat16> weights(rows * cols);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    weights[i] = tt::bfloat16(std::sin(double(i)) * std::exp(std::cos(double(i) / 7)));
  }

  const tt::matrix_view w(weights.data(), rows, cols);  // a view: nothing is copied
  const auto mxfp4 = tt::quantize<tt::mxfp4>(tt::automatic, w);
  const auto nvfp4 = tt::quantize<tt::nvfp4>(tt::automatic, w);
  const auto finer = tt::quantize<tt::mbs<tt::mxfp4>>(tt::automatic, w);  // a factor for each 128 columns on top

  std::printf("%zu bytes of bfloat16\n", sizeof(tt::bfloat16) * weights.size());
  std::printf("%zu bytes of MXFP4,         %.2f dB\n", mxfp4.bytes(),
              tt::qsnr(w, tt::dequantize<float>(tt::automatic, mxfp4)));
  std::printf("%zu bytes of MXFP4 + MBS,   %.2f dB\n", finer.bytes(),
              tt::qsnr(w, tt::dequantize<float>(tt::automatic, finer)));
  std::printf("%zu bytes of NVFP4,         %.2f dB\n", nvfp4.bytes(),
              tt::qsnr(w, tt::dequantize<float>(tt::automatic, nvfp4)));
}
