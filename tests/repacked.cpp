#include "check.hpp"

#include <tetromino/repacked.hpp>
#include <tetromino/thread_executor.hpp>

#include "support/fastest.hpp"
#include "support/matmul_cases.hpp"

#include <algorithm>         // std::fill_n
#include <cstdint>           // std::uintptr_t
#include <cmath>             // std::ldexp, std::isnan
#include <fstream>           // std::ifstream
#include <initializer_list>  // std::initializer_list
#include <limits>            // std::numeric_limits
#include <sstream>           // std::istringstream
#include <string>            // std::string, std::getline

#if defined(__linux__)
#include <sys/mman.h>  // mmap, madvise
#endif

namespace {

using namespace tetromino_test;
using tetromino::errc;
using tetromino::matrix;
using tetromino::scalar;

/// Whether these are the same bits, whatever those of NaNs are.
bool same_numbers(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::isnan(a[i]) && std::isnan(b[i])) && !same_bits(a.subspan(i, 1), b.subspan(i, 1))) return false;
  }
  return true;
}

TEST_CASE("repacked weights have their bytes where the layout says, and the way back is exact") {
  reference::generator random(seed());
  for (const any_format& format : all_formats()) {
    for (int round = 0; round < 8; ++round) {
      const std::size_t matrices = 1 + random.below(3), rows = 1 + random.below(50), cols = 1 + random.below(400);
      const auto w = random_packed(random, format, matrices, rows, cols);
      const tetromino::thread_executor threads(3);
      const auto fast = round % 2 == 0 ? tetromino::repack(scalar, w) : tetromino::repack(fastest.on(threads), w);
      const auto view = fast.view();
      const std::size_t blocks = (cols + format.block - 1) / format.block, bytes = blocks * format.block / 2;
      const std::size_t panels = (cols + 31) / 32, groups = (rows + 15) / 16, per_panel = 32 / format.block;
      const std::size_t macros = format.macro_block == 0 ? 0 : (cols + format.macro_block - 1) / format.macro_block;
      const std::size_t panel_bytes = (16 + per_panel) * 16;
      const std::size_t group_bytes = (panels * panel_bytes + macros * 16 + 63) / 64 * 64;
      REQUIRE(view.data.size() == matrices * groups * group_bytes);
      CHECK(reinterpret_cast<std::uintptr_t>(view.data.data()) % 64 == 0);
      std::vector<unsigned> expected(view.data.size(), 0);
      std::vector<std::size_t> panel_at(panels);  // of a group; past macro bytes
      for (std::size_t p = 0, at = 0; p < panels; ++p, at += panel_bytes) {
        if (format.macro_block != 0 && p * 32 % format.macro_block == 0) at += 16;
        panel_at[p] = at;
        for (std::size_t g = 0; g < matrices * groups && format.scale == scale_type::e8m0; ++g) {
          std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(g * group_bytes + at), per_panel * 16, 127u);
        }
      }
      for (std::size_t i = 0; i < matrices * rows; ++i) {
        const std::size_t group = (i / rows * groups + i % rows / 16) * group_bytes, lane = i % rows % 16;
        for (std::size_t b = 0; b < bytes; ++b) {
          const std::size_t at = panel_at[b / 16] + (per_panel + b % 16 / 4 * 4) * 16 + lane * 4 + b % 4;
          expected[group + at] = w.codes[i * bytes + b];
        }
        for (std::size_t b = 0; b < blocks; ++b) {
          expected[group + panel_at[b / per_panel] + b % per_panel * 16 + lane] = w.scales[i * blocks + b];
        }
        for (std::size_t b = 0; b < macros; ++b) {
          expected[group + panel_at[b * format.macro_block / 32] - 16 + lane] = w.macros[i * macros + b];
        }
      }
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) wrong += expected[i] != view.data[i];
      CHECK(wrong == 0);
      const auto back = tetromino::to_packed(fastest.on(threads), fast);
      CHECK(back.shape() == w.shape());
      CHECK(back.codes == w.codes);
      CHECK(back.scales == w.scales);
      CHECK(back.macros == w.macros);
      CHECK(back.tensor_scales == w.tensor_scales);
    }
  }
}

#if defined(__linux__)
/// What the kernel says of the memory at an address: flags of two letters, such as hg. Empty if it says nothing.
std::string memory_flags(const void* address) {
  std::ifstream maps("/proc/self/smaps");
  bool is_there = false;
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t first = 0, last = 0;
    char dash = 0;
    if (std::istringstream(line) >> std::hex >> first >> dash >> last && dash == '-') {
      const auto at = reinterpret_cast<std::uintptr_t>(address);
      is_there = first <= at && at < last;
    } else if (is_there && line.starts_with("VmFlags:")) {
      return line.substr(8) + ' ';
    }
  }
  return {};
}

