/// The main of every test program: Catch2's own, and a line that says how to repeat a failed random test.

#define TETROMINO_TEST_MAIN
#include "check.hpp"

#include <cstdio>  // std::fprintf

namespace {

#if __has_include(<catch2/catch.hpp>)
using listener_base = Catch::TestEventListenerBase;
#else
using listener_base = Catch::EventListenerBase;
#endif

[[maybe_unused]] const std::string& name_of(const Catch::TestCaseInfo& test) { return test.name; }   // Catch2 2
[[maybe_unused]] const std::string& name_of(const Catch::TestCaseInfo* test) { return test->name; }  // Catch2 3

struct seed_printer : listener_base {
  using listener_base::listener_base;

  void testCaseEnded(const Catch::TestCaseStats& stats) override {
    if (stats.totals.testCases.failed == 0) return;
    std::fprintf(stderr, "%s: repeat with TETROMINO_SEED=%llu\n", name_of(stats.testInfo).c_str(),
                 static_cast<unsigned long long>(tetromino_test::seed()));
  }
};

CATCH_REGISTER_LISTENER(seed_printer)

}  // namespace

int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }
