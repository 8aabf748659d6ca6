#include "check.hpp"

#include <tetromino/io/safetensors.hpp>

#include "support/safetensors_files.hpp"

#include <sys/resource.h>  // ::setrlimit
#include <sys/stat.h>      // ::stat, ::chmod
#include <sys/syscall.h>   // SYS_fsync
#include <sys/wait.h>      // ::waitpid
#include <unistd.h>        // ::fork, ::chown, ::getgroups, ::syscall

#include <algorithm>   // std::max
#include <cerrno>      // errno, EIO
#include <csignal>     // std::signal, ::kill
#include <filesystem>  // std::filesystem
#include <random>      // std::mt19937_64
#include <span>        // std::span
#include <string>      // std::string
#include <thread>      // std::thread
#include <utility>     // std::move
#include <vector>      // std::vector

namespace fs = std::filesystem;
namespace io = tetromino::io;
using tetromino::errc;
using namespace tetromino_test;

namespace {

int flushes = 0, error_of_flush = 0;

std::size_t files_in(const fs::path& folder) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& file : fs::directory_iterator(folder)) ++count;
  return count;
}

}  // namespace

/// In the place of the C library's: counts, and fails where a test asks for it.
extern "C" int fsync(int descriptor) {
  ++flushes;
  if (error_of_flush == 0) return static_cast<int>(::syscall(SYS_fsync, descriptor));
  errno = error_of_flush;
  return -1;
}

TEST_CASE("the writer's bytes are those of the format, whatever the order and size of the pieces") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{
      {"w\"\\\n", io::dtype::F32, {1, 2}}, {"none", io::dtype::F64, {0}}, {"s", io::dtype::U8, {3}}};
  const io::safetensors_metadata metadata{{"format", "pt"}, {"\xC3\xA4", "\x1f"}};
  const std::string header = R"({"__metadata__":{"format":"pt","\u00e4":"\u001f"},"w\"\\\u000a":{"dtype":"F32",)"
                             R"("shape":[1,2],"data_offsets":[0,8]},"none":{"dtype":"F64","shape":[0],)"
                             R"("data_offsets":[8,8]},"s":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})";
  std::string expected = header;
  expected.replace(expected.find("\\u00e4"), 6, "\xC3\xA4");
  expected.append((8 - expected.size() % 8) % 8, ' ');
  expected = length_prefix(expected.size()) + expected + std::string("\0\0\x80\x3f\0\0\0\xc0\x07\x08\x09", 11);

  const std::vector<float> weights{1.0f, -2.0f};
  auto first = io::safetensors_writer::create(folder / "first", declared, metadata);
  first.append_values<float>("w\"\\\n", weights);
  first.append("s", counting(3, 7));
  first.finish();
  CHECK(load(folder / "first") == expected);

  auto second = io::safetensors_writer::create(folder / "second", declared, metadata);
  for (std::uint8_t i = 7; i < 10; ++i) second.append("s", counting(1, i));
  second.append("none", {});
  second.append("s", {});
  auto moved = std::move(second);
  for (const float w : weights) moved.append_values<float>("w\"\\\n", std::span(&w, 1));
  moved.finish();
  CHECK(load(folder / "second") == expected);
  CHECK(files_in(folder.path()) == 2);

  const auto file = io::safetensors_file::open(folder / "first");
  require_same(file, reference::read_safetensors(folder / "first"));
  CHECK(file.metadata() == metadata);
  CHECK(file["w\"\\\n"].as<float>()[1] == -2.0f);
}

TEST_CASE("the data begins at a multiple of 8 bytes, with as little padding as that takes") {
  const temporary_directory folder;
  for (std::size_t length = 1; length <= 16; ++length) {
    const std::vector<io::tensor_declaration> declared{{std::string(length, 'n'), io::dtype::U8, {1}}};
    auto writer = io::safetensors_writer::create(folder / "f", declared);
    writer.append(declared[0].name, counting(1));
    writer.finish();
    const std::string contents = load(folder / "f");
    CHECK(contents.size() % 8 == 1);
    CHECK(contents.size() - contents.rfind('}') <= 9);
  }
}

