#include <tetromino/cpu.hpp>

#include <cstdio>
#include <vector>

/// Expects the backend that is named on the command line.
int main(int argc, char** argv) {
  const std::vector<float> weights(4 * 64, 1.5f);
  const auto packed =
      tetromino::quantize<tetromino::mxfp4>(tetromino::cpu, tetromino::matrix_view<const float>(weights.data(), 4, 64));
  const auto back = tetromino::dequantize<float>(tetromino::cpu, packed);
  std::printf("tetromino::cpu uses %s\n", std::string(tetromino::cpu.backend()).c_str());
  return back.data == weights && argc == 2 && tetromino::cpu.backend() == argv[1] ? 0 : 1;
}
