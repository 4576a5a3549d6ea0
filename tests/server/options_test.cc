#include "server/options.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "server/config_schema.h"
#include "server/http_server.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

std::filesystem::path ConfigDirectory() {
  return std::filesystem::path(INNERQ_SOURCE_DIR) / "configs";
}

// The path that a refused configuration blames, and its message.
Error Refusal(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const auto options = ParseOptions(text, overrides);
  EXPECT_FALSE(options.ok()) << text;
  return options.ok() ? Error{} : options.error();
}

Options Accepted(const std::string& text, const std::vector<std::string>& overrides = {}) {
  auto options = ParseOptions(text, overrides);
  EXPECT_TRUE(options.ok()) << (options.ok() ? "" : options.error().message);
  return options.ok() ? std::move(options).value() : Options{};
}

TEST(Options, AnEmptyConfigurationHasTheDefaultsOfTheEnginesStructs) {
  const Options options = Accepted("{}");
  const KvCacheOptions kv;
  EXPECT_EQ(options.runner.kv_cache.memory_bytes, kv.memory_bytes);
  EXPECT_EQ(options.runner.kv_cache.page_tokens, kv.page_tokens);
  EXPECT_EQ(options.runner.kv_cache.sink_tokens, kv.sink_tokens);
  EXPECT_EQ(options.runner.kv_cache.recent_tokens, kv.recent_tokens);
  EXPECT_EQ(options.runner.kv_cache.key, kv.key);
  EXPECT_EQ(options.runner.kv_cache.value, kv.value);
  EXPECT_EQ(options.runner.kv_cache.normalize_keys, kv.normalize_keys);
  EXPECT_TRUE(options.runner.kv_cache.layers.empty());
  const EngineOptions engine;
  EXPECT_EQ(options.runner.engine.max_sequences, engine.max_sequences);
  EXPECT_EQ(options.runner.engine.max_batch_tokens, engine.max_batch_tokens);
  EXPECT_EQ(options.runner.engine.max_queue, engine.max_queue);
  EXPECT_EQ(options.runner.engine.max_context, engine.max_context);
  EXPECT_FALSE(options.runner.engine.exact_prefill);
  EXPECT_TRUE(options.runner.engine.prefix_cache);
  const BackendOptions backend;
  EXPECT_EQ(options.runner.backend.device, backend.device);
  EXPECT_EQ(options.runner.backend.variant, backend.variant);
  EXPECT_EQ(options.runner.backend.deterministic, backend.deterministic);
  EXPECT_FALSE(Accepted(R"({"backend": {"device": "cuda"}})").runner.backend.deterministic);
  EXPECT_TRUE(Accepted(R"({"backend": {"device": "cuda", "deterministic": true}})")
                  .runner.backend.deterministic);
  EXPECT_EQ(options.runner.dtype, std::nullopt);
  const SelfCheckOptions self_check;
  EXPECT_EQ(options.self_check.enabled, self_check.enabled);
  EXPECT_EQ(options.self_check.seconds, self_check.seconds);
  EXPECT_EQ(options.self_check.warn_kl, self_check.warn_kl);
  EXPECT_EQ(options.model.alias, "demo");
  EXPECT_EQ(options.server.host, "127.0.0.1");
  EXPECT_EQ(options.server.max_body_bytes, 8 << 20);
}

