#pragma once

#include "detail/macros_off.hpp"

/// Opt-in: packing with error feedback (GPTQ). Needs Eigen.

#include "detail/float_state.hpp"  // default_float_state
#include "detail/row.hpp"          // admit, is_finite
#include "detail/sizes.hpp"        // check_sizes
#include "eigen.hpp"               // eigen_matrix, eigen_map
#include "hadamard.hpp"            // rotate
#include "quantize.hpp"            // try_quantize_to

#include <Eigen/Cholesky>  // Eigen::LLT

#include <algorithm>    // std::min, std::sort
#include <cmath>        // std::isfinite
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <numeric>      // std::iota
#include <optional>     // std::optional
#include <type_traits>  // std::is_invocable_v
#include <utility>      // std::move, std::pair
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE {

/// The second moments of a layer's input, gathered from calibration activations as they stream by: H, the sum of y^T y
/// over the rows y [cols] that meet the packed weights, and the drift D, the sum of (x - y)^T y, where x is the same
/// row in the float model. In one stream nothing is packed before the layer, y is x and D is 0. In two streams y comes
/// from the model as packed so far, its activations rounded as they will be. Takes cols^2 doubles, with drift twice
/// that, whatever the number of rows.
class calibration {
 public:
  TETROMINO_ABI explicit calibration(std::size_t cols)
      : moments_(Eigen::MatrixXd::Zero(static_cast<Eigen::Index>(cols), static_cast<Eigen::Index>(cols))) {}

  /// Moments [cols, cols] that were gathered before, of which the lower triangle counts, of how many rows they are, and
  /// their drift [cols, cols], empty for none.
  TETROMINO_ABI calibration(Eigen::MatrixXd moments, double rows, Eigen::MatrixXd drift = {})
      : moments_(std::move(moments)), drift_(std::move(drift)), rows_(rows) {
    TETROMINO_EXPECTS(moments_.rows() == moments_.cols(), "moments are a square matrix", moments_.rows(),
                      moments_.cols());
    TETROMINO_EXPECTS(drift_.size() == 0 || (drift_.rows() == moments_.rows() && drift_.cols() == moments_.cols()),
                      "drift is empty or has the size of the moments", drift_.rows(), drift_.cols());
  }

  [[nodiscard]] TETROMINO_ABI std::size_t cols() const noexcept { return static_cast<std::size_t>(moments_.rows()); }
  /// Rows seen so far, or their equivalent after blending.
  [[nodiscard]] TETROMINO_ABI double rows() const noexcept { return rows_; }

  /// Adds activations x[rows, cols], of one stream. Errors: shape_mismatch; non_finite.
  template <real T>
  TETROMINO_ABI result<void> try_add(const matrix_view<const T>& x) {
    return add_pieces<T>(x, nullptr);
  }
  template <real T>
  TETROMINO_ABI void add(const matrix_view<const T>& x) {
    try_add(x).value();
  }

  /// Adds activations of two streams: x[rows, cols] of the float model and met[rows, cols], the same rows as they meet
  /// the packed weights: rounded if they are, and turned back if they meet them rotated. Errors: as above.
  template <real T>
  TETROMINO_ABI result<void> try_add(const matrix_view<const T>& x, const matrix_view<const T>& met) {
    if (x.rows != met.rows || x.cols != met.cols) {
      return error(errc::shape_mismatch, {"calibration: expected the same rows of two streams, got ", x.rows, " x ",
                                          x.cols, " and ", met.rows, " x ", met.cols});
    }
    return add_pieces<T>(met, &x);
  }
  template <real T>
  TETROMINO_ABI void add(const matrix_view<const T>& x, const matrix_view<const T>& met) {
    try_add(x, met).value();
  }

  /// Joins the moments of other rows to these, such as those of another rank. Pre: the same number of columns.
  TETROMINO_ABI void merge(const calibration& other) {
    TETROMINO_EXPECTS(other.cols() == cols(), "calibrations that merge have the same columns", other.cols(), cols());
    const detail::default_float_state usual;
    moments_ += other.moments_;
    add_drift(other.drift_, 1);
    rows_ += other.rows_;
  }

  /// These moments with the mean moments of `prior` added as if `strength` more rows had been seen: for an expert that
  /// few calibration tokens reach, with its layer's moments as the prior. Pre: the same number of columns.
  [[nodiscard]] TETROMINO_ABI calibration blended(const calibration& prior, double strength) const {
    TETROMINO_EXPECTS(prior.cols() == cols(), "calibrations that blend have the same columns", prior.cols(), cols());
    const detail::default_float_state usual;
    calibration out = *this;
    if (prior.rows_ == 0) return out;
    out.moments_ += prior.moments_ * (strength / prior.rows_);
    out.add_drift(prior.drift_, strength / prior.rows_);
    out.rows_ += strength;
    return out;
  }

  /// The moments of the same rows after a rotation, for weights that are rotated alike. Pre: a size that rotate takes.
  [[nodiscard]] TETROMINO_ABI calibration rotated(const hadamard& rotation) const {
    TETROMINO_EXPECTS(detail::check_rotation(rotation), "a Hadamard rotation of 16, 32, 64 or 128");
    const detail::default_float_state usual;
    constexpr std::size_t piece = 128;  // whole blocks of every size
    const detail::row_rotation prepared(rotation, cols());
    calibration out(moments_.selfadjointView<Eigen::Lower>(), rows_, drift_);
    for (std::size_t first = 0; first < cols(); first += piece) {
      const std::size_t size = std::min(piece, cols() - first);
      const auto at = static_cast<Eigen::Index>(first), n = static_cast<Eigen::Index>(size);
      eigen_matrix<float> turned(n, n);
      for (Eigen::Index r = 0; r < n; ++r) {
        const eigen_matrix<float> unit = eigen_matrix<float>::Identity(n, n).row(r);
        prepared.apply(unit.data(), first, size, turned.row(r).data());
      }
      const Eigen::MatrixXd turn = turned.cast<double>();
      for (Eigen::MatrixXd* m : {&out.moments_, &out.drift_}) {
        if (m->size() == 0) continue;
        m->middleCols(at, n) = (m->middleCols(at, n) * turn).eval();
        m->middleRows(at, n) = (turn.transpose() * m->middleRows(at, n)).eval();
      }
    }
    return out;
  }

  /// The mean squared activation of each column: quantize_options::column_weights for weights that meet these
  /// activations. All 1 where nothing was seen.
  [[nodiscard]] TETROMINO_ABI std::vector<float> column_weights() const {
    const detail::default_float_state usual;
    std::vector<float> weights(cols(), 1.0f);
    for (std::size_t k = 0; k < cols() && rows_ > 0; ++k) {
      const auto i = static_cast<Eigen::Index>(k);
      weights[k] = static_cast<float>(moments_(i, i) / rows_);
    }
    return weights;
  }

  /// The moments' lower triangle [cols, cols].
  [[nodiscard]] TETROMINO_ABI const Eigen::MatrixXd& moments() const noexcept { return moments_; }
  /// The drift [cols, cols]; empty where only one stream was seen.
  [[nodiscard]] TETROMINO_ABI const Eigen::MatrixXd& drift() const noexcept { return drift_; }

 private:
  /// Adds the rows `met`, which drifted from those of the float model, if there are any.
  template <real T>
  TETROMINO_ABI result<void> add_pieces(const matrix_view<const T>& met, const matrix_view<const T>* original) {
    const detail::default_float_state usual;
    if (met.cols != cols()) {
      return error(errc::shape_mismatch, {"calibration of ", cols(), " columns got rows of ", met.cols});
    }
    constexpr std::size_t piece = 512;
    Eigen::MatrixXd rows, away;
    if (original != nullptr && drift_.size() == 0) drift_.setZero(moments_.rows(), moments_.cols());
    for (std::size_t first = 0; first < met.rows; first += piece) {
      const std::size_t n = std::min(piece, met.rows - first);
      if (auto done = read_columns(met, first, n, rows); !done) return done;
      if (original != nullptr) {
        if (auto done = read_columns(*original, first, n, away); !done) return done;
        away -= rows;
        drift_.noalias() += away * rows.transpose();
      }
      moments_.selfadjointView<Eigen::Lower>().rankUpdate(rows);
      rows_ += static_cast<double>(n);
    }
    return {};
  }

  /// Rows [first, first + n) of x as the columns of `out`.
  template <real T>
  TETROMINO_ABI static result<void> read_columns(const matrix_view<const T>& x, std::size_t first, std::size_t n,
                                                 Eigen::MatrixXd& out) {
    out.resize(static_cast<Eigen::Index>(x.cols), static_cast<Eigen::Index>(n));
    for (std::size_t r = 0; r < n; ++r) {
      for (std::size_t k = 0; k < x.cols; ++k) {
        const float value = detail::to_float(x(first + r, k));
        if (!detail::is_finite(value)) {
          return error(errc::non_finite, {"calibration: expected finite activations, got ", value, " at row ",
                                          first + r, ", column ", k});
        }
        out(static_cast<Eigen::Index>(k), static_cast<Eigen::Index>(r)) = static_cast<double>(value);
      }
    }
    return {};
  }

  TETROMINO_ABI void add_drift(const Eigen::MatrixXd& other, double share) {
    if (other.size() == 0) return;
    if (drift_.size() == 0) drift_.setZero(moments_.rows(), moments_.cols());
    drift_ += other * share;
  }

  Eigen::MatrixXd moments_;  // the lower triangle counts
  Eigen::MatrixXd drift_;    // empty: none
  double rows_ = 0;
};

/// When the scales of a block are chosen.
enum class gptq_scales : std::uint8_t {
  fixed,      ///< from the original weights, before any feedback
  refreshed,  ///< from the weights as the feedback has left them, when their block's turn comes
};

/// What a caller may choose about error feedback.
struct gptq_options {
  double damping = 0.01;  ///< added to the moments' diagonal, as a share of its mean; 0 or more
  /// The same where weights make up for drift: what only weak directions of the input would allow is no help elsewhere.
  double drift_damping = 0.3;
  gptq_scales scales = gptq_scales::refreshed;
  bool by_activation = false;  ///< columns of large activations first; needs fixed scales
};

namespace detail::inline TETROMINO_ISA {

/// Replaces a lower triangular matrix by its inverse, by halves, so that the work is in matrix products.
inline void invert_lower(Eigen::Ref<Eigen::MatrixXd> m) {
  const Eigen::Index n = m.rows(), half = n / 2, rest = n - half;
  if (n <= 64) {
    const Eigen::MatrixXd inverse = m.triangularView<Eigen::Lower>().solve(Eigen::MatrixXd::Identity(n, n));
    m.triangularView<Eigen::Lower>() = inverse;
    return;
  }
  invert_lower(m.topLeftCorner(half, half));
  invert_lower(m.bottomRightCorner(rest, rest));
  const Eigen::MatrixXd right =
      m.bottomLeftCorner(rest, half) * m.topLeftCorner(half, half).triangularView<Eigen::Lower>();
  m.bottomLeftCorner(rest, half).noalias() = -(m.bottomRightCorner(rest, rest).triangularView<Eigen::Lower>() * right);
}

/// Replaces moments, of which the lower triangle counts, by the Cholesky factor of themselves and `share` of their mean
/// added to the diagonal; of more, where rounding has left nearly dependent columns without one.
inline void factor_damped(Eigen::MatrixXd& moments, double share) {
  const double mean = moments.diagonal().mean();
  Eigen::MatrixXd damped;
  do {
    damped = moments;
    damped.diagonal().array() += share * mean;
    share = std::max(10 * share, 1e-6);
  } while (Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>>(damped).info() != Eigen::Success);
  moments.swap(damped);
}

/// The upper triangular factor U of the inverse of the damped moments, U^T U = H^-1, with columns in the given order.
/// Row j of U says how an error in column j is best made up for by the columns after it.
inline eigen_matrix<float> feedback_factor(const calibration& seen, double damping,
                                           const std::vector<std::size_t>& order) {
  const auto n = static_cast<Eigen::Index>(seen.cols());
  const Eigen::MatrixXd& lower = seen.moments();
  if (!(lower.diagonal().mean() > 0)) return eigen_matrix<float>::Identity(n, n);
  // Reversed, so that one Cholesky factor of H gives the factor of its inverse: H = R R^T with R upper, U = R^-1.
  Eigen::MatrixXd reversed(n, n);
  const auto at = [&](Eigen::Index i) { return static_cast<Eigen::Index>(order[static_cast<std::size_t>(n - 1 - i)]); };
  for (Eigen::Index j = 0; j < n; ++j) {
    for (Eigen::Index i = j; i < n; ++i) {
      const Eigen::Index a = at(i), b = at(j);
      reversed(i, j) = a >= b ? lower(a, b) : lower(b, a);
    }
  }
  factor_damped(reversed, damping);
  invert_lower(reversed);
  return reversed.triangularView<Eigen::Lower>().toDenseMatrix().reverse().cast<float>();
}

/// Moves weights W to those whose products with the rows y that they will meet are nearest to the float model's, as far
/// as damping lets them: W + W D (H + damping)^-1, the least of |x W^T - y Q^T|^2 + damping |Q - W|^2 over Q. Weights
/// that are not finite stay, and have no say.
template <class Policy>
void correct_weights(const Policy& policy, const calibration& seen, double damping, matrix<float>& weights) {
  if (seen.drift().size() == 0 || !(seen.moments().diagonal().mean() > 0)) return;
  Eigen::MatrixXd factor = seen.moments();
  factor_damped(factor, damping);
  constexpr std::size_t piece = 128;  // rows of one product, so that threads change nothing in it
  for_each_row(policy.executor, (weights.rows + piece - 1) / piece, piece * weights.cols, [&](std::size_t p) {
    const std::size_t first = p * piece, n = std::min(piece, weights.rows - first);
    Eigen::MatrixXd part(static_cast<Eigen::Index>(weights.cols), static_cast<Eigen::Index>(n));
    const auto at = [&](std::size_t i, std::size_t k) -> double& {
      return part(static_cast<Eigen::Index>(k), static_cast<Eigen::Index>(i));
    };
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t k = 0; k < weights.cols; ++k) {
        const float w = weights(first + i, k);
        at(i, k) = is_finite(w) ? static_cast<double>(w) : 0.0;
      }
    }
    part = seen.drift().transpose() * part;
    factor.triangularView<Eigen::Lower>().solveInPlace(part);
    factor.triangularView<Eigen::Lower>().transpose().solveInPlace(part);
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t k = 0; k < weights.cols; ++k) {
        float& w = weights(first + i, k);
        const auto moved = static_cast<float>(static_cast<double>(w) + at(i, k));
        if (is_finite(moved)) w = moved;
      }
    }
  });
}

