#pragma once

#include "../matrix.hpp"  // matrix_like

/// Why a call does not compile, said by the first error. A verb has one overload more than it needs, which takes what
/// no other one does and explains it.
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

template <class T>
concept viewable = requires(const T& x) {
  as_batch(x);
};

template <class Input>
inline constexpr bool reads_reals = false;
template <matrix_like Input>
inline constexpr bool reads_reals<Input> = true;

/// What a policy and an input, the first two arguments, lack to be packed. It is what such a call returns, so that
/// compilers look into it at once.
template <class Policy, class Input = void, class... Rest>
struct why_nothing_is_packed {
  static constexpr bool has_policy = !viewable<Policy>, has_input = has_policy && viewable<Input>;
  static_assert(has_policy,
                "a policy comes first, such as tetromino::cpu or tetromino::automatic: quantize<mxfp4>(policy, x)");
  static_assert(
      !has_policy || has_input,
      "the input is a matrix_view, a batch_view or a matrix: a span or a vector does not say how many rows it "
      "has, as matrix_view(x.data(), rows, cols) does; views in a vector are packed one by one");
  static_assert(!has_input || reads_reals<Input>,
                "elements are float, half or bfloat16; 16-bit words are viewed as what they hold: "
                "matrix_view<const bfloat16>(words, rows, cols)");
  static_assert(!has_input || !reads_reals<Input>, "this policy packs nothing: is the header of its backend included?");
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
