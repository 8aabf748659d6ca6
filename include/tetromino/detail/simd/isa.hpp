#pragma once

/// What vector code is written with: sixteen lanes, and what the instruction set gives beyond their arithmetic.
/// isa/provides.hpp is the list; to add a set, write a header that provides it all.

#include "isa/amx.hpp"
#include "isa/avx2.hpp"
#include "isa/avx512.hpp"
#include "isa/four_registers.hpp"
#include "isa/provides.hpp"