/// What turns an element into its code and back under the scales of its block.
struct element_scale {
  float factor = 1;  // macro-block factor f of 8 bits, or float(1 / f) of 2 bits
  float step = 0;    // 2^E, or float(t * s); 0: the element is 0; NaN: its block is poisoned
  float fine = 0;    // f of 2 bits; 0: there is none

  [[nodiscard]] bool is_poisoned() const { return !is_finite(step); }
  [[nodiscard]] e2m1 encode(float x) const {
    return step == 0 || is_poisoned() ? e2m1{} : e2m1::encode(rounded(factor * x) / step);
  }
  [[nodiscard]] float decode(e2m1 code) const {
    return (fine != 0 ? code.value() * fine : rounded(code.value() / factor)) * step;
  }
};

template <block_format Format>
element_scale scale_at(const packed<Format>& p, std::size_t row, std::size_t col) {
  const packed_shape shape = p.shape();
  const std::uint8_t byte = p.scales[row * shape.blocks_per_row() + col / shape.format.block];
  if (shape.format.scale == scale_type::e4m3)
    return {1.0f, rounded(p.tensor_scales[0] * e4m3::from_bits(byte).value())};
  const float step = e8m0::from_bits(byte).value();
  if (shape.format.macro_block == 0) return {1.0f, step};
  const std::uint8_t* macros = p.macros.data() + row * shape.macros_per_row();
  if (shape.format.macro_bits == 8) return {macro_factor(macros[col / shape.format.macro_block]), step};
  const unsigned m = fine_bits(macros, elements_per_factor(shape.format), col);
  return {fine_inverse(m), step, fine_factor(m)};
}

