// Products with packed weights: one matrix, and the experts of a layer.
#include <tetromino/simd.hpp>
#include <tetromino/repacked.hpp>
#include <tetromino/tetromino.hpp>

#include <cstdio>
#include <vector>

int main() {
  namespace tt = tetromino;
  const std::size_t experts = 4, outputs = 96, cols = 512, tokens = 6;
  std::vector<float> weights(experts * outputs * cols), activations(tokens * cols);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = float(i * 2654435761u % 2001) / 1000 - 1;
  for (std::size_t i = 0; i < activations.size(); ++i) activations[i] = float(i * 40503u % 1999) / 1000 - 1;
  const tt::batch_view w(weights.data(), experts, outputs, cols);
  const tt::matrix_view x(activations.data(), tokens, cols);

  // W4A16: float, half or bfloat16 activations. out[m, n] = sum over k of x[m, k] * w[n, k]
  const auto packed = tt::quantize<tt::mxfp4>(tt::automatic, w);
  tt::matrix<float> out(tokens, outputs);
  tt::matmul(tt::automatic, x, packed.view()[0], out.view()[0]);

  // W4A8: activations rounded to int8 by block; weights that stay are faster once they are repacked.
  const auto fast = tt::repack(tt::automatic, packed);
  const auto x8 = tt::quantize_int8(tt::automatic, x);
  const std::vector<std::uint32_t> first_row = {0, 2, 2, 5, 6};  // expert e has the rows from first_row[e] on
  tt::matrix<float> grouped(tokens, outputs);
  tt::grouped_matmul(tt::automatic, x8, fast, first_row, grouped.view()[0]);

  // W4A4: activations packed themselves.
  const auto x4 = tt::quantize(tt::automatic, x, "mxfp4-32/oas/mbs-static");
  tt::matrix<float> both(tokens, outputs);
  tt::matmul(tt::automatic, x4, packed.view()[0], both.view()[0]);

  double exact = 0;
  for (std::size_t k = 0; k < cols; ++k) exact += double(activations[k]) * double(weights[k]);
  std::printf("in double %.4f; W4A16 %.4f; W4A8 %.4f; W4A4 %.4f\n", exact, double(out(0, 0)), double(grouped(0, 0)),
              double(both(0, 0)));
}