TEST_CASE("random files round-trip", "[random]") {
  const temporary_directory folder;
  std::mt19937_64 random(tetromino_test::seed());
  const auto below = [&](std::size_t n) -> std::size_t { return random() % n; };
  for (int round = 0; round < 50; ++round) {
    std::vector<io::tensor_declaration> declared;
    for (std::size_t t = below(8); t > 0; --t) {
      io::tensor_declaration tensor{"tensor." + std::to_string(t), static_cast<io::dtype>(below(22)), {}};
      for (std::size_t d = below(4); d > 0; --d) tensor.shape.push_back(below(6));
      const std::size_t bits = io::bits_per_element(tensor.dtype);
      if (bits < 8) tensor.shape.push_back(4);
      declared.push_back(tensor);
    }
    declared = io::aligned_order(declared);
    io::safetensors_metadata metadata;
    for (std::size_t m = below(3); m > 0; --m) metadata[std::string(m, 'k')] = std::to_string(random());
    auto writer = io::safetensors_writer::create(folder / "f", declared, metadata);
    std::map<std::string, bytes> contents;
    for (const auto& tensor : declared) {
      const auto size = *tetromino::detail::tensor_bytes(tensor.dtype, tensor.shape);
      bytes& mine = contents[tensor.name];
      while (mine.size() < size) {
        bytes piece(1 + below(size - mine.size()));
        for (auto& b : piece) b = static_cast<std::uint8_t>(random());
        writer.append(tensor.name, piece);
        mine.insert(mine.end(), piece.begin(), piece.end());
      }
    }
    writer.finish();
    const auto file = io::safetensors_file::open(folder / "f");
    require_same(file, reference::read_safetensors(folder / "f"));
    REQUIRE(file.size() == declared.size());
    CHECK(file.metadata() == metadata);
    for (const auto& tensor : declared) {
      INFO(tensor.name);
      CHECK(file[tensor.name].shape() == tensor.shape);
      const auto stored = file[tensor.name].bytes();
      CHECK(bytes(stored.begin(), stored.end()) == contents[tensor.name]);
      CHECK((stored.data() - file.tensors()[0].bytes().data()) % static_cast<int>(io::alignment(tensor.dtype)) == 0);
    }
  }
}

TEST_CASE("declarations that make no valid file are refused before anything is written") {
  const temporary_directory folder;
  const auto refused = [&](const std::vector<io::tensor_declaration>& declared,
                           const io::safetensors_metadata& metadata = {}) {
    const auto writer = io::safetensors_writer::try_create(folder / "out", declared, metadata);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().code() == errc::invalid_argument);
    CHECK(files_in(folder.path()) == 0);
    return std::string(writer.error().what());
  };
  CHECK_THAT(refused({{"a", io::dtype::U8, {1}}, {"a", io::dtype::U8, {1}}}),
             contains("out: tensor 'a': expected each name once, found it twice"));
  CHECK_THAT(refused({{"__metadata__", io::dtype::U8, {1}}}), contains("the format reserves this name"));
  CHECK_THAT(refused({{"\xFF", io::dtype::U8, {1}}}), contains("expected a name in UTF-8"));
  CHECK_THAT(refused({}, {{"\xFF", ""}}), contains("expected UTF-8"));
  CHECK_THAT(refused({}, {{"k", "\xC3"}}), contains("metadata key 'k': expected UTF-8"));
  CHECK_THAT(refused({{"a", io::dtype::F4, {3}}}), contains("expected elements that fill whole bytes"));
  CHECK_THAT(refused({{"a", io::dtype::U8, {~std::size_t{0}, 2}}}), contains("product fits in 64 bits"));
  CHECK_THAT(refused({{"a", io::dtype::U8, {std::size_t{1} << 60}},
                      {"b", io::dtype::U8, {std::size_t{1} << 60}},
                      {"c", io::dtype::U8, {std::size_t{1} << 60}},
                      {"d", io::dtype::U8, {std::size_t{1} << 60}}}),
             contains("tensor 'd': expected a file of less than 2^62 bytes"));
  CHECK_THAT(refused({{"a", io::dtype::U8, {3}}, {"b", io::dtype::F32, {1}}}),
             contains("tensor 'b': expected F32 at a multiple of 4 bytes, got byte 3 of the data: declare the tensors "
                      "in aligned_order"));
  CHECK_THAT(refused({}, {{"k", std::string(100'000'001, 'x')}}), contains("expected a header of at most 100000000"));

  const auto ordered = io::aligned_order({{"a", io::dtype::U8, {3}},
                                          {"b", io::dtype::BF16, {1}},
                                          {"c", io::dtype::F32, {1}},
                                          {"d", io::dtype::F16, {1}},
                                          {"e", io::dtype::I64, {1}}});
  std::string names;
  for (const auto& tensor : ordered) names += tensor.name;
  CHECK(names == "ecbda");
}

