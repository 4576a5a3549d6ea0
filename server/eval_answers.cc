#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <utility>

#include "server/eval_data.h"
#include "server/eval_tasks.h"
#include "server/progress_bar.h"
#include "server/recall_text.h"
#include "server/text_stream.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;
using Format = EvalColumn::Format;

// Prompts and when an answer has said enough.
struct Questions {
  std::string task;
  std::vector<std::vector<int32_t>> prompts;
  int64_t max_tokens = 0;
  std::vector<std::string> stops;
  std::function<bool(const std::string& answer)> complete;
};

// What was answered through one cache.
struct Answers {
  std::vector<std::string> texts;
  KvLayout layout;
  double effective_bits = 0;  // at the end of the answers; mean, weighted by length
  double mean_tokens = 0;     // of an answer
};

// An answer as it comes.
struct Reply {
  TextStream stream;
  std::string text;
  int64_t tokens = 0;
};

Result<Answers> Ask(const Evaluation& evaluation, size_t cache, const Questions& questions,
                    const std::function<void(int64_t)>& answered) {
  std::vector<Request> requests;
  std::vector<Reply> replies;
  int64_t longest = 0;
  for (const std::vector<int32_t>& prompt : questions.prompts) {
    Request& request = requests.emplace_back();
    request.prompt = prompt;
    request.sampling.temperature = 0;
    request.max_tokens = questions.max_tokens;
    request.stop_token_ids = evaluation.parts.stop_token_ids;
    longest = std::max(longest, static_cast<int64_t>(prompt.size()) + questions.max_tokens);
    replies.push_back(
        {TextStream(evaluation.parts.tokenizer.get(), {.stops = questions.stops}), "", 0});
  }
  if (longest > evaluation.max_context()) {
    return InvalidArgument(fmt::format(
        "a prompt and its answer may take {} tokens, {} of them the answer; the longest context is "
        "{}",
        longest, questions.max_tokens, evaluation.max_context()));
  }
  const auto count = static_cast<int64_t>(requests.size());
  const int64_t at_once = std::min(count, evaluation.options.runner.engine.max_sequences);
  ASSIGN_OR_RETURN(auto runner, evaluation.RunnerFor(cache, at_once, longest));
  const KvLayout layout = runner->layout();
  const TokenSink take = [&](size_t index, const TokenEvent& event) {
    Reply& answer = replies[index];
    ++answer.tokens;
    if (event.is_stop) return true;
    answer.text += answer.stream.Push(event.token_id);
    return !answer.stream.stopped() && !questions.complete(answer.text);
  };
  const auto progress = [&](int64_t more) {
    answered(more);
    return !evaluation.interrupted();
  };
  RETURN_IF_ERROR(AnswerAll(std::move(runner), std::move(requests), take, progress));

  Answers answers{.texts = {}, .layout = layout};
  double total = 0;
  for (size_t i = 0; i < replies.size(); ++i) {
    answers.texts.push_back(replies[i].text + replies[i].stream.Flush());
    const auto length = static_cast<int64_t>(questions.prompts[i].size()) + replies[i].tokens;
    answers.effective_bits +=
        layout.effective_bits_per_element(length) * static_cast<double>(length);
    total += static_cast<double>(length);
    answers.mean_tokens += static_cast<double>(replies[i].tokens) / static_cast<double>(count);
  }
  answers.effective_bits /= total;
  return answers;
}

// Asks through every cache.
Result<std::vector<Answers>> AskAll(const Evaluation& evaluation, const Questions& questions) {
  ProgressBar bar(questions.task);
  const auto total = static_cast<int64_t>(questions.prompts.size() * evaluation.caches.size());
  int64_t done = 0;
  bar.Show(0, total);
  std::vector<Answers> all;
  for (size_t cache = 0; cache < evaluation.caches.size(); ++cache) {
    ASSIGN_OR_RETURN(Answers answers, Ask(evaluation, cache, questions,
                                          [&](int64_t more) { bar.Show(done += more, total); }));
    all.push_back(std::move(answers));
  }
  return all;
}

Error CannotChat() { return InvalidArgument("--chat: the model has no chat template"); }

// Without a clock: a template that writes the date would make runs differ from day to day.
Result<std::vector<int32_t>> EncodeConversation(const Evaluation& evaluation,
                                                const std::vector<ChatMessage>& messages) {
  if (evaluation.parts.chat_template == nullptr) return CannotChat();
  ASSIGN_OR_RETURN(const auto segments, evaluation.parts.chat_template->Render(messages, {}));
  return EncodePrompt(segments, *evaluation.parts.tokenizer);
}

Result<std::vector<int32_t>> EncodeProblem(const Evaluation& evaluation, bool chat,
                                           const std::vector<Problem>& shots,
                                           const Problem& problem) {
  if (!chat) {
    std::string prompt;
    for (const Problem& shot : shots) prompt += WorkedExample(shot) + "\n\n";
    return evaluation.parts.tokenizer->Encode(prompt + ProblemPrompt(problem.question), {});
  }
  std::vector<ChatMessage> messages;
  for (const Problem& shot : shots) {
    messages.push_back({.role = "user", .content = shot.question});
    messages.push_back({.role = "assistant", .content = shot.answer});
  }
  messages.push_back({.role = "user", .content = problem.question});
  return EncodeConversation(evaluation, messages);
}

