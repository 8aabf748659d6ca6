// Calibrated packing: what activations look like decides where errors matter. Needs Eigen.
#include <tetromino/gptq.hpp>
#include <tetromino/tetromino.hpp>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

int main() {
  namespace tt = tetromino;
  const std::size_t outputs = 64, cols = 256, tokens = 1024;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> weights(outputs * cols), activations(tokens * cols);
  for (float& v : weights) v = normal(random);
  for (std::size_t t = 0; t < tokens; ++t) {  // a few columns are large, and neighbours resemble each other
    for (std::size_t k = 0; k < cols; ++k) {
      const float before = k == 0 ? 0 : activations[t * cols + k - 1];
      activations[t * cols + k] = 0.8f * before + normal(random) * (k % 37 == 0 ? 8.0f : 1.0f);
    }
  }
  const tt::matrix_view<const float> w(weights.data(), outputs, cols);
  const tt::matrix_view<const float> x(activations.data(), tokens, cols);

  tt::calibration seen(cols);
  seen.add(x);  // as often as activations come by; memory is that of one [cols, cols]
  // Where layers before this one are packed, seen.add(x, met) takes two streams: the float model's rows, and the same
  // rows as these weights will meet them. gptq then makes up for the difference as well.

  // What packing adds to the layer's outputs, as a share of them: the root mean square of x (w - w')^T over that of x
  // w^T.
  const auto damage = [&](const tt::packed<tt::any_format>& packed) {
    const auto back = tt::dequantize<float>(tt::automatic, packed);
    double error = 0, signal = 0;
    for (std::size_t t = 0; t < tokens; t += 8) {
      for (std::size_t n = 0; n < outputs; ++n) {
        double kept = 0, lost = 0;
        for (std::size_t k = 0; k < cols; ++k) {
          kept += double(x(t, k)) * double(w(n, k));
          lost += double(x(t, k)) * double(w(n, k) - back(n, k));
        }
        error += lost * lost, signal += kept * kept;
      }
    }
    return std::sqrt(error / signal);
  };

  const auto recipe = tt::recipe::parse("nvfp4/min-error");
  const auto feedback = tt::recipe::parse("nvfp4/min-error/gptq");
  tt::quantize_options weighted;
  const std::vector<float> importance = seen.column_weights();
  weighted.column_weights = importance;
  std::printf("plain %.4f, weighted %.4f, ", damage(tt::quantize(tt::automatic, w, recipe)),
              damage(tt::quantize(tt::automatic, w, recipe, weighted)));
  std::printf("with error feedback %.4f\n", damage(tt::gptq(tt::automatic, w, feedback, seen)));
}