/// Packs columns x[rows, n] by themselves, for the sake of their scales. Where they are whole blocks, rows are laid
/// side by side, since backends take many blocks of a row at once; scales and macro bytes come row after row either
/// way.
template <class Policy>
result<packed<any_format>> pack_columns(const Policy& policy, const Eigen::Ref<const eigen_matrix<float>>& x,
                                        const any_format& format, quantize_options options) {
  const auto rows = static_cast<std::size_t>(x.rows()), n = static_cast<std::size_t>(x.cols());
  const bool whole = n % std::max(format.block, format.macro_block) == 0;
  const std::size_t together = whole ? std::max<std::size_t>(1, 1024 / n) : 1;
  eigen_matrix<float> side_by_side = eigen_matrix<float>::Zero(
      static_cast<Eigen::Index>((rows + together - 1) / together), static_cast<Eigen::Index>(together * n));
  for (std::size_t r = 0; r < rows; ++r) {
    side_by_side.block(static_cast<Eigen::Index>(r / together), static_cast<Eigen::Index>(r % together * n), 1,
                       x.cols()) = x.row(static_cast<Eigen::Index>(r));
  }
  std::vector<float> weights;
  for (std::size_t i = 0; i < together; ++i) {
    weights.insert(weights.end(), options.column_weights.begin(), options.column_weights.end());
  }
  options.column_weights = weights;
  return try_quantize(policy, view_of(side_by_side), format, options);
}

