#pragma once

/// Running an example program as its user does, with its output and peak memory.

#include "support/sanitized.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern char** environ;

namespace tetromino_test {

struct outcome {
  int exit_code = -1;
  std::string out;  ///< standard output
  std::string err;  ///< standard error
  std::size_t peak_bytes = 0;
  double cpu_seconds = 0;  ///< user and system, of all its threads
};

/// Runs a command, found as a shell finds it; its output passes through files in `scratch`.
inline outcome run_command(const std::vector<std::string>& command, const std::filesystem::path& scratch) {
  const std::filesystem::path out = scratch / "stdout", err = scratch / "stderr";
  std::vector<char*> argv;
  for (const auto& argument : command) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  pid_t child = 0;
  const int failed = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);

  outcome result;
  if (failed != 0) return result;
  int status = 0;
  rusage usage{};
  wait4(child, &status, 0, &usage);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.peak_bytes = static_cast<std::size_t>(usage.ru_maxrss) * 1024;
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  result.cpu_seconds = seconds(usage.ru_utime) + seconds(usage.ru_stime);
  const auto text = [](const std::filesystem::path& path) {
    std::ifstream file(path);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  result.out = text(out);
  result.err = text(err);
  return result;
}

/// The path of examples/<name>.
inline std::string program_path(const std::string& name) { return TETROMINO_TEST_PROGRAMS "/" + name; }

/// Runs examples/<name> with arguments; its output passes through files in `scratch`.
inline outcome run_program(const std::string& name, const std::vector<std::string>& arguments,
                           const std::filesystem::path& scratch) {
  std::vector<std::string> command{program_path(name)};
  command.insert(command.end(), arguments.begin(), arguments.end());
  return run_command(command, scratch);
}

}  // namespace tetromino_test
