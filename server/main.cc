// innerq: an LLM inference server with a quantized KV cache.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "server/bench_command.h"
#include "server/bench_shapes.h"
#include "server/commands.h"
#include "server/eval_command.h"
#include "server/quantize_command.h"

namespace {

void AddConfigOptions(CLI::App* command, innerq::ConfigSource* source) {
  command
      ->add_option("-c,--config", source->file,
                   "Configuration file; default: that of $INNERQ_CONFIG")
      ->required(source->file.empty());
  command->add_option("--set", source->overrides, "Replace one key: a.b.c=value (repeatable)")
      ->allow_extra_args(false);
}

constexpr const char* kCacheHelp =
    "A cache to measure (repeatable): the section kv_cache of a configuration file, with keys "
    "replaced: --cache configs/innerq_base.json,key.bits=2,key.normalize=off. Default: the one of "
    "--config. An F16 cache is always measured too, as the reference";

// More than any context, and far from what sums of a few could not hold.
CLI::Range TokenRange() { return CLI::Range(1, 1 << 24); }

void AddScoringOptions(CLI::App* command, innerq::ScoringArgs* args) {
  command
      ->add_option("--text", args->texts,
                   "Text to measure on (repeatable): plain, one document; or .jsonl with \"text\", "
                   "\"prompt\" and \"answer\", or \"question\" and \"answer\"")
      ->allow_extra_args(false)
      ->required();
  command
      ->add_option("--limit", args->limit,
                   "Documents of each file, and windows of each document; 0: all")
      ->check(CLI::Range(0, 1 << 24));
  command
      ->add_option("--context", args->context,
                   "Tokens of a window that texts are cut into; default: 2048, or the model's "
                   "longest context if that is less")
      ->check(CLI::Range(2, 1 << 24));
  command->add_option("--skip", args->skip, "Leave out tokens at positions below this")
      ->check(CLI::NonNegativeNumber);
}

void AddProblemOptions(CLI::App* command, innerq::ProblemArgs* args) {
  command->add_option("--data", args->data, "Problems: JSONL with \"question\" and \"answer\"")
      ->required();
  CLI::Option* const shots = command->add_option(
      "--shots", args->shots,
      "Worked examples to begin with: JSONL as --data, of other problems. Default: none, for "
      "models that end answers in \"#### N\" by themselves");
  command->add_option("--num-shots", args->num_shots, "Worked examples to take of that file")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->needs(shots);
  command->add_option("--limit", args->limit, "Problems to ask; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--max-tokens", args->max_tokens, "Longest answer, tokens")
      ->check(TokenRange())
      ->capture_default_str();
  command->add_flag("--chat", args->chat, "Ask in the model's chat template");
}

void AddRecallOptions(CLI::App* command, innerq::RecallArgs* args) {
  command->add_option("--lengths", args->lengths, "Tokens of a prompt, at most")
      ->delimiter(',')
      ->check(TokenRange())
      ->capture_default_str();
  command->add_option("--depths", args->depths, "Where the code stands, percent of the text")
      ->delimiter(',')
      ->check(CLI::Range(0, 100))
      ->capture_default_str();
  command->add_option("--trials", args->trials, "Texts of each length and depth")
      ->check(CLI::Range(1, 10'000))
      ->capture_default_str();
  command->add_option("--max-tokens", args->max_tokens, "Longest answer, tokens")
      ->check(TokenRange())
      ->capture_default_str();
  command->add_option("--seed", args->seed, "Seed of the texts")->capture_default_str();
  command->add_flag("--chat", args->chat, "Ask in the model's chat template");
}

void AddLongAnswerOptions(CLI::App* command, innerq::LongAnswerArgs* args) {
  command->add_option("--prompt", args->prompts, "A prompt (repeatable)")->allow_extra_args(false);
  command
      ->add_option("--text", args->texts,
                   "Further prompts: the beginning of each document (repeatable)")
      ->allow_extra_args(false);
  command->add_option("--limit", args->limit, "Documents to take of each file; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--prompt-tokens", args->prompt_tokens,
                   "Tokens of a document that make a prompt")
      ->check(TokenRange())
      ->capture_default_str();
  command->add_option("--tokens", args->tokens, "Tokens of an answer; it does not end before")
      ->check(TokenRange())
      ->capture_default_str();
  command
      ->add_option("--temperature", args->temperature, "Temperature of the sampling; 0 is greedy")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  command->add_option("--seed", args->seed, "Seed of the sampling")->capture_default_str();
}

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
  AddScoringOptions(add(Task::kPerplexity, "perplexity", "Perplexity of texts"), &args->scoring);
  AddScoringOptions(add(Task::kKl, "kl",
                        "KL divergence of next-token distributions from those of the F16 cache, "
                        "and how often the most likely token is the same"),
                    &args->scoring);
  AddProblemOptions(
      add(Task::kGsm8k, "gsm8k", "Share of word problems that are answered right, greedily"),
      &args->problems);
  AddRecallOptions(
      add(Task::kRecall, "recall", "Share of codes found in long texts, by length and depth"),
      &args->recall);
  AddLongAnswerOptions(
      add(Task::kLonggen, "longgen",
          "KL divergence, by position, along a long answer that the F16 cache gives"),
      &args->long_answers);
  return eval;
}

// How weights are coded; SpecOf tells what there is. Returns the option that chooses the scheme.
CLI::Option* AddLowBitOptions(CLI::App* command, innerq::LowBitArgs* args) {
  CLI::Option* const scheme = command->add_option(
      "--scheme", args->scheme,
      "Levels of weights: powers of two (pow2), sums of two of them (apot), or evenly spaced "
      "(uniform). Default: apot for 4 bits, uniform for 8, else pow2");
  const auto add = [&](const char* name, auto& value, const std::string& what) {
    command->add_option(name, value, what)->capture_default_str();
  };
  add("--bits", args->bits, "Bits of a weight: " + innerq::KnownLowBitBits());
  add("--group-size", args->group_size,
      "Weights of an output that share a scale: 32, 64, 128; 0: all");
  add("--activation-bits", args->activation_bits,
      "Bits of the inputs: 8 and 16 by each row's range; 3 and 4 by a range that is learned from "
      "calibration");
  add("--head-bits", args->head_bits,
      "Bits of a weight of lm_head, the matrix of logits: 2, 3, 4 or 8, by the default scheme; 0: "
      "it "
      "stays as it is");
  return scheme;
}

CLI::App* AddBench(CLI::App* app, innerq::ConfigSource* source, innerq::BenchArgs* args) {
  CLI::App* const bench =
      app->add_subcommand("bench", "Measure how fast a model and its caches are");
  AddConfigOptions(bench, source);
  bench
      ->add_option("--cache", args->caches,
                   "A cache to measure (repeatable): the section kv_cache of a configuration file, "
                   "with keys replaced: --cache configs/innerq_base.json,key.bits=2. Its memory is "
                   "what the sequences need. Default: the one of --config")
      ->allow_extra_args(false);
  CLI::Option* const shape = bench->add_option(
      "--shape", args->shape,
      "Random weights of this shape, in model.dtype (auto: bf16), instead of the configuration's "
      "model: " +
          innerq::ShapeNames());
  bench->add_option("--layers", args->layers, "Layers of the shape; default: all")
      ->check(CLI::Range(1, 1000))
      ->needs(shape);
  CLI::Option* const scheme = AddLowBitOptions(bench, &args->weights);
  scheme->needs(shape);
  for (const char* name : {"--bits", "--group-size", "--activation-bits", "--head-bits"}) {
    bench->get_option(name)->needs(scheme);
  }
  bench->add_option("--batch", args->batches, "Sequences at once")
      ->delimiter(',')
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  bench
      ->add_option("--depth", args->depths,
                   "Tokens of each sequence that are cached before its prompt, not timed")
      ->delimiter(',')
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  bench->add_option("--prompt", args->prompt, "Tokens of each prompt")
      ->check(TokenRange())
      ->capture_default_str();
  bench
      ->add_option("--generate", args->generate,
                   "Steps after the prompts: a token of each sequence")
      ->check(TokenRange())
      ->capture_default_str();
  bench
      ->add_option("--temperature", args->temperature,
                   "Temperature of sampling; 0 takes the most likely token, which a device finds "
                   "by itself")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  bench->add_option("--runs", args->runs, "Runs of each measurement; the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  bench->add_option("--json", args->json, "Write the results to this file");
  return bench;
}

CLI::App* AddQuantize(CLI::App* app, innerq::QuantizeArgs* args) {
  CLI::App* const quantize =
      app->add_subcommand("quantize", "Make a checkpoint with low-bit weights of one with floats");
  quantize->add_option("MODEL_DIR", args->model, "The model's directory")->required();
  quantize
      ->add_option("OUT_DIR", args->output,
                   "The new model's directory, which must not exist, or be empty")
      ->required();
  AddLowBitOptions(quantize, &args->weights);
  quantize
      ->add_option("--scale", args->scale,
                   "Scales of weights: any number (free), or powers of two (pow2), so that with "
                   "--scheme pow2 products are shifts but for what a row of inputs is scaled by")
      ->capture_default_str();
  quantize
      ->add_option("--prune", args->prune,
                   "Share of weights to make zero, the smallest; up to 0.95")
      ->capture_default_str();
  quantize
      ->add_option("--prune-matrix", args->prune_matrices,
                   "PATTERN=R (repeatable): the same for the matrices whose names match, such as "
                   "'model.layers.0.*=0.3' or '*.down_proj=0.7'; the last that matches counts")
      ->allow_extra_args(false);
  quantize
      ->add_option("--calibration", args->calibration,
                   "Text to run first (repeatable), so that errors count by the inputs that there "
                   "are: plain, or .jsonl as of `innerq eval`. Default: all inputs count alike")
      ->allow_extra_args(false);
  quantize
      ->add_option("--calibration-tokens", args->calibration_tokens,
                   "Tokens to run at most, taken from all over these texts")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  quantize
      ->add_option("--evaluate", args->evaluation,
                   "Text to measure the models on (repeatable), before and after. Default: what "
                   "calibration leaves of its own")
      ->allow_extra_args(false);
  quantize
      ->add_option("--evaluate-tokens", args->evaluation_tokens,
                   "Tokens to measure on at most, taken from all over these texts")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  quantize->add_option("--threads", args->threads, "Threads; 0: one per core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  return quantize;
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
  // The images set it, so that options can be added to their command without a -c. Not CLI11's
  // envname: of an option in each command, all of which write here.
  if (const char* const file = std::getenv("INNERQ_CONFIG")) source.file = file;

  CLI::App* const serve = app.add_subcommand("serve", "Serve the OpenAI API over HTTP");
  AddConfigOptions(serve, &source);

  innerq::GenerateArgs generate_args;
  CLI::App* const generate = app.add_subcommand("generate", "Answer one prompt on standard output");
  AddConfigOptions(generate, &source);
  generate->add_option("-p,--prompt", generate_args.prompt, "The prompt")->required();
  generate->add_flag("--chat", generate_args.chat, "The prompt is a user's message");
  generate->add_option("-n,--max-tokens", generate_args.max_tokens, "Longest answer, tokens")
      ->check(TokenRange())
      ->capture_default_str();
  generate
      ->add_option("--temperature", generate_args.temperature,
                   "Temperature of the sampling; 0 is greedy")
      ->capture_default_str();
  generate->add_option("--seed", generate_args.seed, "Seed of the sampling")->capture_default_str();

  CLI::App* const check =
      app.add_subcommand("check-config", "Validate a configuration against its model");
  AddConfigOptions(check, &source);

  CLI::App* const inspect =
      app.add_subcommand("inspect", "Describe a model and its cache; loads no weights");
  std::filesystem::path path = source.file;
  CLI::Option_group* const what = inspect->add_option_group("what");
  what->add_option("-c,--config", path, "Configuration file; default: that of $INNERQ_CONFIG");
  what->add_option("path", path, "Configuration file or model directory");
  what->require_option(path.empty() ? 1 : 0, 1);
  inspect->add_option("--set", source.overrides, "Replace one key: a.b.c=value (repeatable)")
      ->allow_extra_args(false);

  innerq::EvalArgs eval_args;
  CLI::App* const eval = AddEval(&app, &source, &eval_args);

  innerq::BenchArgs bench_args;
  CLI::App* const bench = AddBench(&app, &source, &bench_args);

  innerq::QuantizeArgs quantize_args;
  CLI::App* const quantize = AddQuantize(&app, &quantize_args);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help and the like
    // The first word that is no command, where one is asked for.
    int at = 1;
    const CLI::App* command = &app;
    while (!command->get_subcommands().empty()) command = command->get_subcommands().front(), ++at;
    const bool unknown = !command->get_subcommands({}).empty() && at < argc && argv[at][0] != '-';
    std::fprintf(stderr, "innerq: %s\n",
                 unknown ? ("there is no command " + std::string(argv[at])).c_str() : error.what());
    std::fprintf(stderr, "Run with --help for more information.\n");
    return 2;
  }
  if (serve->parsed()) return innerq::ServeCommand(source, INNERQ_VERSION);
  if (generate->parsed()) return ExitCode(innerq::GenerateCommand(source, generate_args));
  if (eval->parsed()) return ExitCode(innerq::EvalCommand(source, eval_args));
  if (bench->parsed()) {
    return ExitCode(innerq::BenchCommand(source, bench_args, INNERQ_VERSION));
  }
  if (quantize->parsed()) return ExitCode(innerq::QuantizeCommand(quantize_args));
  if (check->parsed()) return ExitCode(innerq::CheckConfigCommand(source));
  return ExitCode(innerq::InspectCommand(path, source.overrides));
}
