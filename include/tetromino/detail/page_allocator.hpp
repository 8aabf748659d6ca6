#pragma once

#include "../config.hpp"  // TETROMINO_ABI

#include <cstddef>  // std::size_t
#include <new>      // std::align_val_t

#if defined(__linux__)
#include <sys/mman.h>  // ::madvise
#endif

namespace TETROMINO_NAMESPACE::detail {

/// Memory for large arrays that are read from end to end: what is as large as a page of 2 MiB begins with one, and
/// Linux may be asked to use such pages. Functions of std::vector call it, which objects for different instruction sets
/// share: nothing here is vector code.
template <class T>
struct page_allocator {
  using value_type = T;
  bool asks_for_huge_pages = false;

  TETROMINO_ABI constexpr page_allocator() = default;
  TETROMINO_ABI constexpr explicit page_allocator(bool asks) noexcept : asks_for_huge_pages(asks) {}
  template <class Other>
  TETROMINO_ABI constexpr explicit page_allocator(const page_allocator<Other>& other) noexcept
      : asks_for_huge_pages(other.asks_for_huge_pages) {}

  [[nodiscard]] TETROMINO_ABI T* allocate(std::size_t n) const {
    const std::size_t bytes = n * sizeof(T);
    void* const out = ::operator new(bytes, alignment(bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Whole pages only, so that no memory is wasted. Whatever the answer is, other pages do as well.
    if (asks_for_huge_pages && bytes >= page) static_cast<void>(::madvise(out, bytes / page * page, MADV_HUGEPAGE));
#endif
    return static_cast<T*>(out);
  }
  TETROMINO_ABI void deallocate(T* x, std::size_t n) const noexcept { ::operator delete(x, alignment(n * sizeof(T))); }

  /// Each frees what others allocate.
  friend TETROMINO_ABI constexpr bool operator==(const page_allocator&, const page_allocator&) noexcept { return true; }

 private:
  static constexpr std::size_t page = std::size_t{2} << 20;
  TETROMINO_ABI static constexpr std::align_val_t alignment(std::size_t bytes) noexcept {
    return std::align_val_t{bytes >= page ? page : alignof(T)};
  }
};

}  // namespace TETROMINO_NAMESPACE::detail
