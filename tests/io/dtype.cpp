#include "check.hpp"

#include <tetromino/io/dtype.hpp>

#include <cstdint>  // std::int16_t
#include <string>   // std::string
#include <vector>   // std::vector

namespace io = tetromino::io;

TEST_CASE("every stored type is found by its own name, and by no other") {
  const std::vector<std::string> names{
      "BOOL", "F4",  "F6_E2M3", "F6_E3M2", "U8",  "I8",  "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
      "I16",  "U16", "F16",     "BF16",    "I32", "U32", "F32",     "C64",     "F64",     "I64",         "U64"};
  const std::vector<std::size_t> bits{8, 4, 6, 6, 8, 8, 8, 8, 8, 8, 8, 16, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64};
  for (std::size_t i = 0; i < names.size(); ++i) {
    INFO(names[i]);
    const auto type = io::dtype_named(names[i]);
    REQUIRE(type.has_value());
    CHECK(static_cast<std::size_t>(*type) == i);
    CHECK(io::name(*type) == names[i]);
    CHECK(io::bits_per_element(*type) == bits[i]);
    CHECK(io::alignment(*type) <= (bits[i] + 7) / 8);
  }
  for (const char* wrong : {"", "f32", "F3", "F322", "F32 ", "FLOAT", "F8"}) CHECK_FALSE(io::dtype_named(wrong));
}

TEST_CASE("C++ types read the stored types that are laid out like them") {
  CHECK(io::dtype_of<std::int16_t>::value == io::dtype::I16);
  CHECK(io::dtype_of<unsigned char>::value == io::dtype::U8);
  CHECK(io::dtype_of<long long>::value == io::dtype::I64);
  CHECK(io::dtype_of<float>::value == io::dtype::F32);
  CHECK(io::dtype_of<double>::value == io::dtype::F64);
  CHECK(io::dtype_of<tetromino::half>::value == io::dtype::F16);
  CHECK(io::dtype_of<tetromino::bfloat16>::value == io::dtype::BF16);
  STATIC_REQUIRE_FALSE(io::tensor_element<bool>);
  STATIC_REQUIRE_FALSE(io::tensor_element<char>);
  STATIC_REQUIRE_FALSE(io::tensor_element<long double>);
  STATIC_REQUIRE_FALSE(io::tensor_element<const float>);
}
