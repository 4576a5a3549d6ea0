// Holds /openapi.json to the code that it describes. tests/client/test_schemathesis.py does the
// same from outside.
#include "server/openapi.h"

#include <gtest/gtest.h>

#include <cctype>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "server/service.h"
#include "tests/server/fake_model.h"

namespace innerq {
namespace {

using nlohmann::json;
using Names = std::set<std::string>;

const json& Document() {
  static const json document = json::parse(kOpenApi);
  return document;
}

// Follows a reference; siblings of "$ref" override.
json Resolve(json schema) {
  while (schema.contains("$ref")) {
    const std::string pointer = schema["$ref"].get<std::string>().substr(1);
    schema.erase("$ref");
    json target = Document().at(json::json_pointer(pointer));
    target.update(schema);
    schema = std::move(target);
  }
  return schema;
}

json Operation(const std::string& method, const std::string& path) {
  return Document().at("paths").at(path).at(method);
}

// The properties of a POST endpoint's body, resolved.
json BodyProperties(const std::string& path) {
  return Resolve(Operation(
      "post", path)["requestBody"]["content"]["application/json"]["schema"])["properties"];
}

Names Keys(const json& object) {
  Names keys;
  for (const auto& [key, value] : object.items()) keys.insert(key);
  return keys;
}

class OpenApiTest : public testing::Test {
 protected:
  void SetUp() override {
    service_.Open({.model = {.id = "m",
                             .created = 1,
                             .tokenizer = std::make_shared<ByteTokenizer>(),
                             .chat_template = std::make_shared<PlainTemplate>(),
                             .stop_token_ids = {kFakeEos}},
                   .cache = {},
                   .engine = ScriptedEngine()});
  }
  // A route's path as the document writes it.
  static std::string Documented(const HttpRoute& route) {
    return route.path.ends_with('*') ? route.path.substr(0, route.path.size() - 1) + "{model}"
                                     : route.path;
  }
  static std::string Lower(std::string method) {
    for (char& c : method) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return method;
  }
  HttpResponse Ask(const HttpRoute& route, const std::string& body, const std::string& key) {
    const HttpRequest request{.method = route.method,
                              .path = route.path,
                              .parameter = "m",
                              .body = body,
                              .id = "test",
                              .authorization = "",
                              .api_key = key,
                              .client_gone = [] { return false; }};
    if (route.admit) {
      if (HttpAdmission admission = route.admit(request); admission.refusal) {
        return *std::move(admission.refusal);
      }
    }
    return route.handle(request);
  }
  HttpResponse Post(const std::string& path, const json& body) {
    for (const HttpRoute& route : routes_) {
      if (route.path == path) return Ask(route, body.dump(), "secret");
    }
    ADD_FAILURE() << path;
    return {};
  }

