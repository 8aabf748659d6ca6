#pragma once

#include "../detail/macros_off.hpp"

/// Models as people download them: a directory with shards, their index and config.json, or a single safetensors file,
/// as one set of named parameters with their roles. Opt-in: needs nlohmann-json and a POSIX system.
///
///   const auto model = io::checkpoint::open("Qwen3-30B-A3B");
///   for (const auto& p : io::parameters_of(model)) {
///     if (!p.is_weight()) continue;  // p.kind says what it is, and why it is no matrix product's weight
///     for (std::size_t e = 0; e < p.matrices; ++e) {
///       io::visit_rows(simd, model, p, {e, 0, p.rows}, buffers, [&](const auto& rows) { /* [rows, K] */ });
///     }
///   }

#include "checkpoint/parameters.hpp"  // IWYU pragma: export
#include "checkpoint/roles.hpp"       // IWYU pragma: export
#include "checkpoint/rows.hpp"        // IWYU pragma: export
#include "checkpoint/tensors.hpp"     // IWYU pragma: export

#include "../detail/macros_back.hpp"
