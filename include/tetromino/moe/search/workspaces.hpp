#pragma once

#include "../../detail/macros_off.hpp"

#include "../../config.hpp"  // TETROMINO_NAMESPACE, TETROMINO_ISA

#include <memory>   // std::unique_ptr
#include <mutex>    // std::mutex, std::scoped_lock
#include <utility>  // std::move
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Working memory of tasks that run on a caller's threads: as many pieces as tasks have run at once.
template <class T>
class workspaces {
 public:
  /// Calls use(piece) with one that nobody else has; `make()` makes a unique_ptr of one where all are taken.
  template <class Make, class Use>
  void lend(const Make& make, const Use& use) {
    std::unique_ptr<T> piece;
    {
      const std::scoped_lock lock(mutex_);
      if (!free_.empty()) {
        piece = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (piece == nullptr) piece = make();
    use(*piece);
    const std::scoped_lock lock(mutex_);
    free_.push_back(std::move(piece));
  }

  /// Calls each(piece) with all of them. Precondition: no task is running.
  template <class Each>
  void for_each(const Each& each) {
    for (const std::unique_ptr<T>& piece : free_) each(*piece);
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> free_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