TEST_CASE("bytes that do not belong are refused, and the file can still be finished") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{{"weight", io::dtype::F32, {2}}, {"scale", io::dtype::U8, {2}}};
  auto writer = io::safetensors_writer::create(folder / "out", declared);
  const auto unknown = writer.try_append("scales", counting(1));
  CHECK(unknown.error().code() == errc::unknown_name);
  CHECK_THAT(unknown.error().what(), contains("out: expected a declared tensor, got 'scales'; the nearest names are "
                                              "'scale', 'weight'"));
  writer.append("weight", counting(5));
  const auto many = writer.try_append("weight", counting(4));
  CHECK(many.error().code() == errc::shape_mismatch);
  CHECK_THAT(many.error().what(), contains("tensor 'weight': expected at most 3 more bytes of 8, got 4"));
  const std::vector<std::uint16_t> halves{1};
  CHECK_THAT(writer.try_append_values<std::uint16_t>("weight", halves).error().what(),
             contains("tensor 'weight': expected elements of type F32, got U16"));
  CHECK_THROWS_AS(writer.append("scale", counting(3)), tetromino::error);

  const auto early = writer.try_finish();
  CHECK(early.error().code() == errc::shape_mismatch);
  CHECK_THAT(early.error().what(), contains("tensor 'scale': expected 2 bytes before the file is finished, got 0"));
  CHECK_FALSE(fs::exists(folder / "out"));
  writer.append("scale", counting(2));
  CHECK_THAT(writer.try_finish().error().what(), contains("tensor 'weight': expected 8 bytes before"));
  writer.append("weight", counting(3, 5));
  writer.finish();
  CHECK(fs::exists(folder / "out"));
  CHECK_THAT(writer.try_finish().error().what(), contains("out: it was already finished, or a write to it failed"));
  CHECK(writer.try_append("none", {}).error().code() == errc::unknown_name);
  CHECK(writer.try_append("scale", counting(1)).error().code() == errc::shape_mismatch);
}

TEST_CASE("without finish, nothing appears and nothing is left") {
  const temporary_directory folder;
  store(folder / "out", "the old file");
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {100}}};
  {
    auto writer = io::safetensors_writer::create(folder / "out", declared);
    writer.append("a", counting(50));
    CHECK(files_in(folder.path()) == 2);
    auto other = io::safetensors_writer::create(folder / "out", declared);
    CHECK(files_in(folder.path()) == 3);
    other = std::move(writer);
    CHECK(files_in(folder.path()) == 2);
  }
  CHECK(files_in(folder.path()) == 1);
  CHECK(load(folder / "out") == "the old file");
}

TEST_CASE("the writer refuses paths that it must not replace") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {4}}};
  const fs::path in = store(folder / "in", file_with("{" + entry("a", "U8", "[4]", "[0,4]") + "}", 4));
  const std::string before = load(in);
  const auto source = io::safetensors_file::open(in);
  fs::create_symlink(in, folder / "link");
  fs::create_hard_link(in, folder / "hard");
  for (const char* same : {"in", "link", "hard", "../in"}) {
    fs::create_directory(folder / "sub");
    const fs::path path = std::string(same) == "../in" ? folder.path() / "sub/../in" : folder / same;
    const auto writer = io::safetensors_writer::try_create(path, declared, {}, &source);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().code() == errc::invalid_argument);
    CHECK_THAT(writer.error().what(), contains("expected another file than the one being read, " + in.string()));
  }
  CHECK(load(in) == before);
  CHECK(io::safetensors_writer::try_create(folder / "other", declared, {}, &source));

  const auto refused = [&](const fs::path& path) {
    const auto writer = io::safetensors_writer::try_create(path, declared);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().code() == errc::io);
    return std::string(writer.error().what());
  };
  CHECK_THAT(refused("/dev/null"), contains("expected a regular file to write to, found a device"));
  CHECK_THAT(refused(folder / "sub"), contains("expected a regular file to write to, found a directory"));
  CHECK_THAT(refused(folder.path() / "absent/out"), contains("No such file or directory"));
  CHECK_THAT(refused(folder.path() / "in/out"), contains("Not a directory"));
}

