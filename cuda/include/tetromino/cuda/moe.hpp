#pragma once

#include <tetromino/detail/macros_off.hpp>

#include "detail/checks.hpp"  // is_aligned
#include "stream.hpp"         // stream

#include <tetromino/error.hpp>         // error, result
#include <tetromino/matrix.hpp>        // real
#include <tetromino/moe/dispatch.hpp>  // expert_call, row_copies
#include <tetromino/moe/router.hpp>    // router_options
#include <tetromino/moe/trace.hpp>     // no_expert

#include <concepts>  // std::same_as
#include <cstddef>   // std::size_t
#include <cstdint>   // std::uint16_t, std::uint32_t
#include <span>      // std::span

/// Moving tokens to experts and back on the GPU: what moe/router.hpp and moe/dispatch.hpp do on the CPU, one launch a
/// call. All spans are device memory.
namespace TETROMINO_NAMESPACE::cuda {

/// The most that a device router takes.
inline constexpr std::size_t max_routed_experts = 1024;
inline constexpr std::size_t max_experts_per_token = 32;

/// Rows grouped by expert, as moe::dispatch_plan groups them: three spans of device memory that the caller provides.
/// A call is one of the `calls_per_row` wishes of a row; a pair is a call that is answered here.
struct expert_groups {
  std::span<std::uint32_t>
      expert_offsets{};                     ///< [slots + 1]: the pairs of slot s are offsets[s] ... offsets[s + 1] - 1
  std::span<std::uint32_t> expert_rows{};   ///< [calls]: the row of each pair; what follows the last pair is untouched
  std::span<std::uint32_t> pair_of_call{};  ///< [calls]: the pair of each call, or moe::no_slot
  std::size_t calls_per_row = 1;
};

/// Which rank holds each expert, for the rank that calls it: two spans of device memory.
struct call_tables {
  std::span<const std::uint32_t> slot_of_expert{};  ///< [experts]: the copy that this rank calls
  std::span<const std::uint32_t> rank_of_slot{};    ///< [slots], as moe::ranks_of_slots writes them
};
/// What plan_copies writes where a call makes no copy of its row.
inline constexpr std::uint16_t no_rank = moe::no_expert;

namespace detail {

template <class Id>
struct copies_job {
  const Id* ids;
  const float* weights;  ///< or null: 1
  const std::uint32_t *slot_of_expert, *rank_of_slot;
  std::uint32_t experts, count, calls_per_row;
  moe::row_copies copies;
  moe::expert_call* calls;
  std::uint16_t* ranks;
};
template <class Id>
result<void> plan_copies(const stream& s, const copies_job<Id>& job);

template <class Logit>
struct route_job {
  const Logit* logits;
  std::uint32_t tokens, experts;
  moe::router_options options;
  std::uint16_t* ids;
  float* weights;
};
template <class Logit>
result<void> route(const stream& s, const route_job<Logit>& job);

template <class Call>
result<void> group(const stream& s, std::span<const Call> calls, std::size_t first_slot, const expert_groups& out);

template <real T>
struct move_job {
  const T* from;
  T* to;
  std::size_t rows, width;
  const std::uint32_t* pair_of_call;
  const float* weights;  ///< of the calls, `weight_stride` floats apart
  std::size_t weight_stride;
  std::size_t calls_per_row;
};
template <real T>
result<void> permute(const stream& s, const move_job<T>& job);
template <real T>
result<void> combine(const stream& s, const move_job<T>& job);

/// What a call's slot is: an expert id as the router gives it, or what an expert_call says.
template <class Call>
concept call_like = std::same_as<Call, std::uint16_t> || std::same_as<Call, moe::expert_call>;

/// What a call that nobody serves is: above every slot, once slots are as few as here.
template <call_like Call>
inline constexpr std::size_t nobody = std::same_as<Call, std::uint16_t> ? moe::no_expert : moe::no_slot;

template <call_like Call>
[[nodiscard]] result<void> check_groups(std::size_t calls, std::size_t first_slot, const expert_groups& groups) {
  using tetromino::detail::text;
  if (groups.calls_per_row == 0 || calls % groups.calls_per_row != 0 || calls >= std::size_t{1} << 31) {
    return error(errc::shape_mismatch, {"expert groups: expected fewer than 2^31 calls, ", groups.calls_per_row,
                                        " for each row, got ", calls});
  }
  if (groups.expert_offsets.size() < 2 || groups.expert_offsets.size() > 65'537 || groups.expert_rows.size() != calls ||
      groups.pair_of_call.size() != calls) {
    return error(errc::shape_mismatch,
                 {"expert groups: expected room for 2 to 65537 offsets, and for a row and a pair for each of ", calls,
                  " calls, got ", groups.expert_offsets.size(), ", ", groups.expert_rows.size(), " and ",
                  groups.pair_of_call.size()});
  }
  if (const std::size_t slots = groups.expert_offsets.size() - 1;
      first_slot > nobody<Call> || slots > nobody<Call> - first_slot) {
    return error(errc::shape_mismatch, {"expert groups: expected slots below ", nobody<Call>,
                                        ", which is a call for nobody, got ", slots, " from ", first_slot, " on"});
  }
  return {};
}

template <real T>
[[nodiscard]] result<void> check_move(std::size_t rows, std::size_t pairs, std::size_t width,
                                      const expert_groups& groups) {
  using tetromino::detail::text;
  const std::size_t calls = groups.pair_of_call.size();
  if (groups.calls_per_row == 0 || width == 0 || rows % width != 0 || pairs % width != 0 ||
      rows / width * groups.calls_per_row != calls || pairs / width > calls) {
    return error(errc::shape_mismatch,
                 {"expert groups: expected rows of ", width, " elements, one for each ", groups.calls_per_row, " of ",
                  calls, " calls, and at most ", calls, " pairs, got ", rows, " and ", pairs, " elements"});
  }
  if (rows / width >= std::size_t{1} << 31 || width >= std::size_t{1} << 31) {
    return error(errc::shape_mismatch, "expert groups: expected fewer than 2^31 rows and columns");
  }
  return {};
}

}  // namespace detail

/// Routes tokens as moe::route does: logits[tokens, experts] to ids[tokens, k], best first and of equal scores the
/// lower expert, and weights[tokens, k]; options.bias is device memory too. Exponentials are those of the GPU, so that
/// weights agree with the CPU's to a few units in the last place, and by the sigmoid rule experts whose scores are that
/// near may swap. So it is between calls with few tokens and with many (4096, or more): other kernels route them. A
/// token whose logits the CPU would refuse gets experts 0 ... k - 1 with NaN as weights, and is noted in the stream's
/// rejections, if it has some; so do all tokens if the bias is not finite. Errors: as moe::try_route for sizes and
/// options; more experts than max_routed_experts or max_experts_per_token; device.
[[nodiscard]] inline result<void> try_route(const stream& s, std::span<const float> logits, std::size_t experts,
                                            const moe::router_options& options, std::span<std::uint16_t> ids,
                                            std::span<float> weights) {
  if (auto ok = moe::detail::check_router(logits.size(), experts, options, ids.size(), weights.size()); !ok) return ok;
  if (experts > max_routed_experts || options.experts_per_token > max_experts_per_token ||
      logits.size() / experts >= std::size_t{1} << 31) {
    return error(errc::invalid_argument, {"cuda: route expects at most ", max_routed_experts, " experts, ",
                                          max_experts_per_token, " of them for each of fewer than 2^31 tokens, got ",
                                          experts, ", ", options.experts_per_token, " and ", logits.size() / experts});
  }
  const detail::route_job<float> job{logits.data(),
                                     static_cast<std::uint32_t>(logits.size() / experts),
                                     static_cast<std::uint32_t>(experts),
                                     options,
                                     ids.data(),
                                     weights.data()};
  return detail::route(s, job);
}

/// Makes the calls of rows and says where copies of the rows go, for ids[rows, k] as the router gives them:
/// calls[i] = {slot_of_expert[ids[i]], weights[i]}, and ranks[i] is the rank of that slot, or no_rank where the call
/// makes no copy: for row_copies::per_rank where an earlier call of the row goes to the same rank. An id from `experts`
/// on calls nobody. No weights: 1. What follows plans a hop as moe::dispatch_plan::plan_send does, without the host:
/// group_by_expert of the ranks, with ranks for slots; its offsets are what is sent to whom, permute fills the send
/// buffer, and combine adds the answers up. Preconditions: slots below rank_of_slot's size, ranks below no_rank.
/// Errors: shape_mismatch; device.
[[nodiscard]] inline result<void> try_plan_copies(const stream& s, std::span<const std::uint16_t> ids,
                                                  std::span<const float> weights, const call_tables& tables,
                                                  moe::row_copies copies, std::size_t calls_per_row,
                                                  std::span<moe::expert_call> calls, std::span<std::uint16_t> ranks) {
  if (calls_per_row == 0 || ids.size() % calls_per_row != 0 || ids.size() >= std::size_t{1} << 31 ||
      calls.size() != ids.size() || ranks.size() != ids.size() || (!weights.empty() && weights.size() != ids.size())) {
    return error(errc::shape_mismatch, {"plan_copies: expected fewer than 2^31 ids, ", calls_per_row,
                                        " for each row, and for each a call, a rank and a weight or no weights, got ",
                                        ids.size(), ", ", calls.size(), ", ", ranks.size(), " and ", weights.size()});
  }
  return detail::plan_copies<std::uint16_t>(
      s,
      {ids.data(), weights.empty() ? nullptr : weights.data(), tables.slot_of_expert.data(), tables.rank_of_slot.data(),
       static_cast<std::uint32_t>(tables.slot_of_expert.size()), static_cast<std::uint32_t>(ids.size()),
       static_cast<std::uint32_t>(calls_per_row), copies, calls.data(), ranks.data()});
}

/// Groups calls by expert, for slots first_slot ... first_slot + expert_offsets.size() - 2: within an expert, rows come
/// in their order, as moe::dispatch_plan::group_by_expert has them. A call is a router's id (its slot), or an
/// expert_call; those for other slots, and for nobody (moe::no_expert, moe::no_slot), get no pair. Errors:
/// shape_mismatch; device.
template <detail::call_like Call>
[[nodiscard]] result<void> try_group_by_expert(const stream& s, std::span<const Call> calls, std::size_t first_slot,
                                               const expert_groups& out) {
  if (auto fits = detail::check_groups<Call>(calls.size(), first_slot, out); !fits) return fits;
  return detail::group(s, calls, first_slot, out);
}

/// Copies rows to where their experts read them: to[pair, width] = from[row, width] for each of the row's pairs.
/// Errors: shape_mismatch; device.
template <real T>
[[nodiscard]] result<void> try_permute(const stream& s, std::span<const T> from, std::span<T> to, std::size_t width,
                                       const expert_groups& groups) {
  if (auto fits = detail::check_move<T>(from.size(), to.size(), width, groups); !fits) return fits;
  return detail::permute<T>(s, {from.data(), to.data(), from.size() / width, width, groups.pair_of_call.data(), nullptr,
                                0, groups.calls_per_row});
}

/// Adds the outputs of experts up: out[row, width] = Σ weight · y[pair, width] in the order of the row's calls, in
/// float, each product rounded before it is added, as moe::dispatch_plan::add_expert_outputs does; `weights` has one
/// for each call. Errors: shape_mismatch; device.
template <real T>
[[nodiscard]] result<void> try_combine(const stream& s, std::span<const T> y, std::span<const float> weights,
                                       std::span<T> out, std::size_t width, const expert_groups& groups) {
  if (auto fits = detail::check_move<T>(out.size(), y.size(), width, groups); !fits) return fits;
  if (weights.size() != groups.pair_of_call.size()) {
    return error(errc::shape_mismatch, {"combine: expected a weight for each of ", groups.pair_of_call.size(),
                                        " calls, got ", weights.size()});
  }
  return detail::combine<T>(s, {y.data(), out.data(), out.size() / width, width, groups.pair_of_call.data(),
                                weights.data(), 1, groups.calls_per_row});
}

/// The same with the weights of the calls that were grouped.
template <real T>
[[nodiscard]] result<void> try_combine(const stream& s, std::span<const T> y, std::span<const moe::expert_call> calls,
                                       std::span<T> out, std::size_t width, const expert_groups& groups) {
  if (auto fits = detail::check_move<T>(out.size(), y.size(), width, groups); !fits) return fits;
  if (calls.size() != groups.pair_of_call.size()) {
    return error(errc::shape_mismatch,
                 {"combine: expected ", groups.pair_of_call.size(), " calls, got ", calls.size()});
  }
  const float* const weights = calls.empty() ? nullptr : &calls.front().weight;
  return detail::combine<T>(s, {y.data(), out.data(), out.size() / width, width, groups.pair_of_call.data(), weights,
                                sizeof(moe::expert_call) / sizeof(float), groups.calls_per_row});
}

/// try_route, throwing its error.
inline void route(const stream& s, std::span<const float> logits, std::size_t experts,
                  const moe::router_options& options, std::span<std::uint16_t> ids, std::span<float> weights) {
  try_route(s, logits, experts, options, ids, weights).value();
}
/// try_plan_copies, throwing its error.
inline void plan_copies(const stream& s, std::span<const std::uint16_t> ids, std::span<const float> weights,
                        const call_tables& tables, moe::row_copies copies, std::size_t calls_per_row,
                        std::span<moe::expert_call> calls, std::span<std::uint16_t> ranks) {
  try_plan_copies(s, ids, weights, tables, copies, calls_per_row, calls, ranks).value();
}
/// try_group_by_expert, throwing its error.
template <detail::call_like Call>
void group_by_expert(const stream& s, std::span<const Call> calls, std::size_t first_slot, const expert_groups& out) {
  try_group_by_expert(s, calls, first_slot, out).value();
}
/// try_permute, throwing its error.
template <real T>
void permute(const stream& s, std::span<const T> from, std::span<T> to, std::size_t width,
             const expert_groups& groups) {
  try_permute(s, from, to, width, groups).value();
}
/// try_combine, throwing its error.
template <real T>
void combine(const stream& s, std::span<const T> y, std::span<const float> weights, std::span<T> out, std::size_t width,
             const expert_groups& groups) {
  try_combine(s, y, weights, out, width, groups).value();
}
template <real T>
void combine(const stream& s, std::span<const T> y, std::span<const moe::expert_call> calls, std::span<T> out,
             std::size_t width, const expert_groups& groups) {
  try_combine(s, y, calls, out, width, groups).value();
}

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