TEST(Options, EveryPresetIsValidAndSaysWhatItsNameSays) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ConfigDirectory())) {
    if (entry.path().extension() != ".json" || entry.path().filename() == "schema.json") continue;
    ++count;
    std::ifstream file(entry.path());
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    EXPECT_EQ(Accepted(text).model.path, "models/demo") << entry.path();
  }
  EXPECT_EQ(count, 9);

  const auto load = [](const std::string& name) {
    std::ifstream file(ConfigDirectory() / (name + ".json"));
    return Accepted({std::istreambuf_iterator<char>(file), {}}).runner.kv_cache;
  };
  EXPECT_FALSE(load("fp16").key.quantized() || load("fp16").value.quantized());
  EXPECT_EQ(load("innerq_hybrid").value.mode, QuantMode::kHybrid);
  EXPECT_EQ(load("innerq_small").value.bits, 2);
  EXPECT_EQ(load("int4").key.bits, 4);
  const KvCacheOptions kivi = load("kivi");
  EXPECT_EQ(kivi.sink_tokens, 0);
  EXPECT_EQ(kivi.recent_tokens, 128);
  EXPECT_FALSE(kivi.normalize_keys);
  EXPECT_EQ(kivi.key, (QuantSpec{.bits = 2,
                                 .mode = QuantMode::kAsymmetric,
                                 .axis = QuantAxis::kOuter,
                                 .group_size = 32,
                                 .codec = QuantCodec::kPaper}));
}

TEST(Options, AnUnknownKeyIsNamedWithItsPathAndTheLikelyOne) {
  const Error error = Refusal(R"({"kv_cache": {"key": {"bitz": 3}}})");
  EXPECT_EQ(error.message, "kv_cache.key.bitz: unknown key; did you mean bits?");
  EXPECT_EQ(error.param, "kv_cache.key.bitz");
  EXPECT_EQ(Refusal(R"({"serverr": {}})").message, "serverr: unknown key; did you mean server?");
  EXPECT_EQ(Refusal(R"({"model": {"zzzzzz": 1}})").message, "model.zzzzzz: unknown key");
}

TEST(Options, WrongTypesRangesAndChoicesAreRefusedWithTheirPath) {
  EXPECT_EQ(Refusal(R"({"server": {"port": "80"}})").param, "server.port");
  EXPECT_EQ(Refusal(R"({"server": {"port": 80.5}})").param, "server.port");
  EXPECT_EQ(Refusal(R"({"server": {"port": 65536}})").param, "server.port");
  EXPECT_EQ(Refusal(R"({"server": {"port": -1}})").param, "server.port");
  EXPECT_EQ(Refusal(R"({"server": {"port": 99999999999999999999}})").param, "server.port");
  EXPECT_EQ(Refusal(R"({"server": {"host": ""}})").param, "server.host");
  EXPECT_EQ(Refusal(R"({"server": {"api_keys": ["a", 3]}})").param, "server.api_keys.1");
  EXPECT_EQ(Refusal(R"({"kv_cache": {"key": {"bits": 5}}})").param, "kv_cache.key.bits");
  EXPECT_EQ(Refusal(R"({"kv_cache": {"key": 3}})").param, "kv_cache.key");
  EXPECT_EQ(Refusal(R"({"kv_cache": {"memory": 1073741824}})").param, "kv_cache.memory");
  EXPECT_EQ(Refusal(R"({"kv_cache": {"memory": "1 GiB"}})").message,
            "kv_cache.memory: expected a size like 512MiB or 2GB, not \"1 GiB\"; or auto");
  EXPECT_EQ(Refusal(R"({"server": {"max_body": "auto"}})").param, "server.max_body");
  EXPECT_EQ(Accepted(R"({"kv_cache": {"memory": "auto"}})").runner.kv_cache.memory_bytes,
            std::nullopt);
  EXPECT_EQ(Accepted(R"({"kv_cache": {"memory": "2MiB"}})").runner.kv_cache.memory_bytes, 2 << 20);
  EXPECT_EQ(Refusal(R"({"backend": {"deterministic": "yes"}})").param, "backend.deterministic");
  EXPECT_EQ(Refusal(R"({"log": {"level": "loud"}})").param, "log.level");
  EXPECT_NE(Refusal("[]").message.find("JSON object"), std::string::npos);
  EXPECT_NE(Refusal("{").message.find("not JSON"), std::string::npos);
  EXPECT_EQ(Refusal(R"({"log": {}, "log": {}})").message,
            "log: the key stands twice in one object");
  EXPECT_EQ(Refusal(R"({"kv_cache": {"key": {}, "layers": [{"range": "0"},
      {"range": "1", "key": {"bits": 2, "bits": 2}}]}})")
                .param,
            "kv_cache.layers.1.key.bits");
  EXPECT_NE(Refusal(std::string(100, '[') + std::string(100, ']')).message.find("64 levels"),
            std::string::npos);
}