/// Chooses the scales of columns [first, first + macro or block) of all rows, from the weights as they are now.
template <class Policy>
result<void> refresh_scales(const Policy& policy, const eigen_matrix<float>& w, std::size_t first,
                            const quantize_options& options, packed<any_format>& out) {
  const packed_shape shape = out.shape();
  const any_format& format = shape.format;
  const auto columns = [&](std::size_t n) {
    return w.middleCols(static_cast<Eigen::Index>(first), static_cast<Eigen::Index>(n));
  };
  const auto at_most = [&](std::size_t n) { return std::min(n, shape.cols - first); };
  quantize_options here = options;
  here.tensor_scales = out.tensor_scales;
  const auto weigh = [&](std::size_t n) {
    if (!options.column_weights.empty()) here.column_weights = options.column_weights.subspan(first, n);
  };
  if (format.macro_bits == 2) {
    const std::size_t n = at_most(format.block);
    weigh(n);
    const auto chosen = pack_columns(policy, columns(n), format, here);
    if (!chosen) return chosen.error();
    // A block's factors are a whole byte or half of one.
    const auto shift = first % format.macro_block / 8;
    const unsigned mask = format.macro_block == format.block ? 0xFFu : 0xFu << shift;
    for (std::size_t r = 0; r < shape.rows; ++r) {
      std::uint8_t& macro = out.macros[r * shape.macros_per_row() + first / format.macro_block];
      macro = static_cast<std::uint8_t>((macro & ~mask) | (unsigned{chosen->macros[r]} << shift & mask));
      if (scale_at(out, r, first).is_poisoned()) continue;
      out.scales[r * shape.blocks_per_row() + first / format.block] = chosen->scales[r];
    }
    return {};
  }
  if (format.macro_block != 0 && first % format.macro_block == 0) {
    const std::size_t n = at_most(format.macro_block);
    weigh(n);
    const auto chosen = pack_columns(policy, columns(n), format, here);
    if (!chosen) return chosen.error();
    for (std::size_t r = 0; r < shape.rows; ++r) {
      out.macros[r * shape.macros_per_row() + first / format.macro_block] = chosen->macros[r];
    }
  }
  // With the macro-block factors applied, what remains is the format without macro blocks.
  const std::size_t n = at_most(format.block);
  weigh(n);
  eigen_matrix<float> block = columns(n);
  for (std::size_t r = 0; r < shape.rows && format.macro_block != 0; ++r) {
    block.row(static_cast<Eigen::Index>(r)) *= scale_at(out, r, first).factor;
  }
  const auto chosen = pack_columns(policy, block, any_format(format.scale, format.block, 0), here);
  if (!chosen) return chosen.error();
  for (std::size_t r = 0; r < shape.rows; ++r) {
    if (scale_at(out, r, first).is_poisoned()) continue;
    out.scales[r * shape.blocks_per_row() + first / format.block] = chosen->scales[r];
  }
  return {};
}

