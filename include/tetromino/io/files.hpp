#pragma once

#include "../detail/macros_off.hpp"

/// Files as the readers and writers of this library treat them, for what a program writes beside. Needs a POSIX system.

#include "detail/posix_file.hpp"  // detail::pending_file, detail::file_mapping

namespace TETROMINO_NAMESPACE::io {

/// A file that has its name when it is whole: `try_create(path)`, `try_write_at(offset, bytes)`, `try_commit()`. What
/// is not committed leaves nothing behind; what is replaced gives its mode and owner to the new file.
using detail::pending_file;

/// A file's bytes, mapped read-only: `try_open(path)`, `bytes()`.
using detail::file_mapping;

}  // namespace TETROMINO_NAMESPACE::io

#include "../detail/macros_back.hpp"
