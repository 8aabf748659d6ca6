// A result that nobody looks at is an error that nobody sees.
// expect: (ignoring return(ed)? value|unused-result)
#include <tetromino/error.hpp>

tetromino::result<int> try_something();

int use() {
#if defined(MUST_FAIL)
  try_something();
#endif
  return try_something() ? 1 : 0;
}