// A cell of the grid.
struct Trial {
  int64_t length = 0;
  int64_t depth = 0;
  std::string code;
  int64_t length_of_prompt = 0;
  int64_t begin = 0, end = 0;  // the prompt's tokens that state the code
};

// Whether the code stands in the answer as a number of its own.
bool Says(const std::string& answer, const std::string& code) {
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  for (size_t at = answer.find(code); at != std::string::npos; at = answer.find(code, at + 1)) {
    const size_t end = at + code.size();
    if ((at == 0 || !digit(answer[at - 1])) && (end == answer.size() || !digit(answer[end]))) {
      return true;
    }
  }
  return false;
}

// Whether the cache holds the needle quantized when the answer begins.
bool ReadsQuantized(const Trial& trial, const KvLayout& layout, bool exact_prefill) {
  const PageRange sealed =
      layout.SealedPages(trial.length_of_prompt, exact_prefill ? trial.length_of_prompt : 0);
  return layout.quantized() && trial.begin >= sealed.begin * layout.page_tokens() &&
         trial.end <= sealed.end * layout.page_tokens();
}

// Of those trials that count; none: nullopt.
std::optional<double> ShareFound(const std::vector<Trial>& trials, const Answers& answers,
                                 const std::function<bool(const Trial&)>& counts) {
  int64_t found = 0;
  int64_t count = 0;
  for (size_t i = 0; i < trials.size(); ++i) {
    if (!counts(trials[i])) continue;
    ++count;
    found += Says(answers.texts[i], trials[i].code) ? 1 : 0;
  }
  if (count == 0) return std::nullopt;
  return static_cast<double>(found) / static_cast<double>(count);
}

struct RecallQuestions {
  Questions questions;
  std::vector<Trial> trials;
};

Result<RecallQuestions> MakeRecallQuestions(const Evaluation& evaluation, const RecallArgs& args) {
  // From text that hardly states anything else to text that states nothing but codes.
  constexpr int64_t kRecordPercents[] = {5, 20, 50, 100};
  RecallQuestions recall;
  recall.questions.task = "recall";
  recall.questions.max_tokens = args.max_tokens;
  recall.questions.complete = [](const std::string&) { return false; };
  if (!args.chat) recall.questions.stops = {"\n"};
  const EncodeNeedle encode = [&](const std::string& text,
                                  const std::string& question) -> Result<std::vector<int32_t>> {
    if (!args.chat) {
      return evaluation.parts.tokenizer->Encode(text + "\n\n" + ProblemPrompt(question), {});
    }
    ChatMessage message;
    message.role = "user";
    message.content = text + "\n\n" + question;
    return EncodeConversation(evaluation, {std::move(message)});
  };
  int64_t least = 0;
  TextRandom seeds(args.seed);
  for (const int64_t length : args.lengths) {
    for (const int64_t depth : args.depths) {
      for (int64_t trial = 0; trial < args.trials; ++trial) {
        if (evaluation.interrupted()) return Error{ErrorCode::kCancelled, "interrupted"};
        const NeedleSpec spec{
            .length = length,
            .depth_percent = depth,
            .record_percent = kRecordPercents[trial % std::ssize(kRecordPercents)],
            .seed = seeds.Next()};
        ASSIGN_OR_RETURN(Needle needle, MakeNeedle(spec, *evaluation.parts.tokenizer, encode));
        least = std::max(least, needle.least_length);
        recall.questions.prompts.push_back(std::move(needle.prompt));
        recall.trials.push_back({.length = length,
                                 .depth = depth,
                                 .code = needle.code,
                                 .length_of_prompt = std::ssize(recall.questions.prompts.back()),
                                 .begin = needle.begin,
                                 .end = needle.end});
      }
    }
  }
  const int64_t shortest = *std::min_element(args.lengths.begin(), args.lengths.end());
  if (shortest < least) {
    return InvalidArgument(
        fmt::format("--lengths: a code, the question for it and what is around them take {} "
                    "tokens, more than {}",
                    least, shortest));
  }
  return recall;
}

}  // namespace

