// Where the host cannot see logits it reads of most rows the largest alone. What requests get must
// not show it.
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"
#include "tests/engine/llama_step_model.h"
#include "tests/kernels/forwarding_backend.h"

namespace innerq {
namespace {

// The reference as a device: its memory is to be read by ReadToHost alone, which is counted.
class DistantReference final : public ForwardingBackend {
 public:
  explicit DistantReference(int64_t* bytes_read)
      : ForwardingBackend(CreateReferenceBackend()), bytes_read_(bytes_read) {}
  bool host_visible() const override { return false; }

 private:
  void DoReadToHost(const std::byte* from, int64_t bytes, std::byte* to) override {
    *bytes_read_ += bytes;
    inner().ReadToHost(from, bytes, to);
  }

  int64_t* const bytes_read_;
};

// Answers requests that run side by side.
std::vector<std::vector<TokenEvent>> Answer(std::unique_ptr<Backend> backend,
                                            const std::vector<Request>& requests) {
  constexpr int64_t kLogitRows = 64;
  EngineOptions options;
  options.max_sequences = 32;
  options.max_batch_tokens = 48;
  options.max_context = 256;
  const LlamaStepModel::Config config{.pools = {300, 100, 32}, .max_logit_rows = kLogitRows};
  auto weights = RandomWeights(std::move(backend), WeightFormat::kF32, kLogitRows);
  const auto engine =
      Engine::Create(options, std::make_unique<LlamaStepModel>(std::move(weights), config)).value();
  ResponseGroup group = engine->SubmitGroup(requests).value();
  std::vector<std::vector<TokenEvent>> answers;
  for (const ResponseReader& reader : group.readers) answers.push_back(ReadAll(reader).events);
  return answers;
}

TEST(TopLogits, EveryKindOfRequestGetsTheSameAnswer) {
  std::vector<Request> requests;
  const auto add = [&](const std::function<void(Request&)>& change) {
    const auto number = static_cast<int64_t>(requests.size());
    Request request = RequestOf(5 + 3 * number, 20, static_cast<uint64_t>(number));
    change(request);
    requests.push_back(request);
  };
  const auto greedy = [](Request& r) { r.sampling.temperature = 0; };
  add(greedy);
  add([](Request&) {});
  add(greedy);
  add([](Request& r) { r.sampling.top_k = 64; });
  add([](Request& r) { r.sampling.top_k = 65; });
  add([](Request& r) { r.sampling.top_k = 20, r.sampling.top_p = 0.7f; });
  add([](Request& r) { r.sampling.top_k = 50, r.sampling.min_p = 0.5f, r.sampling.top_p = 0.9f; });
  add([&](Request& r) { greedy(r), r.sampling.num_logprobs = 3; });
  add([&](Request& r) { greedy(r), r.prompt_logprobs = 2; });
  add([](Request& r) { r.prompt_logprobs = 1, r.sampling.top_k = 2; });
  add([&](Request& r) { greedy(r), r.sampling.frequency_penalty = 1.5f; });
  add([&](Request& r) { greedy(r), r.sampling.logit_bias = {{7, 2.0f}}; });
  std::vector<int32_t> half;  // of the vocabulary
  for (int32_t id = 0; id < 256; id += 2) half.push_back(id);
  add([&](Request& r) { greedy(r), r.min_tokens = 10, r.stop_token_ids = half; });
  add([&](Request& r) { r.sampling.top_k = 9, r.min_tokens = 5, r.stop_token_ids = half; });

  int64_t bytes_read = 0;
  const auto expected = Answer(CreateReferenceBackend(), requests);
  const auto actual = Answer(std::make_unique<DistantReference>(&bytes_read), requests);
  ASSERT_EQ(actual.size(), requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE("request " + std::to_string(i));
    EXPECT_FALSE(expected[i].empty());
    ExpectSameEvents(actual[i], expected[i]);
  }
  EXPECT_GT(bytes_read, 0);
}

TEST(TopLogits, AreAllThatIsReadWhereTheyAreEnough) {
  constexpr int64_t kTokens = 12;
  constexpr auto kTopBytes = static_cast<int64_t>(sizeof(TopLogit));
  constexpr int64_t kRowBytes = 256 * 4;
  const auto read = [](const std::function<void(SamplingParams&)>& change) {
    Request request = RequestOf(9, kTokens);
    change(request.sampling);
    int64_t bytes_read = 0;
    Answer(std::make_unique<DistantReference>(&bytes_read), {request});
    return bytes_read;
  };
  EXPECT_EQ(read([](auto& p) { p.temperature = 0; }), kTokens * kTopBytes);
  EXPECT_EQ(read([](auto& p) { p.top_k = 40; }), kTokens * 40 * kTopBytes);
  EXPECT_EQ(read([](auto&) {}), kTokens * kRowBytes);
}

}  // namespace
}  // namespace innerq
