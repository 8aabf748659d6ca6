// The way to pack as a name, picked when the program runs: 02_recipes [RECIPE...]
#include <tetromino/tetromino.hpp>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  namespace tt = tetromino;
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) {
    names = {"mxfp4-32/floor", "mxfp4-32/oas", "mxfp4-32/oas/mbs-search", "nvfp4/amax", "nvfp4/four-over-six"};
  }

  std::vector<float> weights(64 * 4096);
  for (std::size_t i = 0; i < weights.size(); ++i)
    weights[i] = float(std::sin(double(i)) * std::exp(std::cos(double(i) / 7)));
  const tt::matrix_view w(weights.data(), 64, 4096);

  tt::quantize_options options;
  options.special = tt::special_values::saturate;  // NaN and infinities: reject (the default), poison or saturate
  for (const std::string& name : names) {
    const auto recipe = tt::recipe::try_parse(name);  // the try_ form returns the error that parse would throw
    if (!recipe) {
      std::fprintf(stderr, "%s\n", recipe.error().what());
      return 2;
    }
    const auto packed = tt::quantize(tt::automatic, w, *recipe, options);
    const double bits = 8.0 * double(packed.bytes()) / double(weights.size());
    std::printf("%-28s %.2f bits, %.2f dB\n", recipe->name().c_str(), bits,
                tt::qsnr(w, tt::dequantize<float>(tt::automatic, packed)));
  }
}