TEST(Options, PrefixesAreSharedUnlessSwitchedOffOrExact) {
  const auto shares = [](const std::string& kv_cache) {
    return Accepted(R"({"kv_cache": )" + kv_cache + "}").runner.engine.prefix_cache;
  };
  EXPECT_TRUE(shares(R"({"prefix_cache": true})"));
  EXPECT_FALSE(shares(R"({"prefix_cache": false})"));
  EXPECT_FALSE(shares(R"({"prefill": "exact"})"));
}

TEST(Options, WhatThisBuildCannotDoIsRefusedNotIgnored) {
  for (const std::string device : {"reference", "cuda"}) {
    const std::string backend = R"({"backend": {"device": ")" + device + R"(", )";
    EXPECT_EQ(Refusal(backend + R"("variant": "avx2"}})").param, "backend.variant");
    EXPECT_EQ(Refusal(backend + R"("threads": 2}})").param, "backend.threads");
    Accepted(backend + R"("threads": 1}})");
  }
  EXPECT_EQ(Refusal(R"({"scheduler": {"max_sequences": 64, "max_batch_tokens": 63}})").param,
            "scheduler.max_batch_tokens");
  EXPECT_EQ(Refusal(R"({"server": {"max_body": "2GiB"}})").param, "server.max_body");
}

TEST(Options, TheServersLimitsAreThoseOfTheHttpServerUnlessGiven) {
  const ServerOptions defaults = Accepted("{}").server;
  const HttpServerOptions http;
  EXPECT_EQ(defaults.max_connections, http.max_connections);
  EXPECT_EQ(defaults.max_body_bytes, http.max_body_bytes);
  EXPECT_EQ(defaults.max_header_bytes, http.max_header_bytes);
  EXPECT_EQ(defaults.header_timeout, http.header_timeout);
  EXPECT_EQ(defaults.read_timeout, http.read_timeout);
  EXPECT_EQ(defaults.write_timeout, http.write_timeout);
  EXPECT_EQ(defaults.keep_alive_timeout, http.keep_alive_timeout);
  EXPECT_TRUE(defaults.cors_origins.empty() && defaults.allowed_hosts.empty());
  EXPECT_EQ(defaults.api_key_file, "");

  const ServerOptions given = Accepted(R"({"server": {"api_key_file": "keys", "max_header": "2KiB",
      "header_timeout_seconds": 1, "read_timeout_seconds": 2, "write_timeout_seconds": 3,
      "keep_alive_seconds": 4, "drain_seconds": 5, "cors_origins": ["https://a.b:1", "*"],
      "allowed_hosts": ["gpu1.lan"],
      "key_limits": {"requests_per_minute": 6, "concurrent_requests": 7}}})")
                                  .server;
  EXPECT_EQ(given.api_key_file, "keys");
  EXPECT_EQ(given.max_header_bytes, 2048);
  EXPECT_EQ(given.header_timeout.count(), 1);
  EXPECT_EQ(given.read_timeout.count(), 2);
  EXPECT_EQ(given.write_timeout.count(), 3);
  EXPECT_EQ(given.keep_alive_timeout.count(), 4);
  EXPECT_EQ(given.drain_timeout.count(), 5);
  EXPECT_EQ(given.cors_origins, (std::vector<std::string>{"https://a.b:1", "*"}));
  EXPECT_EQ(given.allowed_hosts, std::vector<std::string>{"gpu1.lan"});
  EXPECT_EQ(given.key_limits.requests_per_minute, 6);
  EXPECT_EQ(given.key_limits.concurrent_requests, 7);
}

