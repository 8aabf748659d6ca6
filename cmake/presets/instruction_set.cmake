# The vectors that tests and examples are compiled for: AVX2 where this machine has it, otherwise what the compiler takes
# by default, so that the same commands build the same code on all machines. The tests in isa/ choose for themselves, and
# CXXFLAGS come last: CXXFLAGS=-march=native is heard.
set(instruction_set "")
if(EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo flags REGEX "^flags[ \t]*:" LIMIT_COUNT 1)
  set(instruction_set "-march=x86-64-v3 ")
  foreach(flag IN ITEMS avx2 fma f16c bmi1 bmi2 movbe abm xsave)
    if(NOT "${flags} " MATCHES " ${flag} ")
      set(instruction_set "")
    endif()
  endforeach()
endif()
