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
#include "server/eval_command.h"

namespace {

void AddConfigOptions(CLI::App* command, innerq::ConfigSource* source) {
  command->add_option("-c,--config", source->file, "Configuration file")->required();
  command->add_option("--set", source->overrides, "Replace one key: a.b.c=value (repeatable)")
      ->allow_extra_args(false);
}

constexpr const char* kCacheHelp =
    "A cache to measure (repeatable): the section kv_cache of a configuration file, with keys "
    "replaced: --cache configs/innerq_base.json,key.bits=2,key.normalize=off. Default: the one of "
    "--config. An F16 cache is always measured too, as the reference";

// The command eval with its tasks.
CLI::App* AddEval(CLI::App* app, innerq::ConfigSource* source, innerq::EvalArgs* args) {
  using Task = innerq::EvalArgs::Task;
  CLI::App* const eval =
      app->add_subcommand("eval", "Measure what a cache costs the model in quality");
  eval->require_subcommand(1);
  const auto add = [=](Task task, const char* name, const char* what) {
    CLI::App* const command = eval->add_subcommand(name, what);
    AddConfigOptions(command, source);
    command->add_option("--cache", args->output.caches, kCacheHelp)->allow_extra_args(false);
    command->add_option("--json", args->output.json, "Write the results to this file");
    command->add_option("--plot", args->output.plot,
                        "Write quality against bits to this file, as SVG");
    command->callback([=] { args->task = task; });
    return command;
  };
  const auto add_texts = [=](CLI::App* command) {
    innerq::ScoringArgs* const scoring = &args->scoring;
    command
        ->add_option("--text", scoring->texts,
                     "Text to measure on (repeatable): plain, one document; or .jsonl with "
                     "\"text\", \"prompt\" and \"answer\", or \"question\" and \"answer\"")
        ->allow_extra_args(false)
        ->required();
    command->add_option("--limit", scoring->limit, "Documents of each file; 0: all")
        ->check(CLI::NonNegativeNumber);
    command
        ->add_option("--context", scoring->context,
                     "Tokens of a window that texts are cut into; default: 2048, or the model's "
                     "longest context if that is less")
        ->check(CLI::Range(2, 1 << 24));
    command->add_option("--skip", scoring->skip, "Leave out tokens at positions below this")
        ->check(CLI::NonNegativeNumber);
  };
  add_texts(add(Task::kPerplexity, "perplexity", "Perplexity of texts"));
  add_texts(add(Task::kKl, "kl",
                "KL divergence of next-token distributions from those of the F16 cache, and how "
                "often the most likely token is the same"));

  CLI::App* const gsm8k =
      add(Task::kGsm8k, "gsm8k", "Share of word problems that are answered right, greedily");
  innerq::ProblemArgs* const problems = &args->problems;
  gsm8k->add_option("--data", problems->data, "Problems: JSONL with \"question\" and \"answer\"")
      ->required();
  CLI::Option* const shots = gsm8k->add_option("--shots", problems->shots,
                                               "Worked examples to begin with: JSONL as --data");
  gsm8k->add_option("--num-shots", problems->num_shots, "Worked examples of that file")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->needs(shots);
  gsm8k->add_option("--limit", problems->limit, "Problems; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  gsm8k->add_option("--max-tokens", problems->max_tokens, "Longest answer, tokens")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  gsm8k->add_flag("--chat", problems->chat, "Ask in the model's chat template");

  CLI::App* const recall =
      add(Task::kRecall, "recall", "Share of codes found in long texts, by length and depth");
  innerq::RecallArgs* const needles = &args->recall;
  recall->add_option("--lengths", needles->lengths, "Tokens of a prompt")
      ->delimiter(',')
      ->check(CLI::Range(64, 1 << 24))
      ->capture_default_str();
  recall->add_option("--depths", needles->depths, "Where the code stands, percent of the text")
      ->delimiter(',')
      ->check(CLI::Range(0, 100))
      ->capture_default_str();
  recall->add_option("--trials", needles->trials, "Texts of each length and depth")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  recall->add_option("--max-tokens", needles->max_tokens, "Longest answer, tokens")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  recall->add_option("--seed", needles->seed, "Of the texts")->capture_default_str();
  recall->add_flag("--chat", needles->chat, "Ask in the model's chat template");

  CLI::App* const longgen =
      add(Task::kLonggen, "longgen",
          "KL divergence, by position, along a long answer that the F16 cache gives");
  innerq::LongAnswerArgs* const answers = &args->long_answers;
  longgen->add_option("--prompt", answers->prompts, "A prompt (repeatable)")
      ->allow_extra_args(false);
  longgen
      ->add_option("--text", answers->texts,
                   "Further prompts: the beginning of each document (repeatable)")
      ->allow_extra_args(false);
  longgen->add_option("--limit", answers->limit, "Documents of each file; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  longgen->add_option("--prompt-tokens", answers->prompt_tokens, "Of a document")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  longgen->add_option("--tokens", answers->tokens, "Of the answer, which does not end before")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  longgen->add_option("--temperature", answers->temperature, "0 is greedy")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  longgen->add_option("--seed", answers->seed, "Of the sampling")->capture_default_str();
  return eval;
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

  innerq::EvalArgs eval_args;
  CLI::App* const eval = AddEval(&app, &source, &eval_args);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (serve->parsed()) return innerq::ServeCommand(source, INNERQ_VERSION);
  if (generate->parsed()) return ExitCode(innerq::GenerateCommand(source, generate_args));
  if (eval->parsed()) return ExitCode(innerq::EvalCommand(source, eval_args));
  if (check->parsed()) return ExitCode(innerq::CheckConfigCommand(source));
  return ExitCode(innerq::InspectCommand(path, source.overrides));
}
