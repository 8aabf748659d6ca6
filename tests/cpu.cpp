#include "check.hpp"

/// tetromino::cpu: which backend runs, and that all of them give the same bytes. Also run with each name in
/// TETROMINO_FORCE_BACKEND.

#include <tetromino/cpu.hpp>
#include <tetromino/detail/dispatch/tables.hpp>
#include <tetromino/detail/tile_permission.hpp>
#include <tetromino/thread_executor.hpp>

#include "support/matmul_cases.hpp"
#include "support/oracle.hpp"

#include <algorithm>    // std::find, std::min
#include <cmath>        // std::fma, std::abs, std::copysign, std::ldexp
#include <cstdlib>      // std::getenv, unsetenv
#include <cstring>      // std::memcmp
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

#if defined(__x86_64__) && defined(__linux__)
#include <linux/filter.h>   // sock_filter
#include <linux/seccomp.h>  // SECCOMP_MODE_FILTER
#include <sys/prctl.h>      // prctl
#include <sys/syscall.h>    // SYS_arch_prctl
#include <sys/wait.h>       // waitpid
#include <unistd.h>         // fork, execl, _exit
#endif

namespace {

using namespace tetromino_test;
using tetromino::bfloat16;
using tetromino::cpu;
using tetromino::cpu_backends;
using tetromino::errc;
using tetromino::half;
using tetromino::matrix;
using tetromino::scalar;

bool runs_here(std::string_view name) {
  const auto names = cpu_backends();
  return std::find(names.begin(), names.end(), name) != names.end();
}

TEST_CASE("cpu: the environment decides, and what it cannot decide is an error") {
  const std::vector<float> x(64, 1.0f);
  const tetromino::matrix_view<const float> in(x.data(), 1, 64);
  const char* forced = std::getenv("TETROMINO_FORCE_BACKEND");
  if (forced == nullptr || *forced == '\0') {
    CHECK(cpu.backend() == cpu_backends().back());
    CHECK(tetromino::try_quantize<tetromino::mxfp4>(cpu, in));
  } else if (runs_here(forced)) {
    CHECK(cpu.backend() == forced);
    CHECK(tetromino::try_quantize<tetromino::mxfp4>(cpu, in));
  } else {
    const bool is_unknown = std::string_view(forced) == "no_such_backend";
    const errc expected = is_unknown ? errc::unknown_name : errc::invalid_argument;
    const auto refused = tetromino::try_quantize<tetromino::mxfp4>(cpu, in);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code() == expected);
    CHECK_THAT(refused.error().what(), contains(std::string("\"") + forced + "\""));
    CHECK_THAT(refused.error().what(), contains("scalar"));
    CHECK(cpu.try_backend().error().code() == expected);
    const auto packed = tetromino::quantize<tetromino::mxfp4>(cpu.with("scalar"), in);
    matrix<float> out(1, 1);
    CHECK(tetromino::try_dequantize<float>(cpu, packed).error().code() == expected);
    CHECK(tetromino::try_matmul(cpu, in, packed, out.view()[0]).error().code() == expected);
    CHECK(tetromino::amax(cpu, in) == 1.0f);
    matrix<float> rotated(1, 64);
    rotate(cpu, in, {64, {}}, rotated.view());
    CHECK(rotated(0, 0) == 8.0f);
  }
}

TEST_CASE("cpu: each backend was compiled for the instruction set of its name") {
  CHECK(cpu_backends().front() == "scalar");
  for (const std::string_view name : cpu_backends()) {
    const auto policy = cpu.with(name);
    CHECK(policy.backend() == name);
    CHECK(policy.on({}).backend() == name);
    CHECK(std::string_view(policy.kernels->matmul->isa).substr(0, name.size()) == name);
    const std::string_view rows = policy.kernels->quantize->isa;
    CHECK(rows.substr(0, 4) == name.substr(0, 4));
    for (const std::string_view other : cpu_backends()) {
      if (other != name) CHECK(cpu.with(other).kernels->matmul != policy.kernels->matmul);
    }
  }
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (runs_here("sse2")) CHECK(runs_here("avx2") == has_avx2);
#endif
}

