// The other end of macros_off.hpp.
#pragma pop_macro("Success")
#pragma pop_macro("check")
#pragma pop_macro("max")
#pragma pop_macro("min")
#pragma pop_macro("slots")
#pragma pop_macro("verify")
