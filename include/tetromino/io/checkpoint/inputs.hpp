#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"    // result
#include "../../matrix.hpp"   // matrix_view
#include "../../options.hpp"  // quantize_options
#include "../../packed.hpp"   // packed
#include "../../scaling.hpp"  // recipe
#include "parameters.hpp"     // parameter

#include <cstddef>   // std::size_t
#include <optional>  // std::optional
#include <vector>    // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What is known of the inputs that a model's weights meet: whoever has gathered it tells the packer this way. Called
/// from several threads.
class input_knowledge {
 public:
  virtual ~input_knowledge() = default;

  /// The mean squared input of each column of one matrix, after a rotation of that size (0: none): weights of the
  /// errors that searches compare. Errors: invalid_argument where nothing is known of the weight.
  [[nodiscard]] virtual result<std::vector<float>> column_weights(const parameter& weight, std::size_t matrix,
                                                                  std::size_t rotation) const = 0;
  /// What rows [.., K] make of the inputs of one matrix: the squares of their products, summed over rows and inputs, or
  /// tr(R H R^T) with H the inputs' moments. Errors: as column_weights.
  [[nodiscard]] virtual result<double> squared_products(const matrix_view<const float>& rows, const parameter& weight,
                                                        std::size_t matrix) const = 0;
  /// The largest magnitude of the input of one matrix; nothing where it is not known.
  [[nodiscard]] virtual std::optional<float> input_amax(const parameter& weight, std::size_t matrix) const = 0;
  /// Packs a whole matrix with error feedback, as a recipe with /gptq wants.
  [[nodiscard]] virtual result<packed<>> feed_back(const matrix_view<const float>& rows, const parameter& weight,
                                                   std::size_t matrix, const recipe& how,
                                                   const quantize_options& options) const = 0;
};

}  // namespace TETROMINO_NAMESPACE::io

#include "../../detail/macros_back.hpp"
