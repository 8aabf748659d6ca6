#pragma once

/// What blocks of numbers need beyond lanewise arithmetic, from the header of the instruction set.

#include "isa/isa_128.hpp"
#include "isa/avx2.hpp"
#include "isa/avx512.hpp"
