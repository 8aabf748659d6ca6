// The first line of every public header; macros_back.hpp is the last. Words that others define as macros (Qt: slots;
// Windows: min, max; Apple: check, verify; X11: Success) are set aside between the two, also for what is included
// there.
#pragma push_macro("Success")
#pragma push_macro("check")
#pragma push_macro("max")
#pragma push_macro("min")
#pragma push_macro("slots")
#pragma push_macro("verify")
#undef Success
#undef check
#undef max
#undef min
#undef slots
#undef verify
