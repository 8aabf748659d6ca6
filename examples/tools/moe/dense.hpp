#pragma once

/// Float arithmetic of the example model: what is not packed into 4 bits.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

namespace dense {

/// The compiler's vectors of floats, as wide as the instruction set.
#if defined(__AVX512F__)
inline constexpr std::size_t lanes = 16;
#elif defined(__AVX__)
inline constexpr std::size_t lanes = 8;
#else
inline constexpr std::size_t lanes = 4;
#endif
using floats [[gnu::vector_size(lanes * sizeof(float))]] = float;

/// A weight matrix [outputs, inputs], kept in panels of 16 outputs side by side.
class matrix {
 public:
  matrix() = default;
  matrix(std::span<const float> weights, std::size_t outputs, std::size_t inputs)
      : outputs_(outputs), inputs_(inputs), panels_((outputs + width - 1) / width * width * inputs) {
    for (std::size_t n = 0; n < outputs; ++n) {
      float* const panel = panels_.data() + n / width * width * inputs;
      for (std::size_t k = 0; k < inputs; ++k) panel[k * width + n % width] = weights[n * inputs + k];
    }
  }

  [[nodiscard]] std::size_t outputs() const { return outputs_; }
  [[nodiscard]] std::size_t inputs() const { return inputs_; }
  /// The weights in the order in which they are kept.
  [[nodiscard]] std::span<float> kept() { return panels_; }

  /// y[rows, outputs] = x[rows, inputs] · weightsᵀ. Each output is summed over inputs from first to last, in any batch.
  void multiply(const float* x, std::size_t rows, float* y) const {
    constexpr std::size_t many = lanes == 16 ? 8 : lanes == 8 ? 6 : 3;
    for (std::size_t n = 0; n < outputs_; n += width) {
      std::size_t r = 0;
      for (; r + many <= rows; r += many) tile<many>(x + r * inputs_, n, y + r * outputs_ + n);
      for (; r + 2 <= rows; r += 2) tile<2>(x + r * inputs_, n, y + r * outputs_ + n);
      if (r < rows) tile<1>(x + r * inputs_, n, y + r * outputs_ + n);
    }
  }

 private:
  static constexpr std::size_t width = 16;

  /// Rows x[Rows, inputs] by the panel of output n.
  template <std::size_t Rows>
  void tile(const float* x, std::size_t n, float* y) const {
    constexpr std::size_t vectors = width / lanes;
    const float* const panel = panels_.data() + n * inputs_;
    floats sum[Rows][vectors] = {};
    for (std::size_t k = 0; k < inputs_; ++k) {
      floats w[vectors];
      std::memcpy(w, panel + k * width, sizeof w);
      for (std::size_t r = 0; r < Rows; ++r) {
        for (std::size_t v = 0; v < vectors; ++v) sum[r][v] += x[r * inputs_ + k] * w[v];
      }
    }
    const std::size_t used = std::min(width, outputs_ - n);
    for (std::size_t r = 0; r < Rows; ++r) {
      std::memcpy(y + r * outputs_, sum[r], used * sizeof(float));
    }
  }

  std::size_t outputs_ = 0;
  std::size_t inputs_ = 0;
  std::vector<float> panels_;
};

/// y = x / rms(x) · weight for each row of x[rows, width].
inline void rmsnorm(std::span<const float> x, std::span<const float> weight, float epsilon, std::span<float> y) {
  const std::size_t width = weight.size();
  for (std::size_t i = 0; i < x.size(); i += width) {
    double squares = 0;
    for (std::size_t c = 0; c < width; ++c) squares += static_cast<double>(x[i + c]) * static_cast<double>(x[i + c]);
    const auto factor =
        static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + static_cast<double>(epsilon)));
    for (std::size_t c = 0; c < width; ++c) y[i + c] = x[i + c] * factor * weight[c];
  }
}

/// Rotary embedding of one row of heads, in place: the halves (a, b) of each head turn by position · base^(−i / half).
class rotary {
 public:
  rotary(std::size_t positions, std::size_t head_size, float base)
      : half_(head_size / 2), cos_(positions * half_), sin_(positions * half_) {
    for (std::size_t p = 0; p < positions; ++p) {
      for (std::size_t i = 0; i < half_; ++i) {
        const double angle =
            static_cast<double>(p) * std::pow(base, -static_cast<double>(i) / static_cast<double>(half_));
        cos_[p * half_ + i] = static_cast<float>(std::cos(angle));
        sin_[p * half_ + i] = static_cast<float>(std::sin(angle));
      }
    }
  }

  void turn(std::span<float> row, std::size_t position) const {
    const float *const cos = cos_.data() + position * half_, *const sin = sin_.data() + position * half_;
    for (std::size_t h = 0; h < row.size(); h += 2 * half_) {
      for (std::size_t i = 0; i < half_; ++i) {
        const float a = row[h + i], b = row[h + half_ + i];
        row[h + i] = a * cos[i] - b * sin[i];
        row[h + half_ + i] = b * cos[i] + a * sin[i];
      }
    }
  }

 private:
  std::size_t half_;
  std::vector<float> cos_, sin_;  // [positions, half]
};

/// Causal attention within one document: q, k, v and out are [tokens, heads · size].
class attention {
 public:
  void operator()(const float* q, const float* k, const float* v, std::size_t tokens, std::size_t heads,
                  std::size_t width, float* out) {
    const std::size_t size = width / heads;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    keys_.resize(size * tokens);
    score_.resize(tokens);
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t c = 0; c < size; ++c) keys_[c * tokens + t] = k[t * width + h * size + c];
      }
      for (std::size_t t = 0; t < tokens; ++t) {
        const std::size_t seen = t + 1;
        std::fill(score_.begin(), score_.begin() + static_cast<std::ptrdiff_t>(seen), 0.0f);
        for (std::size_t c = 0; c < size; ++c) {
          const float value = q[t * width + h * size + c] * scale;
          for (std::size_t s = 0; s < seen; ++s) score_[s] += value * keys_[c * tokens + s];
        }
        const float top = *std::max_element(score_.begin(), score_.begin() + static_cast<std::ptrdiff_t>(seen));
        float sum = 0;
        for (std::size_t s = 0; s < seen; ++s) sum += score_[s] = std::exp(score_[s] - top);
        float* const to = out + t * width + h * size;
        std::fill(to, to + size, 0.0f);
        for (std::size_t s = 0; s < seen; ++s) {
          const float weight = score_[s] / sum;
          for (std::size_t c = 0; c < size; ++c) to[c] += weight * v[s * width + h * size + c];
        }
      }
    }
  }

 private:
  std::vector<float> keys_, score_;
};

/// −log softmax(logits)[target].
inline double negative_log_likelihood(std::span<const float> logits, std::size_t target) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); i += 64) {
    float part = 0;
    for (std::size_t j = i; j < std::min(logits.size(), i + 64); ++j) part += std::exp(logits[j] - top);
    sum += static_cast<double>(part);
  }
  return std::log(sum) - static_cast<double>(logits[target] - top);
}

}  // namespace dense