/// Says which of the moments cannot be used, if one cannot.
inline result<void> check_moments(const calibration& seen) {
  const auto n = static_cast<Eigen::Index>(seen.cols());
  const auto refused = [](double moment, Eigen::Index i, Eigen::Index j) {
    return error(errc::non_finite,
                 {"gptq: expected finite moments of the activations, got ", moment, " for columns ", i, " and ", j});
  };
  for (Eigen::Index j = 0; j < n; ++j) {
    for (Eigen::Index i = j; i < n; ++i) {
      const double moment = seen.moments()(i, j);
      if (!std::isfinite(moment) || (i == j && moment < 0)) return refused(moment, i, j);
    }
    for (Eigen::Index i = 0; i < n && seen.drift().size() != 0; ++i) {
      if (!std::isfinite(seen.drift()(i, j))) return refused(seen.drift()(i, j), i, j);
    }
  }
  if (!std::isfinite(seen.rows()) || seen.rows() < 0) {
    return error(errc::non_finite, {"gptq: expected moments of a number of rows, got ", seen.rows()});
  }
  const std::vector<float> mean_squares = seen.column_weights();
  for (std::size_t k = 0; k < mean_squares.size(); ++k) {
    if (std::isfinite(mean_squares[k])) continue;
    return error(errc::non_finite,
                 {"gptq: expected activations whose mean square is a finite float, got larger ones in column ", k});
  }
  return {};
}