TEST_CASE("the new file has the mode and owner of the one that it replaces") {
  const temporary_directory folder;
  const fs::path out = store(folder / "out", "the old file");
  ::uid_t user = ::geteuid();
  ::gid_t group = ::getegid();
  if (user == 0) {
    user = group = 65'534;  // root may give files away
  } else {
    std::vector<::gid_t> groups(static_cast<std::size_t>(std::max(0, ::getgroups(0, nullptr))));
    REQUIRE(::getgroups(static_cast<int>(groups.size()), groups.data()) == static_cast<int>(groups.size()));
    for (const ::gid_t other : groups) group = other != ::getegid() ? other : group;
    if (group == ::getegid()) WARN("this user has one group and cannot give files away: the mode alone is tested");
  }
  REQUIRE(::chown(out.c_str(), user, group) == 0);
  REQUIRE(::chmod(out.c_str(), 0640) == 0);
  fs::create_symlink("out", folder / "link");
  for (const char* name : {"out", "link"}) {
    auto writer = io::safetensors_writer::create(folder / name, std::vector<io::tensor_declaration>{});
    writer.finish();
    CHECK(load(out) != "the old file");
    CHECK(fs::is_symlink(folder / "link"));
    struct ::stat facts {};
    REQUIRE(::stat(out.c_str(), &facts) == 0);
    CHECK((facts.st_uid == user && facts.st_gid == group));
    CHECK((facts.st_mode & 07777) == 0640);
  }
}

TEST_CASE("a full disk leaves no file") {
  const temporary_directory folder;
  store(folder / "out", "the old file");
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {std::size_t{1} << 20}}};
  struct ::rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t most : {rlim_t{64}, rlim_t{4096}, rlim_t{100'000}}) {
    struct ::rlimit small = before;
    small.rlim_cur = most;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    auto writer = io::safetensors_writer::try_create(folder / "out", declared);
    auto outcome = writer ? writer->try_append("a", bytes(std::size_t{1} << 20)) : writer.error();
    const auto again = writer ? writer->try_append("a", bytes(1)) : writer.error();
    const auto finish = writer ? writer->try_finish() : writer.error();
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
    REQUIRE_FALSE(outcome);
    CHECK(outcome.error().code() == errc::io);
    CHECK_THAT(outcome.error().what(), contains("out: could not write "));
    CHECK_THAT(outcome.error().what(), contains("File too large"));
    CHECK_FALSE(again);
    CHECK_FALSE(finish);
    CHECK(files_in(folder.path()) == 1);
    CHECK(load(folder / "out") == "the old file");
  }
  std::signal(SIGXFSZ, handler);

  if (fs::exists("/dev/full")) {
    const auto full = tetromino::detail::open_file("/dev/full", O_WRONLY);
    REQUIRE(full.is_open());
    CHECK(tetromino::detail::write_all(full.number(), 0, counting(10)) == ENOSPC);
  }
}

TEST_CASE("a file has its name only once its contents are on the disk") {
  const temporary_directory folder;
  store(folder / "out", "the old file");
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {10}}};
  const auto write = [&] {
    auto writer = io::safetensors_writer::create(folder / "out", declared);
    writer.append("a", counting(10));
    flushes = 0;
    return writer.try_finish();
  };
  error_of_flush = EIO;
  const auto broken = write();
  error_of_flush = 0;
  REQUIRE_FALSE(broken);
  CHECK(broken.error().code() == errc::io);
  CHECK_THAT(broken.error().what(), contains("flush it to the disk"));
  CHECK(files_in(folder.path()) == 1);
  CHECK(load(folder / "out") == "the old file");
  CHECK(write());
  CHECK(flushes == 2);  // the file, and the folder that has its name
}

TEST_CASE("a file that cannot have its name is gone") {
  const temporary_directory folder;
  auto writer =
      io::safetensors_writer::create(folder / "out", std::vector<io::tensor_declaration>{{"a", io::dtype::U8, {10}}});
  writer.append("a", counting(10));
  fs::create_directory(folder / "out");
  const auto finish = writer.try_finish();
  REQUIRE_FALSE(finish);
  CHECK_THAT(finish.error().what(), contains("rename the finished file to it"));
  CHECK(files_in(folder.path()) == 1);
}

TEST_CASE("a process killed while it writes leaves no file under the final name") {
  const temporary_directory folder;
  constexpr std::size_t pieces = 8, piece = 4096;
  const std::vector<io::tensor_declaration> declared{{"a", io::dtype::U8, {pieces * piece}}};
  for (std::size_t written = 0; written <= pieces; ++written) {
    const fs::path out = folder / ("out" + std::to_string(written));
    const ::pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      auto writer = io::safetensors_writer::create(out, declared);
      for (std::size_t i = 0; i < written; ++i) writer.append("a", bytes(piece));
      ::kill(::getpid(), SIGKILL);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    CHECK_FALSE(fs::exists(out));
    CHECK(files_in(folder.path()) == written + 1);

    auto writer = io::safetensors_writer::create(folder / "whole", declared);
    writer.append("a", bytes(pieces * piece));
    writer.finish();
    CHECK(io::safetensors_file::open(folder / "whole").size() == 1);
    fs::remove(folder / "whole");
  }
}

