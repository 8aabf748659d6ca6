#pragma once

/// What blocks of numbers need beyond lanewise arithmetic, from the header of the instruction set.

#include "isa_128.hpp"
#include "isa_avx2.hpp"
#include "isa_avx512.hpp"