/// Says why weights cannot be packed with error feedback, if they cannot.
template <class T>
result<void> check_feedback(const matrix_view<T>& w, const calibration& gathered, const quantize_options& options,
                            const gptq_options& feedback) {
  if (auto fits = check_sizes(1, w.rows, w.cols); !fits) return fits;
  if (gathered.cols() != w.cols) {
    return error(errc::shape_mismatch,
                 {"gptq: the weights have ", w.cols, " columns, the calibration ", gathered.cols()});
  }
  for (const double share : {feedback.damping, feedback.drift_damping}) {
    if (std::isfinite(share) && share >= 0) continue;
    return error(errc::invalid_argument, {"gptq: expected a damping of 0 or more, got ", share});
  }
  if (feedback.by_activation && feedback.scales != gptq_scales::fixed) {
    return error(errc::invalid_argument, "gptq: an order by activation needs fixed scales");
  }
  if (options.rounding != element_rounding::nearest_even) {
    return error(errc::invalid_argument, "gptq: error feedback rounds to nearest");
  }
  return check_moments(gathered);
}

/// The columns in the order in which they are rounded.
inline std::vector<std::size_t> column_order(const calibration& seen, const gptq_options& feedback) {
  std::vector<std::size_t> order(seen.cols());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (feedback.by_activation) {
    const std::vector<float> mean_squares = seen.column_weights();
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return mean_squares[a] > mean_squares[b]; });
  }
  return order;
}

/// The weights with their columns in this order, all of them finite: what belongs to a poisoned block is zero.
inline eigen_matrix<float> ordered_weights(const matrix<float>& weights, const std::vector<std::size_t>& order,
                                           special_values special, const packed<any_format>& out) {
  eigen_matrix<float> current(static_cast<Eigen::Index>(weights.rows), static_cast<Eigen::Index>(weights.cols));
  for (std::size_t j = 0; j < weights.cols; ++j) {
    for (std::size_t i = 0; i < weights.rows; ++i) {
      current(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) =
          scale_at(out, i, order[j]).is_poisoned() ? 0.0f : admit(weights(i, order[j]), special);
    }
  }
  return current;
}

/// The tensor scale of weights whose infinities saturate, which have no say in it; 0 where nothing is left.
template <class Policy, class T>
result<float> saturated_tensor_scale(const Policy& policy, const matrix_view<T>& w, const recipe& r,
                                     const quantize_options& options) {
  matrix<float> finite(w.rows, w.cols);
  for (std::size_t i = 0; i < w.rows; ++i) {
    for (std::size_t k = 0; k < w.cols; ++k) {
      const float x = to_float(w(i, k));
      finite(i, k) = is_finite(x) ? x : 0.0f;
    }
  }
  if (r.rotation != 0) {
    const hadamard rotation = options.rotation.value_or(hadamard{r.rotation});
    if (auto done = try_rotate(policy, finite, rotation, finite.view()); !done) return done.error();
  }
  return tensor_scale_for(amax(policy, finite, special_values::saturate), r.rule, options.invertible_tensor_scales);
}