TEST_CASE("a forked child that drops its copy of a writer leaves the parent's file alone") {
  const temporary_directory folder;
  auto writer =
      io::safetensors_writer::create(folder / "f", std::vector<io::tensor_declaration>{{"x", io::dtype::U8, {3}}});
  const pid_t child = ::fork();
  if (child == 0) {
    { const auto copy = std::move(writer); }
    ::_exit(0);
  }
  REQUIRE(child > 0);
  ::waitpid(child, nullptr, 0);
  writer.append("x", counting(3));
  writer.finish();
  CHECK(io::safetensors_file::open(folder / "f")["x"].elements() == 3);
}

TEST_CASE("pieces at any place from any thread make the same file") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{{"x", io::dtype::U8, {1000}}, {"y", io::dtype::F32, {1}}};
  const bytes all = counting(250);
  auto writer = io::safetensors_writer::create(folder / "f", io::aligned_order(declared));
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] { writer.write_at("x", 250 * (3 - t), all); });
  }
  for (auto& thread : threads) thread.join();
  CHECK(writer.try_finish().error().code() == errc::shape_mismatch);  // y is missing
  CHECK(writer.try_write_at("y", 1, bytes(4)).error().code() == errc::shape_mismatch);
  CHECK(writer.try_write_at("z", 0, bytes(4)).error().code() == errc::unknown_name);
  writer.write_at("y", 0, bytes(4));
  writer.finish();
  const auto file = io::safetensors_file::open(folder / "f");
  CHECK(file["x"].bytes()[999] == 249);
  CHECK(file["x"].bytes()[250] == 0);
}

TEST_CASE("bytes written twice do not stand for bytes that are missing") {
  const temporary_directory folder;
  const std::vector<io::tensor_declaration> declared{{"w", io::dtype::U8, {4}}};
  auto writer = io::safetensors_writer::create(folder / "f", declared);
  for (int times = 0; times < 2; ++times) {
    REQUIRE(writer.try_write_at("w", 0, bytes(2)));
    const auto finished = writer.try_finish();
    REQUIRE_FALSE(finished);
    CHECK_THAT(finished.error().what(), contains("expected 4 bytes before the file is finished, got 2"));
  }
  writer.write_at("w", 3, bytes(1));
  writer.append("w", bytes(1));  // the first that is missing
  writer.finish();
  CHECK(io::safetensors_file::open(folder / "f")["w"].bytes().size() == 4);

  std::mt19937_64 random(tetromino_test::seed());
  for (int round = 0; round < 200; ++round) {
    constexpr std::size_t size = 40;
    auto any =
        io::safetensors_writer::create(folder / "r", std::vector<io::tensor_declaration>{{"w", io::dtype::U8, {size}}});
    std::vector<bool> is_written(size);
    for (std::size_t missing = size; missing != 0;) {
      const std::size_t first = random() % (size + 1), count = random() % (std::min<std::size_t>(size - first, 6) + 1);
      any.write_at("w", first, bytes(count));
      std::fill_n(is_written.begin() + static_cast<std::ptrdiff_t>(first), count, true);
      missing = static_cast<std::size_t>(std::count(is_written.begin(), is_written.end(), false));
      if (missing == 0) continue;
      const auto finished = any.try_finish();
      REQUIRE_FALSE(finished);
      REQUIRE_THAT(finished.error().what(), contains("got " + std::to_string(size - missing)));
    }
    REQUIRE(any.try_finish());
  }
}

TEST_CASE("a link to a file that is not there yet stays, and one in a circle is refused") {
  const temporary_directory folder;
  fs::create_directory(folder / "sub");
  fs::create_symlink("second", folder / "first");
  fs::create_symlink("sub/../file", folder / "second");
  io::safetensors_writer::create(folder / "first", std::vector<io::tensor_declaration>{}).finish();
  CHECK(fs::is_symlink(folder / "first"));
  CHECK(fs::is_symlink(folder / "second"));
  CHECK(fs::is_regular_file(fs::symlink_status(folder / "file")));
  fs::create_symlink("round", folder / "round");
  const auto refused = io::safetensors_writer::try_create(folder / "round", std::vector<io::tensor_declaration>{});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code() == errc::io);
  CHECK_THAT(refused.error().what(), contains("could not follow the link"));
}