  Access access_{{"secret"}};
  Service service_{"1.2.3", &access_};
  const std::vector<HttpRoute> routes_ = service_.Routes();
};

TEST_F(OpenApiTest, DescribesEveryRouteAndNoOther) {
  Names served, described;
  for (const HttpRoute& route : routes_) served.insert(Lower(route.method) + Documented(route));
  for (const auto& [path, item] : Document()["paths"].items()) {
    for (const auto& [method, operation] : item.items()) {
      if (method != "parameters") described.insert(method + path);
    }
  }
  EXPECT_EQ(described, served);
}

TEST_F(OpenApiTest, EveryReferenceLeadsSomewhere) {
  int count = 0;
  const auto visit = [&count](const json& node, const auto& self) -> void {
    if (node.is_object() && node.contains("$ref")) {
      ++count;
      const auto pointer = json::json_pointer(node["$ref"].get<std::string>().substr(1));
      EXPECT_TRUE(Document().contains(pointer)) << node;
    }
    for (const json& child : node) {
      if (child.is_structured()) self(child, self);
    }
  };
  visit(Document(), visit);
  EXPECT_GT(count, 100);
}

TEST_F(OpenApiTest, ItIsServedWordForWordEvenWhileLoading) {
  Service loading("1", &access_);
  int found = 0;
  for (const HttpRoute& route : loading.Routes()) {
    if (route.path != "/openapi.json") continue;
    ++found;
    EXPECT_EQ(Ask(route, "", "").body, kOpenApi);
  }
  EXPECT_EQ(found, 1);
}

TEST_F(OpenApiTest, KeysAreAskedForWhereItSaysSo) {
  for (const HttpRoute& route : routes_) {
    const json operation = Operation(Lower(route.method), Documented(route));
    const HttpResponse stranger = Ask(route, "", "wrong");
    EXPECT_EQ(stranger.status == 401, operation.contains("security")) << route.path;
    EXPECT_EQ(operation["responses"].contains("401"), operation.contains("security"));
    const HttpResponse known = Ask(route, "", "secret");
    EXPECT_EQ(known.status, route.method == "POST" ? 400 : 200) << route.path << known.body;
  }
}

TEST_F(OpenApiTest, DescribesEveryParameterThatIsReadAndNoOther) {
  const auto expect = [](const std::string& path, const std::vector<std::string_view>& read) {
    EXPECT_EQ(Keys(BodyProperties(path)), Names(read.begin(), read.end())) << path;
  };
  expect("/v1/completions", ApiParameterNames(/*chat=*/false));
  expect("/v1/chat/completions", ApiParameterNames(/*chat=*/true));
  expect("/tokenize", UtilityParameterNames(UtilityEndpoint::kTokenize));
  expect("/detokenize", UtilityParameterNames(UtilityEndpoint::kDetokenize));
  expect("/apply-template", UtilityParameterNames(UtilityEndpoint::kApplyTemplate));
}

TEST_F(OpenApiTest, UnknownNamesAreRefusedWhereItSaysSo) {
  for (const HttpRoute& route : routes_) {
    if (route.method != "POST") continue;
    EXPECT_EQ(Resolve(Operation("post", route.path)["requestBody"]["content"]["application/json"]
                                                   ["schema"])["additionalProperties"],
              false);
    const HttpResponse response = Post(route.path, {{"a_name_of_nobody", nullptr}});
    EXPECT_EQ(response.status, 400);
    EXPECT_EQ(json::parse(response.body)["error"]["param"], "a_name_of_nobody") << route.path;
  }
}

TEST_F(OpenApiTest, RangesAndNullsAreThoseOfTheCode) {
  const std::map<std::string, json> minimal = {
      {"/v1/completions", {{"model", "m"}, {"prompt", "a"}, {"max_tokens", 2}, {"seed", 1}}},
      {"/v1/chat/completions",
       {{"model", "m"},
        {"messages", {{{"role", "user"}, {"content", "a"}}}},
        {"max_tokens", 2},
        {"seed", 1},
        {"logprobs", true}}}};
  int checked = 0;
  for (const auto& entry : minimal) {
    const std::string& path = entry.first;
    const auto status = [&](const std::string& name, const json& value) {
      json request = entry.second;
      request[name] = value;
      ++checked;
      return Post(path, request).status;
    };
    const json properties = BodyProperties(path);
    for (const auto& [name, reference] : properties.items()) {
      const json schema = Resolve(reference);
      if (schema.value("type", json()) == "null") {
        EXPECT_EQ(status(name, nullptr), 200) << path << name;
        EXPECT_EQ(status(name, "x"), 400) << path << name;
      }
      // Of larger numbers the context, not the parameter, is the limit; 128 answers take long.
      const double highest = schema.value("maximum", 1e9);
      if (highest > 20) continue;
      const bool open = schema.contains("exclusiveMinimum");
      const double lowest = open ? schema["exclusiveMinimum"] : schema["minimum"];
      const auto number = [integer = schema["type"][0] == "integer"](double x) {
        return integer ? json(static_cast<int64_t>(x)) : json(x);
      };
      EXPECT_EQ(status(name, number(lowest)), open ? 400 : 200) << path << name;
      EXPECT_EQ(status(name, number(lowest - 1)), 400) << path << name;
      EXPECT_EQ(status(name, number(highest)), 200) << path << name;
      EXPECT_EQ(status(name, number(highest + 1)), 400) << path << name;
      EXPECT_EQ(status(name, nullptr), 200) << path << name;
      EXPECT_EQ(status(name, "1"), 400) << path << name;
    }
  }
  EXPECT_GT(checked, 100);
}

}  // namespace
}  // namespace innerq
