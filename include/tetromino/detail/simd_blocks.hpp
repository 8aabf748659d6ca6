#pragma once

/// What blocks of numbers need beyond lanewise arithmetic, from the header of the instruction set.

#include "simd_128.hpp"
#include "simd_avx2.hpp"
#include "simd_avx512.hpp"