/// Rounds column after column of the weights `current`, whose columns are in the order given, into `out`, which has
/// their scales already, and makes up for each error by the columns that follow, as the factor says.
template <class Policy>
result<void> round_with_feedback(const Policy& policy, eigen_matrix<float> current,
                                 const std::vector<std::size_t>& order, const eigen_matrix<float>& factor,
                                 const quantize_options& options, gptq_scales scales, packed<any_format>& out) {
  const packed_shape shape = out.shape();
  const std::size_t span = std::max<std::size_t>(128, out.format.macro_block);  // feedback goes further once per span
  eigen_matrix<float> errors(current.rows(), static_cast<Eigen::Index>(span));
  for (std::size_t first = 0; first < shape.cols; first += span) {
    const std::size_t last = std::min(shape.cols, first + span);
    for (std::size_t block = first; block < last; block += out.format.block) {
      const std::size_t end = std::min(last, block + out.format.block);
      if (scales == gptq_scales::refreshed) {
        if (auto done = refresh_scales(policy, current, block, options, out); !done) return done.error();
      }
      for_each_row(policy.executor, shape.rows, end - block, [&](std::size_t i) {
        float* row = current.row(static_cast<Eigen::Index>(i)).data();
        for (std::size_t j = block; j < end; ++j) {
          const float* tail = factor.row(static_cast<Eigen::Index>(j)).data();
          const std::size_t column = order[j];
          const element_scale scale = scale_at(out, i, column);
          const e2m1 code = scale.encode(row[j]);
          std::uint8_t& pair = out.codes[i * shape.code_bytes_per_row() + column / 2];
          pair =
              static_cast<std::uint8_t>(column % 2 == 0 ? (pair & 0xF0) | code.bits : (pair & 0x0F) | code.bits << 4);
          float error = (row[j] - scale.decode(code)) / tail[j];
          if (!is_finite(error)) error = 0;  // of a poisoned block, or beyond what floats can make up for
          errors(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j - first)) = error;
          for (std::size_t l = j + 1; l < last; ++l) row[l] -= error * tail[l];
        }
      });
    }
    const auto done = static_cast<Eigen::Index>(last - first), rest = static_cast<Eigen::Index>(shape.cols - last);
    if (rest == 0) break;
    const auto tail = factor.block(static_cast<Eigen::Index>(first), static_cast<Eigen::Index>(last), done, rest);
    for_each_row(policy.executor, (shape.rows + 63) / 64, 64 * span, [&](std::size_t piece) {
      const auto i = static_cast<Eigen::Index>(64 * piece), n = std::min<Eigen::Index>(64, current.rows() - i);
      current.block(i, static_cast<Eigen::Index>(last), n, rest).noalias() -= errors.block(i, 0, n, done) * tail;
    });
  }
  return {};
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Packs weights w[rows, cols] with error feedback: column after column is rounded, and what rounding did to the
/// product with the calibration activations is made up for by the columns still to come. The scales are the format's
/// own, chosen by the recipe's rules; where those compare errors, the calibration's column weights count unless the
/// options give others. `gathered` is of the activations as they come; where the recipe rotates, its moments are
/// rotated too. A poisoned block stays as quantize has it and feeds nothing back. Same input, same bytes, whatever the
/// executor. Where the calibration has seen two streams, the weights first move to where they best make up for the
/// drift of their input: W + W D (H + drift_damping)^-1, and all else, scales included, is of those. Errors: as
/// try_quantize, shape_mismatch for a calibration of other columns, invalid_argument for options out of range, and
/// non_finite for moments that are not finite or too large. (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ",
/// arXiv 2210.17323; two streams: Zhang, Zhang, Colbert, Saab: "Qronos", arXiv 2505.11695,
/// and Li, Yin, Lee, Xiao, Panda: "GPTAQ", arXiv 2504.02692)
template <class Policy, class T>
  requires(can_quantize<Policy, float>)
result<packed<any_format>> try_gptq(const Policy& policy, const matrix_view<T>& w, const named_recipe& way,
                                    const calibration& gathered, quantize_options options = {},
                                    const gptq_options& feedback = {}) {
  if (!way) return way.error();
  const recipe& r = *way;
  const detail::default_float_state usual;
  if (auto fits = detail::check_feedback(w, gathered, options, feedback); !fits) return fits.error();
  recipe plain = r;
  plain.error_feedback = false;
  plain.rotation = 0;

  matrix<float> weights(w.rows, w.cols);
  for (std::size_t i = 0; i < w.rows; ++i) {
    for (std::size_t k = 0; k < w.cols; ++k) weights(i, k) = detail::admit(w(i, k), options.special);
  }
  float tensor_scale = 0;
  if (r.format.scale == scale_type::e4m3 && options.special == special_values::saturate &&
      options.tensor_scales.empty()) {
    const auto chosen = detail::saturated_tensor_scale(policy, w, r, options);
    if (!chosen) return chosen.error();
    tensor_scale = *chosen;
    if (tensor_scale != 0) options.tensor_scales = {&tensor_scale, 1};
  }
  std::optional<calibration> turned;
  if (r.rotation != 0) {
    const hadamard rotation = options.rotation.value_or(hadamard{r.rotation});
    if (auto done = try_rotate(policy, weights, rotation, weights.view()); !done) return done.error();
    turned = gathered.rotated(rotation);
    options.rotation.reset();
  }
  const calibration& seen = turned ? *turned : gathered;
  if (w.rows == 0 || w.cols == 0) return try_quantize(policy, weights, plain, options);
  detail::correct_weights(policy, seen, feedback.drift_damping, weights);
  std::vector<float> column_weights;
  if (options.column_weights.empty()) {
    column_weights = seen.column_weights();
    options.column_weights = column_weights;
  }
  auto out = try_quantize(policy, weights, plain, options);
  if (!out) return out;
  options.rule = plain.rule;
  options.macro = plain.macro;

  const std::vector<std::size_t> order = detail::column_order(seen, feedback);
  eigen_matrix<float> current = detail::ordered_weights(weights, order, options.special, *out);
  options.special = special_values::saturate;  // where feedback goes beyond the floats
  if (auto done = detail::round_with_feedback(policy, std::move(current), order,
                                              detail::feedback_factor(seen, feedback.damping, order), options,
                                              feedback.scales, *out);
      !done) {
    return done.error();
  }
  return out;
}

