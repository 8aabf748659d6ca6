#pragma once

#include "../../error.hpp"  // error, result

#include <fcntl.h>     // ::open
#include <sys/mman.h>  // ::mmap, ::madvise
#include <sys/stat.h>  // ::fstat, ::fchmod
#include <unistd.h>    // ::pread, ::pwrite, ::fsync, ::fchown, ::getpid, ::close, ::sysconf, ::pathconf

#include <algorithm>     // std::min
#include <cerrno>        // errno
#include <cstddef>       // std::size_t
#include <cstdint>       // std::uint8_t, std::uint64_t
#include <cstdio>        // ::rename
#include <filesystem>    // std::filesystem::path
#include <functional>    // std::less_equal
#include <optional>      // std::optional
#include <span>          // std::span
#include <string>        // std::string
#include <string_view>   // std::string_view
#include <system_error>  // std::generic_category, std::error_code
#include <utility>       // std::exchange, std::move, std::swap

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// "path: could not do it: No space left on device", from errno unless a reason is given.
inline error io_error(const std::filesystem::path& path, std::string_view what, int reason = errno) {
  return error(errc::io, {path.string(), ": could not ", what, ": ", std::generic_category().message(reason)});
}

}  // namespace TETROMINO_ISA

/// Which file a path leads to, whatever its name: device and inode.
struct file_identity {
  dev_t device{};
  ino_t inode{};
  friend TETROMINO_ABI bool operator==(const file_identity&, const file_identity&) = default;
};

inline namespace TETROMINO_ISA {

/// "path: expected a regular file, found a directory".
inline error not_a_file(const std::filesystem::path& path, const struct ::stat& facts, std::string_view expected) {
  return error(errc::io, {path.string(), ": expected ", expected, ", found a ",
                          S_ISDIR(facts.st_mode) ? "directory" : "device, pipe or socket"});
}

/// Where a path leads that may be a link, whether there is something or not. Errors: io, for links that go round.
inline result<std::filesystem::path> followed(const std::filesystem::path& path) {
  constexpr int most_links = 40;  // as the kernel has it
  std::filesystem::path at = path;
  std::error_code problem;
  for (int links = 0; std::filesystem::is_symlink(at, problem); ++links) {
    const auto next = std::filesystem::read_symlink(at, problem);
    if (problem || links == most_links) return io_error(path, "follow the link", problem ? problem.value() : ELOOP);
    at = at.parent_path() / next;
  }
  return at;
}

/// Which file a path leads to; nothing if there is none.
inline std::optional<file_identity> identity_of(const std::filesystem::path& path) noexcept {
  struct ::stat facts {};
  if (::stat(path.c_str(), &facts) != 0) return std::nullopt;
  return file_identity{facts.st_dev, facts.st_ino};
}

}  // namespace TETROMINO_ISA