Result<EvalReport> EvaluateProblems(const Evaluation& evaluation, const ProblemArgs& args,
                                    const std::vector<Problem>& problems,
                                    const std::vector<Problem>& shots) {
  Questions questions{.task = "gsm8k",
                      .prompts = {},
                      .max_tokens = args.max_tokens,
                      .stops = {},
                      .complete = HasFinalLine};
  if (!args.chat) questions.stops = {"Question:"};
  for (const Problem& problem : problems) {
    ASSIGN_OR_RETURN(std::vector<int32_t> prompt,
                     EncodeProblem(evaluation, args.chat, shots, problem));
    questions.prompts.push_back(std::move(prompt));
  }
  ASSIGN_OR_RETURN(const std::vector<Answers> all, AskAll(evaluation, questions));

  EvalReport report = evaluation.Report("gsm8k");
  report.scope = fmt::format(
      "gsm8k of {} on {}: {} problems, {} worked examples{}, greedy; right: the number after ####; "
      "\"as reference\": the same number as with {}",
      report.model, report.device, problems.size(), shots.size(), args.chat ? ", as chat" : "",
      evaluation.caches[0].name);
  const OrderedJson settings = {{"problems", problems.size()},
                                {"shots", shots.size()},
                                {"chat", args.chat},
                                {"max_tokens", args.max_tokens},
                                {"reference", evaluation.caches[0].name}};
  report.settings = settings.dump();
  report.columns = {{"accuracy", "right", Format::kPercent},
                    {"as_reference", "as reference", Format::kPercent},
                    {"ended", "with a number", Format::kPercent},
                    {"mean_tokens", "tokens", Format::kCount}};
  const auto count = static_cast<double>(problems.size());
  for (size_t cache = 0; cache < all.size(); ++cache) {
    int64_t right = 0;
    int64_t same = 0;
    int64_t ended = 0;
    for (size_t i = 0; i < problems.size(); ++i) {
      const std::string number = FinalNumber(all[cache].texts[i]);
      right += number == FinalNumber(problems[i].answer) ? 1 : 0;
      same += !number.empty() && number == FinalNumber(all[0].texts[i]) ? 1 : 0;
      ended += number.empty() ? 0 : 1;
    }
    EvalRow& row = report.rows.emplace_back();
    row.cache = evaluation.caches[cache].name;
    row.sealed_bits = all[cache].layout.sealed_bits_per_element();
    row.effective_bits = all[cache].effective_bits;
    row.values = {static_cast<double>(right) / count, static_cast<double>(same) / count,
                  static_cast<double>(ended) / count, all[cache].mean_tokens};
    row.details = OrderedJson{{"right", right}, {"problems", problems.size()}}.dump();
  }
  return report;
}

Result<EvalReport> EvaluateRecall(const Evaluation& evaluation, const RecallArgs& args) {
  ASSIGN_OR_RETURN(const RecallQuestions recall, MakeRecallQuestions(evaluation, args));
  ASSIGN_OR_RETURN(const std::vector<Answers> all, AskAll(evaluation, recall.questions));

  EvalReport report = evaluation.Report("recall");
  report.scope = fmt::format(
      "recall of {} on {}: {} needles, {} for each length (t: tokens) and depth (%); found: the "
      "code is in the answer; \"quantized\": of those needles that the cache holds quantized",
      report.model, report.device, recall.trials.size(), args.trials);
  const OrderedJson settings = {{"lengths", args.lengths},       {"depths", args.depths},
                                {"trials", args.trials},         {"seed", args.seed},
                                {"max_tokens", args.max_tokens}, {"chat", args.chat}};
  report.settings = settings.dump();
  report.columns = {{"found", "found", Format::kPercent},
                    {"found_quantized", "quantized", Format::kPercent}};
  for (const int64_t length : args.lengths) {
    report.columns.push_back(
        {fmt::format("found_length_{}", length), fmt::format("{} t", length), Format::kPercent});
  }
  for (const int64_t depth : args.depths) {
    report.columns.push_back(
        {fmt::format("found_depth_{}", depth), fmt::format("{} %", depth), Format::kPercent});
  }
  for (size_t cache = 0; cache < all.size(); ++cache) {
    const Answers& answers = all[cache];
    EvalRow& row = report.rows.emplace_back();
    row.cache = evaluation.caches[cache].name;
    row.sealed_bits = answers.layout.sealed_bits_per_element();
    row.effective_bits = answers.effective_bits;
    const bool exact_prefill = evaluation.caches[cache].options.exact_prefill;
    const auto quantized = [&](const Trial& trial) {
      return ReadsQuantized(trial, answers.layout, exact_prefill);
    };
    row.values = {ShareFound(recall.trials, answers, [](const Trial&) { return true; }),
                  ShareFound(recall.trials, answers, quantized)};
    for (const int64_t length : args.lengths) {
      row.values.push_back(ShareFound(recall.trials, answers,
                                      [=](const Trial& trial) { return trial.length == length; }));
    }
    OrderedJson grid = OrderedJson::array();
    for (const int64_t depth : args.depths) {
      row.values.push_back(ShareFound(recall.trials, answers,
                                      [=](const Trial& trial) { return trial.depth == depth; }));
      for (const int64_t length : args.lengths) {
        const auto found = ShareFound(recall.trials, answers, [=](const Trial& trial) {
          return trial.depth == depth && trial.length == length;
        });
        grid.push_back({{"length", length}, {"depth", depth}, {"found", *found}});
      }
    }
    row.details = OrderedJson{
        {"needles_quantized", std::count_if(recall.trials.begin(), recall.trials.end(), quantized)},
        {"grid",
         std::move(
             grid)}}.dump();
  }
  return report;
}

}  // namespace innerq