TEST(Options, ServerKeysThatCannotWorkAreRefused) {
  const auto param = [](const std::string& server) {
    return Refusal("{\"server\": {" + server + "}}").param;
  };
  EXPECT_EQ(param(R"("max_header": "1KB")"), "server.max_header");
  EXPECT_EQ(param(R"("max_header": "2MiB")"), "server.max_header");
  EXPECT_EQ(param(R"("read_timeout_seconds": 0)"), "server.read_timeout_seconds");
  EXPECT_EQ(param(R"("key_limits": {"requests_per_minute": 5})"), "server.key_limits");
  EXPECT_EQ(param(R"("key_limits": {"per_day": 5}, "api_keys": ["a"])"),
            "server.key_limits.per_day");
  for (const char* origin : {"a.example", "https://", "https://a/", "https://a b", ""}) {
    EXPECT_EQ(param("\"cors_origins\": [\"" + std::string(origin) + "\"]"),
              "server.cors_origins.0");
  }
  EXPECT_EQ(param(R"("allowed_hosts": ["a:80"])"), "server.allowed_hosts.0");
}

TEST(Options, MessagesNeverTellAKey) {
  for (const char* keys : {R"(["sk secret"])", R"(["secret\u0000"])", R"(["ok", "secret\u00e9"])",
                           R"("secret")", R"([["secret"]])", R"({"secret": 1})", R"([""])"}) {
    const Error error = Refusal(R"({"server": {"api_keys": )" + std::string(keys) + "}}");
    EXPECT_TRUE(error.param.starts_with("server.api_keys")) << error.param;
    EXPECT_EQ(error.message.find("secret"), std::string::npos) << error.message;
  }
}

TEST(Options, LayerOverridesCarryOnlyWhatTheyName) {
  const Options options = Accepted(R"({"kv_cache": {"layers": [
      {"range": "0-1", "key": {"bits": 8}}, {"range": "3", "value": {"mode": "hybrid"},
       "key": {"normalize": "off"}}]}})");
  const auto& layers = options.runner.kv_cache.layers;
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(layers[0].first_layer, 0);
  EXPECT_EQ(layers[0].last_layer, 1);
  EXPECT_EQ(layers[0].key.bits, 8);
  EXPECT_EQ(layers[0].key.mode, std::nullopt);
  EXPECT_EQ(layers[0].value.bits, std::nullopt);
  EXPECT_EQ(layers[0].normalize_keys, std::nullopt);
  EXPECT_EQ(layers[1].first_layer, 3);
  EXPECT_EQ(layers[1].last_layer, 3);
  EXPECT_EQ(layers[1].value.mode, QuantMode::kHybrid);
  EXPECT_EQ(layers[1].normalize_keys, false);

  EXPECT_EQ(Refusal(R"({"kv_cache": {"layers": [{"range": "3-1"}]}})").param,
            "kv_cache.layers.0.range");
  EXPECT_EQ(Refusal(R"({"kv_cache": {"layers": [{"range": "a"}]}})").param,
            "kv_cache.layers.0.range");
  EXPECT_EQ(Refusal(R"({"kv_cache": {"layers": [{"key": {}}]}})").param, "kv_cache.layers.0.range");
}