/// An open file, closed at the end of its scope.
class file_descriptor {
 public:
  TETROMINO_ABI file_descriptor() = default;
  TETROMINO_ABI explicit file_descriptor(int number) noexcept : number_(number) {}
  TETROMINO_ABI file_descriptor(file_descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  TETROMINO_ABI file_descriptor& operator=(file_descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  TETROMINO_ABI ~file_descriptor() { close(); }

  [[nodiscard]] TETROMINO_ABI bool is_open() const noexcept { return number_ >= 0; }
  [[nodiscard]] TETROMINO_ABI int number() const noexcept { return number_; }

  /// 0, or the errno of a close that failed. The descriptor is gone either way.
  TETROMINO_ABI int close() noexcept {
    if (number_ < 0) return 0;
    return ::close(std::exchange(number_, -1)) == 0 || errno == EINTR ? 0 : errno;
  }

 private:
  int number_ = -1;
};

inline namespace TETROMINO_ISA {

/// ::open that is not interrupted by signals.
inline file_descriptor open_file(const std::filesystem::path& path, int flags, mode_t mode = 0) noexcept {
  int number = -1;
  do {
    number = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (number < 0 && errno == EINTR);
  return file_descriptor(number);
}

/// Writes all of `bytes` at `offset`, in as many calls as it takes. Returns 0 or the errno of the failure.
inline int write_all(int file, std::uint64_t offset, std::span<const std::uint8_t> bytes) noexcept {
  constexpr std::size_t most_at_once = std::size_t{1} << 30;
  while (!bytes.empty()) {
    const ssize_t written =
        ::pwrite(file, bytes.data(), std::min(bytes.size(), most_at_once), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    if (written == 0) return ENOSPC;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    offset += static_cast<std::uint64_t>(written);
  }
  return 0;
}

}  // namespace TETROMINO_ISA

/// A regular file that is read piece by piece, from any thread: a file that gets shorter meanwhile gives an error,
/// where a mapping would end the process.
class file_reader {
 public:
  [[nodiscard]] TETROMINO_ABI static result<file_reader> try_open(const std::filesystem::path& path) {
    file_reader reader;
    reader.path_ = path;
    // Without O_NONBLOCK, opening a pipe would wait for a writer before it could be refused.
    reader.file_ = open_file(path, O_RDONLY | O_NONBLOCK);
    if (!reader.file_.is_open()) return io_error(path, "open");
    if (::fstat(reader.file_.number(), &reader.opened_) != 0) return io_error(path, "stat");
    if (!S_ISREG(reader.opened_.st_mode)) return not_a_file(path, reader.opened_, "a regular file");
    return reader;
  }

  [[nodiscard]] TETROMINO_ABI const std::filesystem::path& path() const noexcept { return path_; }
  [[nodiscard]] TETROMINO_ABI std::uint64_t size() const noexcept {
    return static_cast<std::uint64_t>(opened_.st_size);
  }
  [[nodiscard]] TETROMINO_ABI file_identity identity() const noexcept { return {opened_.st_dev, opened_.st_ino}; }

  /// Reads `to.size()` bytes at `offset`. Errors: io; malformed_file where the file ends before.
  [[nodiscard]] TETROMINO_ABI result<void> try_read_at(std::uint64_t offset, std::span<std::uint8_t> to) const {
    constexpr std::size_t most_at_once = std::size_t{1} << 30;
    while (!to.empty()) {
      const ssize_t got =
          ::pread(file_.number(), to.data(), std::min(to.size(), most_at_once), static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return io_error(path_, text("read ", to.size(), " bytes at ", offset));
      if (got == 0) {
        return error(errc::malformed_file, {path_.string(), ": expected ", to.size(), " more bytes at ", offset,
                                            ", found the end of the file (is it cut short?)"});
      }
      to = to.subspan(static_cast<std::size_t>(got));
      offset += static_cast<std::uint64_t>(got);
    }
    return {};
  }

  /// Fails if the file has been written to, or replaced by a shorter or longer one in place, since it was opened.
  [[nodiscard]] TETROMINO_ABI result<void> try_unchanged() const {
    struct ::stat now {};
    if (::fstat(file_.number(), &now) != 0) return io_error(path_, "stat");
    if (now.st_size == opened_.st_size && now.st_mtim.tv_sec == opened_.st_mtim.tv_sec &&
        now.st_mtim.tv_nsec == opened_.st_mtim.tv_nsec) {
      return {};
    }
    return error(errc::io, {path_.string(), ": expected a file that nobody changes while it is read, but its size ",
                            "or time has changed (", opened_.st_size, " bytes, now ", now.st_size, ")"});
  }

 private:
  TETROMINO_ABI file_reader() = default;

  std::filesystem::path path_;
  file_descriptor file_;
  struct ::stat opened_ {};
};

/// A regular file mapped read-only, unmapped at the end of its scope. Its bytes stay where they are when it is moved.
class file_mapping {
 public:
  [[nodiscard]] TETROMINO_ABI static result<file_mapping> try_open(const std::filesystem::path& path) {
    // Without O_NONBLOCK, opening a pipe would wait for a writer before it could be refused.
    const file_descriptor file = open_file(path, O_RDONLY | O_NONBLOCK);
    if (!file.is_open()) return io_error(path, "open");
    struct ::stat facts {};
    if (::fstat(file.number(), &facts) != 0) return io_error(path, "stat");
    if (!S_ISREG(facts.st_mode)) return not_a_file(path, facts, "a regular file");
    file_mapping mapping;
    mapping.identity_ = {facts.st_dev, facts.st_ino};
    const auto size = static_cast<std::uint64_t>(facts.st_size);
    if (size > static_cast<std::size_t>(-1)) return io_error(path, "map", EFBIG);
    if (size > 0) {
      void* const bytes = ::mmap(nullptr, static_cast<std::size_t>(size), PROT_READ, MAP_PRIVATE, file.number(), 0);
      if (bytes == MAP_FAILED) return io_error(path, "map");
      mapping.bytes_ = {static_cast<const std::uint8_t*>(bytes), static_cast<std::size_t>(size)};
      // Only a hint: pages ahead of a reader that goes through the file once.
      ::madvise(bytes, mapping.bytes_.size(), MADV_SEQUENTIAL);
    }
    return mapping;
  }

  TETROMINO_ABI file_mapping(file_mapping&& other) noexcept
      : bytes_(std::exchange(other.bytes_, {})), identity_(other.identity_) {}
  TETROMINO_ABI file_mapping& operator=(file_mapping&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(identity_, other.identity_);
    return *this;
  }
  TETROMINO_ABI ~file_mapping() {
    if (!bytes_.empty()) ::munmap(const_cast<std::uint8_t*>(bytes_.data()), bytes_.size());
  }

  [[nodiscard]] TETROMINO_ABI std::span<const std::uint8_t> bytes() const noexcept { return bytes_; }
  [[nodiscard]] TETROMINO_ABI const file_identity& identity() const noexcept { return identity_; }

  [[nodiscard]] TETROMINO_ABI bool holds(std::span<const std::uint8_t> part) const noexcept {
    constexpr std::less_equal<const std::uint8_t*> before;
    return before(bytes_.data(), part.data()) && before(part.data() + part.size(), bytes_.data() + bytes_.size());
  }

  /// Takes the pages of `part` out of this process's resident memory. The page where it ends stays, since the next
  /// part begins there; reading `part` again brings it back from the file.
  TETROMINO_ABI void drop(std::span<const std::uint8_t> part) const noexcept {
    if (part.empty()) return;
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const auto begin = static_cast<std::size_t>(part.data() - bytes_.data()) / page * page;
    auto end = static_cast<std::size_t>(part.data() - bytes_.data()) + part.size();
    if (end != bytes_.size()) end = end / page * page;
    if (begin < end) ::madvise(const_cast<std::uint8_t*>(bytes_.data()) + begin, end - begin, MADV_DONTNEED);
  }

 private:
  TETROMINO_ABI file_mapping() = default;

  std::span<const std::uint8_t> bytes_{};
  file_identity identity_{};
};

/// A file under construction. It has a temporary name beside its final one until `try_commit`; without that, or after a
/// failed write, it is removed. A process that is killed leaves at most the temporary file.
class pending_file {
 public:
  /// Refuses a path that names something else than a regular file: renaming over a device would replace it. What a link
  /// leads to is replaced, not the link, and the new file has the mode and owner of the one that it replaces.
  [[nodiscard]] TETROMINO_ABI static result<pending_file> try_create(const std::filesystem::path& asked) {
    const auto leads_to = followed(asked);
    if (!leads_to) return leads_to.error();
    const std::filesystem::path& path = *leads_to;
    struct ::stat facts {};
    const bool replaces = ::stat(path.c_str(), &facts) == 0;
    if (replaces && !S_ISREG(facts.st_mode)) return not_a_file(path, facts, "a regular file to write to");
    const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
    const long longest_name = ::pathconf(folder.c_str(), _PC_NAME_MAX);
    if (longest_name > 0 && path.filename().native().size() > static_cast<std::size_t>(longest_name)) {
      return io_error(path, "create it", ENAMETOOLONG);
    }
    constexpr std::size_t longest_stem = 200;  // of the 255 bytes that a file name usually may have
    constexpr int attempts = 1000;
    pending_file pending;
    pending.path_ = path;
    const std::string stem = text(path.filename().string().substr(0, longest_stem), ".part-", ::getpid(), '-');
    for (int attempt = 0; attempt < attempts; ++attempt) {
      pending.temporary_ = path.parent_path() / text(stem, attempt);
      pending.file_ = open_file(pending.temporary_, O_WRONLY | O_CREAT | O_EXCL, 0666);
      if (pending.file_.is_open()) {
        if (replaces) {  // a stranger's file keeps its owner only where we may give it away
          [[maybe_unused]] const int not_ours = ::fchown(pending.file_.number(), facts.st_uid, facts.st_gid);
          ::fchmod(pending.file_.number(), facts.st_mode & 07777);
        }
        return pending;
      }
      if (errno != EEXIST) break;
    }
    return io_error(path, text("create the temporary file ", pending.temporary_.filename().string(), " beside it"));
  }

  TETROMINO_ABI pending_file(pending_file&&) noexcept = default;
  TETROMINO_ABI pending_file& operator=(pending_file&& other) noexcept {
    discard();
    path_ = std::move(other.path_);
    temporary_ = std::move(other.temporary_);
    file_ = std::move(other.file_);
    owner_ = other.owner_;
    return *this;
  }
  TETROMINO_ABI ~pending_file() { discard(); }

  [[nodiscard]] TETROMINO_ABI const std::filesystem::path& path() const noexcept { return path_; }
  [[nodiscard]] TETROMINO_ABI bool is_open() const noexcept { return file_.is_open(); }

  [[nodiscard]] TETROMINO_ABI result<void> try_write_at(std::uint64_t offset, std::span<const std::uint8_t> bytes) {
    if (!is_open()) return closed();
    if (const int reason = write_all(file_.number(), offset, bytes); reason != 0) {
      return discard(text("write ", bytes.size(), " bytes at ", offset), reason);
    }
    return {};
  }

  /// The same, but a failure leaves the file as it is, since other threads may be writing to it.
  [[nodiscard]] TETROMINO_ABI result<void> try_fill_at(std::uint64_t offset,
                                                       std::span<const std::uint8_t> bytes) const {
    if (!is_open()) return closed();
    const int reason = write_all(file_.number(), offset, bytes);
    if (reason != 0) return io_error(path_, text("write ", bytes.size(), " bytes at ", offset), reason);
    return {};
  }

  /// Makes the contents durable, then moves them under the final name in one step.
  [[nodiscard]] TETROMINO_ABI result<void> try_commit() {
    if (!is_open()) return closed();
    if (::fsync(file_.number()) != 0) return discard("flush it to the disk", errno);
    if (const int reason = file_.close(); reason != 0) {
      ::unlink(temporary_.c_str());
      return io_error(path_, "close it", reason);
    }
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
      const int reason = errno;
      ::unlink(temporary_.c_str());
      return io_error(path_, "rename the finished file to it", reason);
    }
    // The new name is durable once its directory is; some file systems have no such call for directories.
    const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : ".";
    const file_descriptor directory = open_file(folder, O_RDONLY | O_DIRECTORY);
    if (directory.is_open() && ::fsync(directory.number()) != 0 && errno != EINVAL && errno != ENOTSUP) {
      return io_error(folder, "flush the directory to the disk");
    }
    return {};
  }

  /// Closes and removes the temporary file; in a forked child, which shares it with its parent, only closes it.
  TETROMINO_ABI void discard() noexcept {
    if (!is_open()) return;
    file_.close();
    if (owner_ == ::getpid()) ::unlink(temporary_.c_str());
  }

 private:
  TETROMINO_ABI pending_file() = default;

  [[nodiscard]] TETROMINO_ABI error closed() const {
    return error(errc::io, {path_.string(), ": it was already finished, or a write to it failed"});
  }
  [[nodiscard]] TETROMINO_ABI error discard(std::string_view what, int reason) {
    discard();
    return io_error(path_, what, reason);
  }

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  file_descriptor file_;
  pid_t owner_ = ::getpid();
};

}  // namespace TETROMINO_NAMESPACE::detail