/// Packs a batch w[matrices, rows, cols], such as a layer's experts, matrix by matrix: `calibration_of(e)` gives the
/// calibration of matrix e. An NVFP4 batch gets a tensor scale for each matrix, unless the options give one for all.
/// Errors: as above, for the first matrix that fails.
template <class Policy, class T, class CalibrationOf>
  requires(can_quantize<Policy, float>&& std::is_invocable_v<const CalibrationOf&, std::size_t>)
result<packed<any_format>> try_gptq(const Policy& policy, const batch_view<T>& w, const named_recipe& way,
                                    const CalibrationOf& calibration_of, const quantize_options& options = {},
                                    const gptq_options& feedback = {}) {
  if (!way) return way.error();
  const recipe& r = *way;
  if (auto fits = detail::check_sizes(w.matrices, w.rows, w.cols); !fits) return fits.error();
  const std::size_t scales = options.tensor_scales.size();
  packed<any_format> out(r.format, w.matrices, w.rows, w.cols, scales == 1 ? 1 : w.matrices);
  for (const auto& [name, n] :
       {std::pair("column_weights", options.column_weights.size() / std::max<std::size_t>(1, w.cols)),
        std::pair("tensor_scales", scales)}) {
    if (n > 1 && n != w.matrices) {
      return error(errc::shape_mismatch,
                   {name, ": expected those of 1 or of ", w.matrices, " matrices, got those of ", n});
    }
  }
  for (std::size_t e = 0; e < w.matrices; ++e) {
    quantize_options here = options;
    if (options.column_weights.size() > w.cols)
      here.column_weights = options.column_weights.subspan(e * w.cols, w.cols);
    if (scales > 1) here.tensor_scales = options.tensor_scales.subspan(e, 1);
    const auto& seen = calibration_of(e);
    auto one = try_gptq(policy, w[e], r, seen, here, feedback);
    if (!one) return one.error();
    const packed_view<any_format, std::uint8_t> to = out.view()[e];
    std::copy(one->codes.begin(), one->codes.end(), to.codes.begin());
    std::copy(one->scales.begin(), one->scales.end(), to.scales.begin());
    std::copy(one->macros.begin(), one->macros.end(), to.macros.begin());
    std::copy(one->tensor_scales.begin(), one->tensor_scales.end(), to.tensor_scales.begin());
  }
  return out;
}

/// try_gptq, throwing its error.
template <class Policy, class T>
  requires(can_quantize<Policy, float>)
[[nodiscard]] packed<any_format> gptq(const Policy& policy, const matrix_view<T>& w, const named_recipe& way,
                                      const calibration& seen, const quantize_options& options = {},
                                      const gptq_options& feedback = {}) {
  return try_gptq(policy, w, way, seen, options, feedback).value();
}
template <class Policy, class T, class CalibrationOf>
  requires(can_quantize<Policy, float>&& std::is_invocable_v<const CalibrationOf&, std::size_t>)
[[nodiscard]] packed<any_format> gptq(const Policy& policy, const batch_view<T>& w, const named_recipe& way,
                                      const CalibrationOf& calibration_of, const quantize_options& options = {},
                                      const gptq_options& feedback = {}) {
  return try_gptq(policy, w, way, calibration_of, options, feedback).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
