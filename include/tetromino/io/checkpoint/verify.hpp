#pragma once

#include "../../detail/macros_off.hpp"

#include "../../detail/float_state.hpp"  // default_float_state
#include "detail/packed_model.hpp"       // packed_model
#include "detail/reader_rules.hpp"       // check_extra, check_sets, check_config, check_metadata
#include "detail/value_check.hpp"        // value_check
#include "options.hpp"                   // verify_options, verify_report

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

/// Reads a packed model as readers of its layout do, by names, types, scales and config.json alone, beside the
/// original: every value is decoded with the tensor scale that readers take, and where the files say by which recipe,
/// packed again to the same bytes. Errors: malformed_file with the first tensor that is missing, additional, changed,
/// of another shape, packed although it must not be, packed along another axis, or under a scale that readers do not
/// take.
template <class Policy>
[[nodiscard]] result<verify_report> try_verify(const Policy& policy, const checkpoint& original,
                                               const checkpoint& packed, const verify_options& options = {}) {
  const detail::default_float_state usual;
  detail::packed_model model(original, packed);
  if (auto found = model.try_find(); !found) return found.error();
  for (const auto& check : {detail::check_extra, detail::check_sets, detail::check_config, detail::check_metadata}) {
    if (auto done = check(model); !done) return done.error();
  }
  verify_report report;
  report.layout = model.layout();
  report.recipes = model.recipes();
  for (const auto& one : model.parameters()) (one.stored.empty() ? report.kept : report.packed) += 1;
  const bool is_calibrated = packed.metadata().contains("tetromino.statistics");
  report.packed_again = !report.recipes.empty() && (!is_calibrated || options.inputs != nullptr);
  auto errors = detail::value_check(policy, model, options, report.packed_again).run();
  if (!errors) return errors.error();
  report.errors = *errors;
  return report;
}

/// try_verify, throwing its error.
template <class Policy>
verify_report verify(const Policy& policy, const checkpoint& original, const checkpoint& packed,
                     const verify_options& options = {}) {
  return try_verify(policy, original, packed, options).value();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
