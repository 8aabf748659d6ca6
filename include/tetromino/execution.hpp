#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"  // TETROMINO_SIMD

#include <concepts>     // std::invocable, std::convertible_to
#include <cstddef>      // std::size_t
#include <string_view>  // std::string_view
#include <type_traits>  // std::remove_cvref_t

namespace TETROMINO_NAMESPACE {

/// One numbered piece of work, `task(index)`; refers to a callable that outlives it.
class task_ref {
 public:
  template <class F>
    requires(std::invocable<const F&, std::size_t> && !std::same_as<std::remove_cvref_t<F>, task_ref>)
  TETROMINO_ABI constexpr task_ref(const F& f) noexcept
      : context_(&f), call_([](const void* context, std::size_t i) { (*static_cast<const F*>(context))(i); }) {}

  TETROMINO_ABI void operator()(std::size_t index) const { call_(context_, index); }

 private:
  const void* context_;
  void (*call_)(const void*, std::size_t);
};

/// Something that runs task(0) ... task(count - 1), in any order and on any threads, and returns when all are done.
/// This is how callers lend their threads: the library starts none of its own. One with a count() is taken to say how
/// many threads it has, which decides how finely small work is split. thread_executor.hpp has a plain one.
template <class E>
concept executor = requires(E& e, std::size_t count, task_ref task) {
  e(count, task);
};

/// An executor that says how many threads it has.
template <class E>
concept counted_executor = executor<E> && requires(E& e) {
  { e.count() } -> std::convertible_to<std::size_t>;
};

/// Refers to a caller's executor, which outlives it; without one, work runs on the calling thread.
class executor_ref {
 public:
  TETROMINO_ABI constexpr executor_ref() = default;
  template <executor E>
    requires(!std::same_as<std::remove_cv_t<E>, executor_ref>)
  TETROMINO_ABI constexpr executor_ref(E& e) noexcept
      : context_(const_cast<std::remove_const_t<E>*>(&e)),
        run_([](void* context, std::size_t count, task_ref task) { (*static_cast<E*>(context))(count, task); }) {
    if constexpr (counted_executor<E>) threads_ = e.count();
  }

  TETROMINO_ABI void operator()(std::size_t count, task_ref task) const {
    if (run_ != nullptr && count > 1) return run_(context_, count, task);
    for (std::size_t i = 0; i < count; ++i) task(i);
  }

  /// False where work runs on the calling thread alone.
  [[nodiscard]] TETROMINO_ABI constexpr bool is_parallel() const noexcept { return run_ != nullptr; }
  /// How many threads the executor says it has; 0 where it does not say.
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t threads() const noexcept { return threads_; }

 private:
  void* context_ = nullptr;
  void (*run_)(void*, std::size_t, task_ref) = nullptr;
  std::size_t threads_ = 0;
};

/// Runs on the CPU one element at a time: the reference that every other backend equals byte for byte.
struct scalar_t {
  executor_ref executor{};
  /// The same policy, with its work split over the caller's executor.
  [[nodiscard]] TETROMINO_ABI constexpr scalar_t on(executor_ref e) const noexcept { return {e}; }
};
inline constexpr scalar_t scalar{};

#if TETROMINO_SIMD
inline namespace TETROMINO_ISA {

/// Runs on the CPU with the widest vectors that this translation unit is compiled for. Needs simd.hpp, and xsimd.
struct simd_t {
  executor_ref executor{};
  /// The same policy, with its work split over the caller's executor.
  [[nodiscard]] constexpr simd_t on(executor_ref e) const noexcept { return {e}; }
  /// The instruction set of these vectors: sse2 (with what it may use besides: ssse3, sse4, avx), avx2, avx2_fma,
  /// avx2_f16c, avx2_vnni, avx512, avx512_vnni, avx512_bf16, avx512_amx (which uses AMX's tiles if the operating system
  /// grants them when the first product asks), neon or neon_dotprod.
  [[nodiscard]] constexpr std::string_view isa() const noexcept { return detail::isa_name; }
};
inline constexpr simd_t simd{};

}  // namespace TETROMINO_ISA
using automatic_t = simd_t;
#else
using automatic_t = scalar_t;
#endif

/// The fastest backend that this build allows: simd where xsimd is found, scalar otherwise. Needs simd.hpp.
inline constexpr automatic_t automatic{};

namespace detail {

/// Whether a backend declares the hooks of its policy; says which header to include where a known one does not.
template <class Policy, bool IsAttached>
struct attached {
#if TETROMINO_SIMD
  static_assert(IsAttached || !std::same_as<Policy, simd_t>,
                "tetromino::simd and tetromino::automatic need #include <tetromino/simd.hpp>");
#endif
  static constexpr bool value = IsAttached;
};

}  // namespace detail
}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
