#pragma once

/// Which kernels of tetromino::cpu are used, and the calls that use them. One translation unit of that library includes
/// this header with TETROMINO_CPU_SELECT defined: as 2 where tables for instruction sets were compiled, as 1 where
/// there is scalar code alone; and TETROMINO_CPU_HAS_AMX as 1 where one of the tables is avx512_amx, else as 0.

#include "../../cpu.hpp"           // cpu_backends
#include "jobs.hpp"                // quantize_with, multiply_with
#include "kernels.hpp"             // cpu_kernels, choose_kernels
#include "tables.hpp"              // table_of
#include "../tile_permission.hpp"  // ask_for_tiles
#include "../scalar_matmul.hpp"    // scalar_matmul_kernels
#include "../scalar_quantize.hpp"  // scalar_kernels

#if defined(TETROMINO_CPU_SELECT)

#include <cstdint>      // std::uint32_t
#include <cstdlib>      // std::getenv
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

#if defined(__x86_64__)
#include <cpuid.h>  // __get_cpuid_count
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>  // getauxval
#endif

namespace TETROMINO_NAMESPACE::detail {

#define TETROMINO_CPU_TABLES(name)          \
  namespace name {                          \
  extern const quantize_table rows_table;   \
  extern const matmul_table products_table; \
  }
#if TETROMINO_CPU_SELECT == 2 && defined(__x86_64__)
TETROMINO_CPU_TABLES(cpu_sse2)
TETROMINO_CPU_TABLES(cpu_avx2)
TETROMINO_CPU_TABLES(cpu_avx2_vnni)
TETROMINO_CPU_TABLES(cpu_avx512)
TETROMINO_CPU_TABLES(cpu_avx512_vnni)
TETROMINO_CPU_TABLES(cpu_avx512_bf16)
#if TETROMINO_CPU_HAS_AMX
TETROMINO_CPU_TABLES(cpu_avx512_amx)
#endif
#elif TETROMINO_CPU_SELECT == 2 && defined(__aarch64__)
TETROMINO_CPU_TABLES(cpu_neon)
TETROMINO_CPU_TABLES(cpu_neon_dotprod)
#endif
#undef TETROMINO_CPU_TABLES

namespace {

constinit const quantize_table scalar_rows = table_of<scalar_kernels>::quantize<scalar_int8, scalar_e4m3>("scalar");
constinit const matmul_table scalar_products = table_of<scalar_matmul_kernels>::matmul("scalar");

#if defined(__x86_64__)
/// What the CPU has and the operating system saves. (Intel 64 manual, vol. 2A, CPUID; vol. 1, sec. 13.3, 14.3 and 18)
struct x86_features {
  bool avx2 = false, avx2_vnni = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false, avx512_amx = false;

  x86_features() {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
    const auto has = [](std::uint32_t word, std::uint32_t bits) { return (word & bits) == bits; };
    constexpr std::uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, fma | osxsave | avx | f16c)) return;
    std::uint32_t saved = 0, upper = 0;
    asm("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    if (!has(saved, 0x06)) return;  // xmm, ymm
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const std::uint32_t subleaves = a;
    avx2 = has(b, 1u << 5);
    constexpr std::uint32_t f = 1u << 16, dq = 1u << 17, cd = 1u << 28, bw = 1u << 30, vl = 1u << 31;
    avx512 = avx2 && has(b, f | dq | cd | bw | vl) && has(saved, 0xE6);   // and opmask, zmm
    avx512_vnni = avx512 && has(c, 1u << 1 | 1u << 11);                   // VBMI, VNNI
    const bool amx = has(d, 1u << 24 | 1u << 25) && has(saved, 0x60000);  // AMX_TILE, AMX_INT8
    if (subleaves < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx2_vnni = avx2 && has(a, 1u << 4);
    avx512_bf16 = avx512_vnni && has(a, 1u << 5);
    avx512_amx = avx512_bf16 && amx && ask_for_tiles();
  }
};
#endif

#if defined(__aarch64__)
/// Whether there are instructions for dot products of bytes. (Arm Architecture Reference Manual, FEAT_DotProd)
bool has_neon_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & 1u << 20) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}
#endif

struct candidate {
  cpu_kernels kernels;
  bool is_supported;
};
/// All that any build knows, from the slowest to the fastest.
std::vector<candidate> all_candidates() {
  std::vector<candidate> out{{{"scalar", &scalar_rows, &scalar_products}, true}};
#if TETROMINO_CPU_SELECT == 2 && defined(__x86_64__)
  const x86_features has;
  out.push_back({{"sse2", &cpu_sse2::rows_table, &cpu_sse2::products_table}, true});
  out.push_back({{"avx2", &cpu_avx2::rows_table, &cpu_avx2::products_table}, has.avx2});
  out.push_back({{"avx2_vnni", &cpu_avx2::rows_table, &cpu_avx2_vnni::products_table}, has.avx2_vnni});
  out.push_back({{"avx512", &cpu_avx512::rows_table, &cpu_avx512::products_table}, has.avx512});
  out.push_back({{"avx512_vnni", &cpu_avx512::rows_table, &cpu_avx512_vnni::products_table}, has.avx512_vnni});
  out.push_back({{"avx512_bf16", &cpu_avx512::rows_table, &cpu_avx512_bf16::products_table}, has.avx512_bf16});
#if TETROMINO_CPU_HAS_AMX
  out.push_back({{"avx512_amx", &cpu_avx512::rows_table, &cpu_avx512_amx::products_table}, has.avx512_amx});
#endif
#elif TETROMINO_CPU_SELECT == 2 && defined(__aarch64__)
  out.push_back({{"neon", &cpu_neon::rows_table, &cpu_neon::products_table}, true});
  out.push_back({{"neon_dotprod", &cpu_neon::rows_table, &cpu_neon_dotprod::products_table}, has_neon_dotprod()});
#endif
  return out;
}

}  // namespace

std::span<const cpu_kernels> supported_kernels() {
  static const std::vector<cpu_kernels> supported = [] {
    std::vector<cpu_kernels> out;
    for (const candidate& c : all_candidates()) {
      if (c.is_supported) out.push_back(c.kernels);
    }
    return out;
  }();
  return supported;
}

result<const cpu_kernels*> choose_kernels(const char* name) {
  const auto supported = supported_kernels();
  if (name == nullptr || *name == '\0') return &supported.back();
  std::string names;
  for (const cpu_kernels& k : supported) {
    if (k.name == name) return &k;
    names += text(names.empty() ? "" : ", ", k.name);
  }
  for (const std::string_view known :
       {"sse2", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx", "neon", "neon_dotprod"}) {
    if (known == name) {
      return error(errc::invalid_argument,
                   {"backend \"", name, "\" does not run here: this CPU and this build have ", names});
    }
  }
  return error(errc::unknown_name, {"unknown backend \"", std::string_view(name).substr(0, 60),
                                    "\" (TETROMINO_FORCE_BACKEND): expected one of ", names});
}

const result<const cpu_kernels*>& default_kernels() {
  static const result<const cpu_kernels*> chosen = choose_kernels(std::getenv("TETROMINO_FORCE_BACKEND"));
  return chosen;
}

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE {

std::vector<std::string_view> cpu_backends() {
  std::vector<std::string_view> out;
  for (const auto& kernels : detail::supported_kernels()) out.push_back(kernels.name);
  return out;
}

}  // namespace TETROMINO_NAMESPACE

#endif