TEST_CASE("large repacked storage asks for huge pages unless they are refused") {
  const packed<any_format> large(tetromino::mxfp4{}, 1, 2048, 4096), small(tetromino::mxfp4{}, 1, 256, 4096);
  const auto asks = [](const tetromino::repacked& w) {
    return memory_flags(w.data.data()).find(" hg ") != std::string::npos;
  };
  const auto ours = tetromino::repack(fastest, large);
  CHECK(reinterpret_cast<std::uintptr_t>(ours.data.data()) % (std::size_t{2} << 20) == 0);
  const auto usual = tetromino::repack(fastest, large, tetromino::memory_pages::usual);
  CHECK_FALSE(asks(usual));
  CHECK_FALSE(asks(tetromino::repack(fastest, small)));
  const auto copy = usual;
  CHECK_FALSE(asks(copy));
  constexpr std::size_t size = std::size_t{4} << 20;
  void* const probe = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const bool is_told =
      ::madvise(probe, size, MADV_HUGEPAGE) == 0 && memory_flags(probe).find(" hg ") != std::string::npos;
  ::munmap(probe, size);
  if (!is_told) {
    WARN("skipped: this system has no huge pages, or does not say where they are asked for");
    return;
  }
  CHECK(asks(ours));
  CHECK(asks(tetromino::repacked(ours)));
}
#endif

TEST_CASE("repacked weights of experts give the bits of packed ones") {
  reference::generator random(seed());
  for (int round = 0; round < 20; ++round) {
    const any_format format = all_formats()[random.below(all_formats().size())];
    const std::size_t experts = 1 + random.below(5), cols = 1 + random.below(700), outputs = 1 + random.below(150);
    std::vector<std::uint32_t> offsets{0};
    for (std::size_t e = 0; e < experts; ++e) {
      offsets.push_back(offsets.back() + static_cast<std::uint32_t>(random.below(2) * random.below(20)));
    }
    const std::size_t rows = offsets.back();
    const auto w = random_packed(random, format, experts, outputs, cols);
    const auto fast = tetromino::repack(fastest, w);
    const auto check = [&](const auto& policy, const auto& x) {
      std::vector<float> expected(rows * outputs), got(rows * outputs);
      grouped_matmul(policy, x, w, offsets, matrix_view<float>(expected.data(), rows, outputs));
      grouped_matmul(policy, x, fast, offsets, matrix_view<float>(got.data(), rows, outputs));
      CHECK(same_bits(expected, got));
      grouped_matmul(policy, x, fast.view(), offsets, matrix_view<float>(got.data(), rows, outputs));
      CHECK(same_bits(expected, got));
    };
    const std::vector<float> x = reference::normal_sample(random.bits(), rows * cols);
    const tetromino::thread_executor threads(2);
    check(fastest.on(threads), matrix_view<const float>(x.data(), rows, cols));
    check(fastest.on(threads), random_int8(random, rows, cols));
    check(fastest, random_packed(random, all_formats()[random.below(all_formats().size())], rows, 1, cols));
    check(scalar, random_int8(random, rows, cols));
  }
}

TEST_CASE("integer products are the same bits on scalar and vectors, NaN scales included") {
  reference::generator random(seed());
  for (int round = 0; round < 30; ++round) {
    const any_format format = all_formats()[random.below(all_formats().size())];
    const std::size_t rows = 1 + random.below(20), cols = 1 + random.below(900), outputs = 1 + random.below(40);
    auto w = random_packed(random, format, 1, outputs, cols);
    for (auto& scale : w.scales) {
      if (random.below(60) == 0) scale = static_cast<std::uint8_t>(random.bits());
    }
    const auto check = [&](const auto& x) {
      std::vector<float> expected(rows * outputs), got(rows * outputs);
      matmul(scalar, x, w, matrix_view<float>(expected.data(), rows, outputs));
      matmul(fastest, x, w, matrix_view<float>(got.data(), rows, outputs));
      CHECK(same_numbers(got, expected));
    };
    check(random_int8(random, rows, cols));
    check(random_packed(random, all_formats()[random.below(all_formats().size())], rows, 1, cols));
  }
}

TEST_CASE("integer products of blocks of zeros, which have the least scale, and of other blocks that have it") {
  reference::generator random(seed());
  for (const std::size_t block : {16u, 32u}) {
    const any_format format{scale_type::e8m0, block, block == 16 ? 64u : 0u};
    auto x = random_packed(random, format, 5, 1, 200), w = random_packed(random, all_formats()[3], 1, 20, 200);
    for (std::size_t b = 0; b < x.scales.size(); ++b) {
      if (random.below(2) == 0) continue;
      x.scales[b] = 0;
      for (std::size_t i = 0; i < block / 2; ++i) x.codes[b * block / 2 + i] = static_cast<std::uint8_t>(b % 3 << 3);
    }
    for (auto& scale : w.scales) scale = static_cast<std::uint8_t>(random.below(256));
    std::vector<float> expected(5 * 20), got(5 * 20);
    matmul(scalar, x, w, matrix_view<float>(expected.data(), 5, 20));
    matmul(fastest, x, w, matrix_view<float>(got.data(), 5, 20));
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK((std::isnan(got[i]) ? std::isnan(expected[i]) : got[i] == expected[i]));
    }
  }
}