TEST(Options, OverridesReplaceKeysAndElements) {
  const Options options =
      Accepted(R"({"kv_cache": {"layers": [{"range": "0"}]}})",
               {"server.port=0", "model.alias=7", "kv_cache.layers.0.range=2-3",
                "kv_cache.layers.1.range=4", "kv_cache.layers.1.key.bits=16",
                "server.api_keys.0=secret=with=equals", "backend.deterministic=false"});
  EXPECT_EQ(options.server.port, 0);
  EXPECT_EQ(options.model.alias, "7");
  EXPECT_EQ(options.runner.kv_cache.layers[0].last_layer, 3);
  EXPECT_EQ(options.runner.kv_cache.layers[1].first_layer, 4);
  EXPECT_EQ(options.runner.kv_cache.layers[1].key.bits, 16);
  EXPECT_EQ(options.server.api_keys, std::vector<std::string>{"secret=with=equals"});
  EXPECT_FALSE(options.runner.backend.deterministic);

  EXPECT_EQ(Refusal("{}", {"kv_cache.key.bitz=3"}).param, "kv_cache.key.bitz");
  EXPECT_EQ(Refusal("{}", {"kv_cache.layers.1.range=0"}).param, "kv_cache.layers.1");
  EXPECT_EQ(Refusal("{}", {"server.port.x=0"}).param, "server.port.x");
  EXPECT_EQ(Refusal("{}", {"server.port=abc"}).param, "server.port");
  EXPECT_NE(Refusal("{}", {"server.port"}).message.find("key=value"), std::string::npos);
}

// Paths of all keys below an object of the schema.
std::vector<std::string> KeysOf(const nlohmann::json& schema, const std::string& path) {
  if (!schema.contains("properties")) return {path};
  std::vector<std::string> keys;
  for (const auto& [name, property] : schema["properties"].items()) {
    if (name == "$schema") continue;
    const std::vector<std::string> below =
        KeysOf(property, path.empty() ? name : path + "." + name);
    keys.insert(keys.end(), below.begin(), below.end());
  }
  return keys;
}

TEST(Options, TheReadmeNamesEveryKey) {
  const std::string readme = ReadAll(std::filesystem::path(INNERQ_SOURCE_DIR) / "README.md");
  const std::vector<std::string> keys = KeysOf(nlohmann::json::parse(kConfigSchema), "");
  EXPECT_GT(keys.size(), 40u);
  for (const std::string& key : keys) {
    EXPECT_NE(readme.find("`" + key + "`"), std::string::npos) << key;
  }
}

