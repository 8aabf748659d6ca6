// The experts of a layer at once, on threads that the caller lends: the library starts none of its own.
#include <tetromino/tetromino.hpp>

#include <atomic>
#include <cstdio>
#include <future>
#include <vector>

// Anything that runs task(0) ... task(count - 1) and waits for all is an executor; here, a few std::async.
struct my_pool {
  std::size_t workers = 4;
  std::atomic<std::size_t> tasks_run{0};

  void operator()(std::size_t count, tetromino::task_ref task) {
    std::atomic<std::size_t> next{0};
    std::vector<std::future<void>> done;
    for (std::size_t w = 0; w < workers; ++w) {
      done.push_back(std::async(std::launch::async, [&] {
        for (std::size_t i; (i = next++) < count; ++tasks_run) task(i);
      }));
    }
    for (auto& worker : done) worker.get();
  }
};

int main() {
  namespace tt = tetromino;
  const std::size_t experts = 64, rows = 48, cols = 512;
  std::vector<float> weights(experts * rows * cols);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = float(i * 2654435761u % 2001) / 1000 - 1;

  const tt::batch_view w(weights.data(), experts, rows, cols);
  tt::quantize_options options;
  options.scope = tt::tensor_scale_scope::per_matrix;  // NVFP4: a tensor scale for each expert

  my_pool pool;
  const auto packed = tt::quantize<tt::nvfp4>(tt::automatic.on(pool), w, options);
  const auto alone = tt::quantize<tt::nvfp4>(tt::automatic, w, options);
  std::printf("%zu experts in %zu tasks, %zu tensor scales; the same bytes as on one thread: %s\n", packed.matrices,
              pool.tasks_run.load(), packed.tensor_scales.size(), packed.codes == alone.codes ? "yes" : "no");

  const auto third = packed.view()[2];  // a view of one expert
  const auto back = tt::dequantize<float>(tt::automatic, third);
  std::printf("expert 2: %.2f dB\n", tt::qsnr(w[2], back));

  // Experts in allocations of their own, under one tensor scale: amax of all / (6 · 448), for four-over-six / (6 ·
  // 256). That is also the scale of a batch unless told otherwise.
  std::vector<tt::matrix_view<const float>> apart;
  for (std::size_t e = 0; e < experts; ++e) apart.push_back(w[e]);  // wherever they lie
  const float scale = tt::tensor_scale_for(tt::amax(tt::automatic, apart), tt::scale_rule::amax);
  const auto first = tt::quantize(tt::automatic, apart[0], "nvfp4", {.tensor_scales = {&scale, 1}});
  const bool as_batch = scale == tt::quantize<tt::nvfp4>(tt::automatic, w).tensor_scales[0];
  std::printf("expert 0 of [%zu, %zu] apart: tensor scale %g, as of the batch: %s\n", first.rows, apart[0].cols,
              double(first.tensor_scales[0]), as_batch ? "yes" : "no");
  return packed.codes == alone.codes && as_batch ? 0 : 1;
}