TEST_CASE("integer products of many rows whose scales and weights' scales multiply to the ends of what is normal") {
  reference::generator random(seed());
  constexpr std::size_t rows = 27, outputs = 40, cols = 160;
  const auto one_of = [&](std::initializer_list<float> values) { return values.begin()[random.below(values.size())]; };
  for (int round = 0; round < 200; ++round) {
    const std::size_t block = random.below(2) == 0 ? 16 : 32;
    // Of half the scales of activations, as it is in a float; codes of weights from first to last keep it normal.
    const int exponent = random.below(2) == 0 ? 1 + static_cast<int>(random.below(253)) : 1 + 252 * (round % 2);
    const int first = std::max(0, 128 - exponent), last = std::min(254, 381 - exponent);
    auto x = random_int8(random, rows, cols);
    auto w = random_packed(random, {scale_type::e8m0, block, 0}, 1, outputs, cols);
    if (round % 3 != 0) {  // one element of each row, so that nothing else hides what becomes of it
      std::fill(x.values.begin(), x.values.end(), std::int8_t{0});
      for (std::size_t m = 0; m < rows; ++m) x.values[m * cols + random.below(cols)] = 1;
    }
    for (auto& scale : x.scales) scale = std::ldexp(one_of({1.0f, 1.25f, 1.5f}), exponent - 126);
    for (auto& scale : w.scales) {
      const int step = std::min(static_cast<int>(random.below(3)), last - first);
      scale = static_cast<std::uint8_t>(random.below(2) == 0 ? first + step : last - step);
    }
    const std::size_t kind = random.below(3);  // of what is not as it should be, in one place
    if (kind == 1) {
      w.scales[random.below(w.scales.size())] =
          static_cast<std::uint8_t>(random.below(2) == 0 ? std::max(first - 1, 0) : last + 1);
    } else if (kind == 2) {
      const float infinity = std::numeric_limits<float>::infinity();
      x.scales[random.below(x.scales.size())] = one_of({0.0f, 1e-40f, infinity, -infinity, std::nanf(""), -1.0f});
    }
    std::vector<float> expected(rows * outputs), got(rows * outputs);
    matmul(scalar, x, w, matrix_view<float>(expected.data(), rows, outputs));
    matmul(fastest, x, w, matrix_view<float>(got.data(), rows, outputs));
    INFO("block " << block << ", exponent " << exponent << ", kind " << kind);
    CHECK(same_numbers(got, expected));
  }
}

TEST_CASE("repacked storage that does not have its size is an error that says so") {
  reference::generator random(seed());
  auto broken = random_packed(random, tetromino::mxfp4{}, 1, 3, 64);
  const auto whole = tetromino::repack(scalar, broken);
  const auto x = random_int8(random, 2, 64);
  matrix<float> out(2, 3);
  const auto check = [&](const tetromino::repacked& w, const char* what) {
    const auto result = tetromino::try_matmul(fastest, x, w, out.view()[0]);
    REQUIRE_FALSE(result);
    CHECK(result.error().code() == errc::shape_mismatch);
    CHECK_THAT(result.error().what(), contains(what));
    CHECK(tetromino::try_to_packed(scalar, w).error().code() == errc::shape_mismatch);
    CHECK_THROWS_AS(tetromino::to_packed(scalar, w), tetromino::error);
  };
  auto w = whole;
  w.data.pop_back();
  check(w, "data needs 576 entries, got 512");
  w = whole;
  w.data.emplace_back();
  check(w, "data needs 576 entries, got 640");
  w = whole;
  w.tensor_scales.resize(1);
  check(w, "tensor_scales needs 0 entries, got 1");
  w = tetromino::repack(scalar, random_packed(random, tetromino::nvfp4{}, 1, 3, 64));
  w.tensor_scales.clear();
  check(w, "tensor_scales needs 1 entries, got 0");
  broken.scales.pop_back();
  CHECK(tetromino::try_repack(scalar, broken).error().code() == errc::shape_mismatch);
  CHECK_THROWS_AS(tetromino::repack(scalar, broken), tetromino::error);
  const tetromino::repacked empty = tetromino::repack(scalar, packed<any_format>(tetromino::mxfp4{}, 1, 0, 32));
  CHECK(empty.bytes() == 0);
  CHECK(tetromino::to_packed(scalar, empty).rows == 0);
}

static_assert(tetromino::repacked_like<tetromino::repacked> && tetromino::repacked_like<tetromino::repacked_view>);
static_assert(!tetromino::packed_like<tetromino::repacked>);
static_assert(tetromino::weights_like<tetromino::repacked> && tetromino::weights_like<packed<tetromino::nvfp4>>);

}  // namespace