TEST_CASE("cpu: names that are not known, or not here") {
  CHECK(cpu.try_with("mmx").error().code() == errc::unknown_name);
  CHECK_THAT(cpu.try_with("mmx").error().what(), contains("expected one of scalar"));
  for (const char* name :
       {"sse2", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx", "neon", "neon_dotprod"}) {
    if (!runs_here(name)) CHECK(cpu.try_with(name).error().code() == errc::invalid_argument);
  }
  CHECK_THROWS_AS(cpu.with("mmx"), tetromino::error);
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
void compare(std::string_view backend, const tetromino::recipe& r, reference::generator& random) {
  const auto policy = cpu.with(backend);
  const std::size_t cols = 1 + random.below(700);
  matrix<T> x(2, 3, cols);
  for (T& v : x.data) v = tetromino::detail::from_float<T>(static_cast<float>(random.student_t4()));
  const auto expected = tetromino::quantize(scalar, x, r), got = tetromino::quantize(policy, x, r);
  CHECK(expected.codes == got.codes);
  CHECK(expected.scales == got.scales);
  CHECK(expected.macros == got.macros);
  CHECK(expected.tensor_scales == got.tensor_scales);
  CHECK(same_bytes(tetromino::dequantize<T>(scalar, expected).data, tetromino::dequantize<T>(policy, got).data));
  matrix<T> a(2, 3, cols), b(2, 3, cols);
  tetromino::fake_quantize(scalar, x, r, a.view());
  tetromino::fake_quantize(policy, x, r, b.view());
  CHECK(same_bytes(a.data, b.data));
  CHECK(tetromino::amax(scalar, x) == tetromino::amax(policy, x));
  const tetromino::hadamard rotation{std::size_t{16} << random.below(4), random.bits()};
  rotate(scalar, x, rotation, a.view());
  rotate(policy, x, rotation, b.view());
  CHECK(same_bytes(a.data, b.data));
  rotate_back(scalar, x, rotation, a.view());
  rotate_back(policy, x, rotation, b.view());
  CHECK(same_bytes(a.data, b.data));
}

TEST_CASE("cpu: every backend packs and unpacks the same bytes") {
  reference::generator random(seed());
  for (const std::string_view backend : cpu_backends()) {
    for (const char* name :
         {"mxfp4-32/floor", "mxfp4-32/oas", "mxfp4-16/even", "mxfp4-32/min-error", "mxfp4-16/oas/mbs-static",
          "mxfp4-32/oas/mbs-search@64", "mxfp4-16/round-up/hadamard-32", "mxfp4-32/min-error/mbs-search@8x2",
          "mxfp4-32/oas/mbs-static@16x2", "nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error/hadamard-16"}) {
      INFO(backend << ", " << name);
      const auto r = tetromino::recipe::parse(name);
      for (int i = 0; i < 4; ++i) {
        compare<float>(backend, r, random);
        compare<half>(backend, r, random);
        compare<bfloat16>(backend, r, random);
      }
    }
  }
}

TEST_CASE("cpu: every backend multiplies") {
  reference::generator random(seed());
  for (const std::string_view backend : cpu_backends()) {
    for (const any_format& format : all_formats()) {
      const std::size_t rows = 1 + random.below(70), outputs = 1 + random.below(40), cols = 1 + random.below(300);
      multiply_every_kind(cpu.with(backend), format, all_formats()[random.below(all_formats().size())], rows, outputs,
                          cols, random.bits(), [&](double worst, bool results_agree, const char* what) {
                            INFO(backend << ", " << what << ", " << rows << " x " << outputs << " x " << cols);
                            CHECK(worst <= static_cast<double>(cols) + 16);
                            CHECK(results_agree);
                          });
    }
  }
}

/// What AVX512_BF16 adds to a sum, as Intel's manual has it (VDPBF16PS): one fused product after the other, rounded to
/// nearest even, and denormal numbers are 0.
float add_pair(float sum, const float (&x)[2], const float (&w)[2]) {
  const auto flushed = [](float v) { return std::abs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; };
  sum = flushed(std::fma(flushed(x[1]), flushed(w[1]), flushed(sum)));
  return flushed(std::fma(flushed(x[0]), flushed(w[0]), sum));
}

TEST_CASE("cpu: avx512_bf16 sums bfloat16 by pairs in the order that it states") {
  if (!runs_here("avx512_bf16")) {
    WARN("skipped: this CPU lacks AVX512_BF16");
    return;
  }
  reference::generator random(seed());
  for (int round = 0; round < 60; ++round) {
    const any_format format = all_formats()[random.below(all_formats().size())];
    if (format.macro_bits == 2) continue;  // multiplied as floats
    const std::size_t rows = 1 + random.below(20), outputs = 1 + random.below(40), cols = 1 + random.below(1200);
    const auto w = random_packed(random, format, 1, outputs, cols);
    matrix<bfloat16> x(rows, cols);
    const int exponent = round % 3 == 0 ? -126 : round % 3 == 1 ? 0 : static_cast<int>(random.below(200)) - 120;
    for (auto& v : x.data) v = bfloat16(std::ldexp(static_cast<float>(random.normal()), exponent));
    matrix<float> got(rows, outputs);
    matmul(cpu.with("avx512_bf16"), x, w, got.view()[0]);
    const std::size_t blocks = (cols + format.block - 1) / format.block;
    std::size_t wrong = 0;
    for (std::size_t m = 0; m < rows; ++m) {
      for (std::size_t n = 0; n < outputs; ++n) {
        float total = 0;
        for (std::size_t b = 0; b < blocks; ++b) {
          float sum = 0;
          for (std::size_t k = b * format.block; k < std::min(cols, (b + 1) * format.block); k += 2) {
            const unsigned codes = w.codes[n * blocks * format.block / 2 + k / 2];
            const auto value = [](unsigned code) { return static_cast<float>(reference::e2m1_value(code)); };
            const auto at = [&](std::size_t i) { return i < cols ? float(x(m, i)) : 0.0f; };
            sum = add_pair(sum, {at(k), at(k + 1)}, {value(codes & 15), value(codes >> 4)});
          }
          const unsigned byte = w.scales[n * blocks + b];
          auto scale = static_cast<float>(format.scale == tetromino::scale_type::e4m3 ? reference::e4m3_value(byte)
                                                                                      : reference::e8m0_value(byte));
          if (const std::size_t macro = format.macro_block; macro != 0) {
            const unsigned m_byte = w.macros[n * ((cols + macro - 1) / macro) + b * format.block / macro];
            scale *= 1.0f / (1.0f + static_cast<float>(m_byte) / 256.0f);
          }
          total = std::fma(sum, scale, total);
        }
        const float expected = w.tensor_scales.empty() ? total : total * w.tensor_scales[0];
        wrong += expected != got(m, n);
      }
    }
    INFO(rows << " x " << outputs << " x " << cols << ", 2^" << exponent << ", block " << format.block << '/'
              << format.macro_block);
    CHECK(wrong == 0);
  }
}

#if defined(__x86_64__) && defined(__linux__)
/// Makes the kernel refuse this process tiles from now on; whether it could be told to.
bool refuse_tiles() {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),  // the number of the system call
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 16),  // its first argument
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x1023, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{sizeof program / sizeof *program, program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

TEST_CASE("cpu: with tiles refused", "[.]") {  // run by the case below
  CHECK_FALSE(tetromino::detail::ask_for_tiles());
  CHECK_FALSE(runs_here("avx512_amx"));
  CHECK(cpu.try_with("avx512_amx").error().code() == errc::invalid_argument);
  CHECK(cpu.backend() == cpu_backends().back());
}

TEST_CASE("cpu: a kernel that refuses tiles leaves the backends without them") {
  constexpr int has_no_filters = 99;
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    unsetenv("TETROMINO_FORCE_BACKEND");
    if (!refuse_tiles()) _exit(has_no_filters);
    execl("/proc/self/exe", "test_cpu", "cpu: with tiles refused", static_cast<char*>(nullptr));
    _exit(1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  if (WEXITSTATUS(status) == has_no_filters) {
    WARN("skipped: this system has no filters for system calls");
    return;
  }
  CHECK(WEXITSTATUS(status) == 0);
}
#endif

TEST_CASE("cpu: work is split over the caller's executor") {
  reference::generator random(seed());
  const tetromino::thread_executor threads(3);
  matrix<float> x(64, 2048);
  for (float& v : x.data) v = static_cast<float>(random.normal());
  const auto policy = cpu.with(cpu_backends().back());
  const auto one = tetromino::quantize<tetromino::nvfp4>(policy, x),
             many = tetromino::quantize<tetromino::nvfp4>(policy.on(threads), x);
  CHECK(one.codes == many.codes);
  CHECK(one.scales == many.scales);
}

}  // namespace
