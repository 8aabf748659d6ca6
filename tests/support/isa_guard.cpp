/// Ends a test program that was built for an instruction set which this CPU lacks, or that is to run for a backend of
/// tetromino::cpu which it cannot run, before any other code of it runs. Compiled without that instruction set; the
/// exit code 77 makes ctest count the test as skipped.

#include <cstdio>   // std::puts, std::fflush
#include <cstdlib>  // std::_Exit

#if defined(TETROMINO_TEST_CPU)
#include <tetromino/cpu.hpp>
#endif

namespace {

#if defined(TETROMINO_TEST_CPU)
bool supported() { return tetromino::cpu.try_backend().has_value(); }
#elif defined(TETROMINO_TEST_ISA_avx512)
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
#elif defined(TETROMINO_TEST_ISA_avx2)
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool supported() { return true; }
#endif

__attribute__((constructor(101))) void end_if_unsupported() {  // before the registration of test cases
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  if (supported()) return;
  std::puts("skipped: this CPU lacks the instruction set of this test");
  std::fflush(stdout);
  std::_Exit(77);
}

}  // namespace