TEST(Options, OverridesThatAreNotUtf8AreRefused) {
  for (const char* text : {"model.alias=a\xff", "server.api_keys=[1, \xc3]", "\xe2\x82=1"}) {
    const auto options = ParseOptions(R"({"model": {"path": "p"}})", {text});
    ASSERT_FALSE(options.ok()) << text;
    EXPECT_EQ(options.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(options.error().message.find("UTF-8"), std::string::npos) << options.error().message;
  }
}

TEST(Options, OverridesAreJsonAsStrictAsAFile) {
  const Error twice = Refusal("{}", {R"(kv_cache.key={"bits": 3, "mode": "hybrid", "bits": 4})"});
  EXPECT_EQ(twice.param, "kv_cache.key.bits");
  EXPECT_NE(twice.message.find("kv_cache.key.bits: the key stands twice"), std::string::npos);
  EXPECT_EQ(Refusal("{}", {R"(kv_cache.layers=[{"range": "0", "range": "1"}])"}).param,
            "kv_cache.layers.0.range");
  const Error deep = Refusal("{}", {"server.api_keys=" + DeepJson()});
  EXPECT_EQ(deep.param, "server.api_keys");
  EXPECT_NE(deep.message.find("nests deeper"), std::string::npos) << deep.message;
  // Text stays text, whatever it looks like.
  EXPECT_EQ(Accepted("{}", {R"(model.alias={"a": 1, "a": 2})"}).model.alias, R"({"a": 1, "a": 2})");
}

TEST(Options, SizesKnowTheirUnitsAndOverflow) {
  EXPECT_EQ(*ParseSize("0B"), 0);
  EXPECT_EQ(*ParseSize("3KiB"), 3072);
  EXPECT_EQ(*ParseSize("2GB"), 2'000'000'000);
  EXPECT_EQ(*ParseSize("8388607TiB"), int64_t{8388607} << 40);
  for (const char* text : {"8388608TiB", "9223372036854775808B", "-1B", "1", "GiB", "1gib",
                           "1.5GiB", "1GiB ", " 1GiB", "+1B", "0x1B", ""}) {
    EXPECT_FALSE(ParseSize(text).ok()) << text;
  }
}

TEST(Options, ARelativeModelPathIsFoundBesideTheConfigurationOrAboveIt) {
  const TemporaryDirectory temporary;
  const auto& root = temporary.path();
  std::filesystem::create_directories(root / "configs");
  std::filesystem::create_directories(root / "models" / "tiny");
  std::ofstream(root / "configs" / "a.json") << R"({"model": {"path": "models/tiny"}})";
  std::ofstream(root / "b.json") << R"({"model": {"path": "models/tiny/"}})";
  std::ofstream(root / "c.json") << R"({"model": {"path": "models/none"}})";
  for (const char* file : {"configs/a.json", "b.json"}) {
    const auto options = LoadOptions(root / file, {});
    ASSERT_TRUE(options.ok()) << options.error().message;
    EXPECT_TRUE(std::filesystem::equivalent(options->model.path, root / "models" / "tiny"));
    EXPECT_EQ(options->model.alias, "tiny");
  }
  std::ofstream(root / "keys.txt") << "k\n";
  const auto keyed = LoadOptions(root / "configs" / "a.json", {"server.api_key_file=keys.txt"});
  ASSERT_TRUE(keyed.ok()) << keyed.error().message;
  EXPECT_TRUE(std::filesystem::equivalent(keyed->server.api_key_file, root / "keys.txt"));
  const auto keyless = LoadOptions(root / "b.json", {"server.api_key_file=none.txt"});
  ASSERT_FALSE(keyless.ok());
  EXPECT_EQ(keyless.error().param, "server.api_key_file");
  EXPECT_NE(keyless.error().message.find("none.txt"), std::string::npos);
  const auto absent = LoadOptions(root / "c.json", {});
  ASSERT_FALSE(absent.ok());
  EXPECT_EQ(absent.error().code, ErrorCode::kNotFound);
  EXPECT_NE(absent.error().message.find("models/none"), std::string::npos);
  EXPECT_NE(absent.error().message.find("in the working directory"), std::string::npos);
  EXPECT_EQ(LoadOptions(root / "none.json", {}).error().code, ErrorCode::kNotFound);
}

TEST(Options, APathThatLeadsNowhereIsToldAsWhatItIs) {
  const TemporaryDirectory temporary;
  const auto& root = temporary.path();
  const auto file = root / "a.json";
  std::ofstream(file) << "{}";
  std::filesystem::create_symlink("loop", root / "loop");  // may not be followed, by root either
  const auto message_of = [&](const std::string& key, const std::filesystem::path& path) {
    std::filesystem::create_directories(root / "models" / "demo");
    const auto options = LoadOptions(file, {key + "=" + path.string()});
    EXPECT_FALSE(options.ok()) << path;
    if (options.ok()) return std::string();
    EXPECT_EQ(options.error().code, ErrorCode::kNotFound);
    EXPECT_EQ(options.error().param, key);
    return options.error().message;
  };
  for (const char* key : {"model.path", "server.api_key_file"}) {
    EXPECT_NE(message_of(key, root / "loop").find("cannot look at"), std::string::npos) << key;
    const std::string absolute = message_of(key, root / "none");
    EXPECT_EQ(absolute, file.string() + ": " + key + ": no " + (root / "none").string());
  }
  EXPECT_NE(message_of("model.path", file).find("is not a directory"), std::string::npos);
  const auto unread = LoadOptions(root / "loop", {});
  ASSERT_FALSE(unread.ok());
  EXPECT_NE(unread.error().message.find("symbolic links"), std::string::npos)
      << unread.error().message;
}

}  // namespace
}  // namespace innerq
