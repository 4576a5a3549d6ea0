// innerq: an LLM inference server with a quantized KV cache.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "server/commands.h"

namespace {

void AddConfigOptions(CLI::App* command, innerq::ConfigSource* source) {
  command->add_option("-c,--config", source->file, "Configuration file")->required();
  command->add_option("--set", source->overrides, "Replace one key: a.b.c=value (repeatable)")
      ->allow_extra_args(false);
}

// Opens /dev/null in place of standard files that were closed. A connection would else be given the
// number of standard error, and the logs.
void OpenStandardFiles() {
  for (;;) {
    const int fd = ::open("/dev/null", O_RDWR);
    if (fd < 0) return;
    if (fd > STDERR_FILENO) {
      ::close(fd);
      return;
    }
  }
}

// The exit code of a command whose result is its output: the disk may be full.
int ExitCode(int code) {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return code;
  std::fprintf(stderr, "innerq: cannot write to standard output: %s\n", std::strerror(errno));
  return code == 0 ? 1 : code;
}

}  // namespace

int main(int argc, char** argv) {
  OpenStandardFiles();
  CLI::App app{"innerq: an LLM inference server with a quantized KV cache", "innerq"};
  app.set_version_flag("--version", std::string("innerq ") + INNERQ_VERSION);
  app.require_subcommand(1);
  innerq::ConfigSource source;

  CLI::App* const serve = app.add_subcommand("serve", "Serve the OpenAI API over HTTP");
  AddConfigOptions(serve, &source);

  innerq::GenerateArgs generate_args;
  CLI::App* const generate = app.add_subcommand("generate", "Answer one prompt on standard output");
  AddConfigOptions(generate, &source);
  generate->add_option("-p,--prompt", generate_args.prompt, "The prompt")->required();
  generate->add_flag("--chat", generate_args.chat, "The prompt is a user's message");
  generate->add_option("-n,--max-tokens", generate_args.max_tokens, "Longest answer, tokens")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  generate->add_option("--temperature", generate_args.temperature, "0 is greedy")
      ->capture_default_str();
  generate->add_option("--seed", generate_args.seed, "Of the sampling")->capture_default_str();

  CLI::App* const check =
      app.add_subcommand("check-config", "Validate a configuration against its model");
  AddConfigOptions(check, &source);

  CLI::App* const inspect =
      app.add_subcommand("inspect", "Describe a model and its cache; loads no weights");
  std::filesystem::path path;
  CLI::Option_group* const what = inspect->add_option_group("what");
  what->add_option("-c,--config", path, "Configuration file");
  what->add_option("path", path, "Configuration file or model directory");
  what->require_option(1);
  inspect->add_option("--set", source.overrides, "Replace one key: a.b.c=value (repeatable)")
      ->allow_extra_args(false);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (serve->parsed()) return innerq::ServeCommand(source, INNERQ_VERSION);
  if (generate->parsed()) return ExitCode(innerq::GenerateCommand(source, generate_args));
  if (check->parsed()) return ExitCode(innerq::CheckConfigCommand(source));
  return ExitCode(innerq::InspectCommand(path, source.overrides));
}
