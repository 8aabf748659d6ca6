#pragma once

#include "../config.hpp"  // TETROMINO_ISA

/// AMX's tiles are the one part of an x86-64 CPU that Linux lends on request: without it, the first instruction that
/// touches them ends the program, whatever CPUID says.

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>  // SYS_arch_prctl
#include <unistd.h>       // syscall
#endif

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Asks the kernel for tiles, for all threads of the process and for good; whether they are granted. Signal handlers'
/// frames get 8 KiB larger by it, and a thread with a smaller alternate stack for signals makes the kernel refuse.
inline bool ask_for_tiles() noexcept {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
