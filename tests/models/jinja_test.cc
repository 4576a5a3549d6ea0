#include "models/jinja.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/models/test_files.h"
#include "tests/models/test_time.h"

namespace innerq::jinja {
namespace {

using json = nlohmann::ordered_json;

constexpr Time kNow{.year = 2026, .month = 3, .day = 5, .hour = 14, .minute = 7, .second = 9};

Dict Variables(const json& context) { return ParseJson(context.dump(), 64).value().dict(); }

// The output, or "error: " and why there is none.
std::string Rendered(std::string_view source, const json& context = json::object(),
                     const Limits& limits = {}) {
  const Result<Template> parsed = Template::Parse(source, limits);
  if (!parsed.ok()) return "error: " + parsed.error().message;
  const Result<Text> out = parsed.value().Render(Variables(context), kNow, limits);
  return out.ok() ? out.value().bytes : "error: " + out.error().message;
}

struct Case {
  const char* source;
  const char* expected;
};

void Expect(std::initializer_list<Case> cases, const json& context = json::object()) {
  for (const Case& one : cases)
    EXPECT_EQ(Rendered(one.source, context), one.expected) << one.source;
}

TEST(JinjaTest, ControlsWhitespace) {
  Expect({{"a\n", "a"},
          {"a\n\n", "a\n"},
          {"a\r\nb\rc", "a\nb\nc"},
          {"{% if true %}\n  x\n{% endif %}\ny", "  x\ny"},
          {"a\n   {% if true %}b{% endif %}\nc", "a\nbc"},
          {"a\n   {%+ if true %}b{% endif +%}\nc", "a\n   b\nc"},
          {"a \n {%- if true -%} \n b \n {%- endif -%} \n c", "abc"},
          {"a {{- 1 -}} b", "a1b"},
          {"a  {# note #}\nb", "a  b"},
          {"a\n  {#- note -#}\n b", "ab"},
          {"  {{ 1 }}\n {{ 2 }}", "  1\n 2"},
          {"{% raw %}{{ x }}{% endraw %}", "{{ x }}"},
          {"a {%- raw -%} {% if %} {%- endraw -%} b", "a{% if %}b"},
          {"{{ '}}' }}{{ {'a': {'b': 1}} }}", "}}{'a': {'b': 1}}"}});
}

TEST(JinjaTest, RunsLoops) {
  Expect(
      {{"{% for i in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }} "
        "{% endfor %}",
        "10TrueFalse 21FalseFalse 32FalseTrue "},
       {"{% for i in 'ab' %}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{% endfor %}",
        "221210"},
       {"{% for i in [1,2] %}[{{ loop.previtem }}|{{ loop.nextitem }}]{% endfor %}", "[|2][1|]"},
       {"{% for i in [] %}x{% else %}none{% endfor %}", "none"},
       {"{% for i in range(6) if i is odd %}{{ i }}/{{ loop.length }} {% endfor %}",
        "1/3 3/3 5/3 "},
       {"{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}", "a=1;b=2;"},
       {"{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}"
        "{% endif %}{{ i }}{% endfor %}",
        "02"},
       {"{% set x = 1 %}{% for i in [1,2] %}{{ x }}{% set x = x + i %}{% endfor %}{{ x }}", "111"},
       {"{% set ns = namespace(stop=false) %}{% for i in range(5) if not ns.stop %}{{ i }}"
        "{% if i == 2 %}{% set ns.stop = true %}{% endif %}{% endfor %}",
        "012"},
       {"{% for a, (b) in [[1, 2]] %}{% endfor %}", "error: line 1: expected in, found ("},
       {"{% for a, b in [[1, 2, 3]] %}{% endfor %}",
        "error: line 1: expected 2 values to assign, found 3"}});
}

TEST(JinjaTest, LoopsCycleAndKnowWhatChanged) {
  Expect({{"{% for i in range(5) %}{{ loop.cycle('a', 'b', 3) }}{% endfor %}", "ab3ab"},
          {"{% for i in [1, 1, 2, 2.0, '2'] %}{{ loop.changed(i) }} {% endfor %}",
           "True False True False True "},
          {"{% for i in 'ab' %}{{ loop.changed() }}{{ loop.changed(1, i) }}{% endfor %}",
           "TrueTrueTrueTrue"},
          {"{% for i in 'ab' %}{% set o = loop %}{% for j in 'cd' %}{{ o.cycle(1, 2) }}"
           "{{ o.changed(i) }}{% endfor %}{% endfor %}",
           "1True1False2True2False"},
          {"{% for i in 'ab' %}{{ loop.changed([loop]) }}{% endfor %}", "TrueFalse"},
          {"{% for i in 'ab' %}{{ loop.changed(loop) }}{{ 1 + i }}{% endfor %}",  // nothing leaks
           "error: line 1: the operator + expects other values, found int and str"},
          {"{% for i in [1] %}{{ loop.cycle() }}{% endfor %}",
           "error: line 1: cycle expects values, found none"},
          {"{% for i in [1] %}{{ loop.cycle(x=1) }}{% endfor %}",
           "error: line 1: cycle does not expect the argument x"},
          {"{% set n = namespace() %}{% for i in [1] %}{% set n.l = loop %}{% endfor %}\n"
           "{{ n.l.cycle(1) }}",
           "error: line 2: the loop has ended; expected loop.cycle inside"}});
}

TEST(JinjaTest, UnknownMethodsAreErrorsWhenTheyAreReached) {
  const json context = {{"d", {{"f", 1}}}};
  Expect({{"{% if false %}{{ d.pop('f', default=1) }}{% endif %}ok", "ok"},
          {"{{ d.get('f') or d.setdefault('f', 2) }}", "1"},
          {"a\n{{ d.pop('f') }}", "error: line 2: the method 'pop' of dict is not supported"},
          {"{{ [1].append(2) }}", "error: line 1: the method 'append' of list is not supported"},
          {"{{ d.cycle(1) }}", "error: line 1: the method 'cycle' of dict is not supported"},
          {"{{ y.pop() }}", "error: line 1: 'y' is undefined"},
          {"{{ d.pop(1 }}", "error: line 1: unexpected }"}},
         context);
}

TEST(JinjaTest, SetsAndScopes) {
  Expect({{"{% set a, b = 1, 2 %}{{ a }}{{ b }}", "12"},
          {"{% set x %}a{{ 1 }}{% endset %}[{{ x }}]", "[a1]"},
          {"{% set x | trim | upper %} a {% endset %}[{{ x }}]", "[A]"},
          {"{% set ns = namespace({'a': 1}, b=2) %}{% for i in [1,2] %}{% set ns.b = ns.b + i %}"
           "{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c is defined }}",
           "15False"},
          {"{% if true %}{% set x = 1 %}{% endif %}{{ x }}", "1"},
          {"{% set d = 1 %}{% set d.x = 2 %}",
           "error: line 1: expected a namespace to set d.x in, found int"},
          {"{% macro m(a, b='-', c=a) %}{{ a }}{{ b }}{{ c }};{% endmacro %}{{ m(1) }}"
           "{{ m(1, c=3) }}{{ m(b=2, a=1) }}",
           "1-1;1-3;121;"},
          {"{% macro m() %}{{ i is defined }}{% endmacro %}{% for i in [1] %}{{ m() }}{% endfor %}",
           "False"},
          {"{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
           "3210"},
          {"{% generation %}a{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "aFalse"}});
}

TEST(JinjaTest, ComputesAsPython) {
  Expect(
      {{"{{ 7 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }}",
        "3.5 3 -4 2 1024 0.5"},
       {"{{ 1 + 2 * 3 ~ 'x' ~ 1.0 }}",
        "error: line 1: the operator + expects other values, "
        "found int and str"},
       {"{{ 'x' ~ 1.0 ~ none ~ true }}", "x1.0NoneTrue"},
       {"{{ 1e16 }} {{ 1e15 }} {{ 0.1 }} {{ 1e-5 }} {{ 0.0001 }}",
        "1e+16 1000000000000000.0 "
        "0.1 1e-05 0.0001"},
       {"{{ 1 < 2 < 3 }}{{ 1 == 1.0 }}{{ 'a' < 'b' }}{{ [1, 2] < [1, 3] }}", "TrueTrueTrueTrue"},
       {"{{ 'b' in 'abc' }}{{ 1 not in [2] }}{{ 'k' in {'k': 1} }}", "TrueTrueTrue"},
       {"{{ '' or 'x' }}{{ 0 and 1 }}{{ not [] }}", "x0True"},
       {"{{ 'a' if false }}|{{ 'a' if 1 else 'b' }}", "|a"},
       {"{{ [1, 2, 3][1:] }}{{ 'hello'[::2] }}{{ 'abc'[-1] }}{{ (1, 2)[:-1] }}", "[2, 3]hloc(1,)"},
       {"{{ 'ab' * 2 }}{{ [0] * 2 }}{{ [1] + [2] }}", "abab[0, 0][1, 2]"},
       {"{{ -1 | abs }}{{ (-1) ** 2 }}{{ true + 1 }}", "112"},
       {"{{ 9223372036854775807 + 1 }}",
        "error: line 1: the operator + expects a result of 64 bits, found a larger one"},
       {"{{ ['a\\n', \"it's\", none, true, 1.5, (1,), {}] }}",
        "['a\\n', \"it's\", None, True, 1.5, (1,), {}]"},
       {"{{ 'a' 'b' \"\\u00e9\\x41\\q\" }}",
        "ab\xc3\xa9"
        "A\\q"}});
}

TEST(JinjaTest, TreatsUndefinedAsJinja2) {
  Expect({{"[{{ x }}]{{ x is defined }}{{ x | default('d') }}{{ x | length }}", "[]Falsed0"},
          {"{% for i in x %}{% else %}e{% endfor %}{{ [x] }}", "e[Undefined]"},
          {"{{ d.a is undefined }}{{ d['a'] is none }}", "TrueFalse"},
          {"\n{{ x.y }}", "error: line 2: 'x' is undefined"},
          {"{{ d.a.b }}", "error: line 1: dict has no attribute 'a'"},
          {"{{ x + 1 }}", "error: line 1: 'x' is undefined"}},
         {{"d", json::object()}});
}

TEST(JinjaTest, AppliesFilters) {
  Expect(
      {{"{{ '  a ' | trim }}{{ 'xax' | trim('x') }}", "aa"},
       {"{{ 'añ' | length }}{{ [1] | count }}", "21"},
       {"{{ 'é' | upper }}{{ 'ÀB' | lower }}{{ 'a-b c' | title }}{{ 'aB' | capitalize }}",
        "ÉàbA-B CAb"},
       {"{{ '' | default('x') }}{{ '' | default('x', true) }}{{ none | d(1, boolean=true) }}",
        "x1"},
       {"{{ [1, 'a'] | join(', ') }}{{ [{'n': 1}, {'n': 2}] | join('+', attribute='n') }}",
        "1, a1+2"},
       {"{{ 'ab' | list }}{{ [1, 2] | first }}{{ [1, 2] | last }}", "['a', 'b']12"},
       {"{{ 'aaa' | replace('a', 'b', 2) }}{{ 12 | string }}{{ ' 12 ' | int }}{{ 'x' | int(7) "
        "}}{{ '1.5' | float }}",
        "bba121271.5"},
       {"{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}", "a1"},
       {"{{ [{'a': 1}, {}] | map(attribute='a', default=0) | list }}{{ ['a'] | map('upper') | "
        "join }}",
        "[1, 0]A"},
       {"{{ none | map('upper') | list }}{{ 0 | map(attribute='a') | list }}"
        "{{ false | select | list }}{{ '' | reject('odd') | list }}"
        "{{ none | selectattr('a') | list }}{{ 0.0 | rejectattr('a', 'eq', 1) | list }}",
        "[][][][][][]"},
       {"{{ 1 | map('upper') | list }}",
        "error: line 1: expected something to iterate over, found int"},
       {"{{ [1, 2, 3] | select('odd') | list }}{{ [0, 1] | reject | list }}", "[1, 3][0]"},
       {"{{ [{'r': 'a'}, {'r': 'b'}] | selectattr('r', 'equalto', 'b') | list }}", "[{'r': 'b'}]"},
       {"{{ [{'r': 1}, {}] | rejectattr('r', 'defined') | list }}", "[{}]"},
       {"{{ ['b', 'A', 'c'] | sort | join }}{{ [1, 3, 2] | sort(reverse=true) }}", "Abc[3, 2, 1]"},
       {"{{ [1, 2] | reverse | list }}{{ 'ab' | reverse }}{{ ['a', 'A', 'b'] | unique | list }}",
        "[2, 1]ba['a', 'b']"},
       {"{{ 2.5 | round }}{{ 2.675 | round(2) }}{{ 2.1 | round(0, 'ceil') }}", "2.02.673.0"},
       {"{{ '<' | safe }}", "<"}});
}

TEST(JinjaTest, OrdersAndSumsCollections) {
  Expect(
      {{"{% for k, v in {'b': 1, 'A': 2, 'a': 0} | dictsort %}{{ k }}{{ v }} {% endfor %}",
        "A2 a0 b1 "},
       {"{{ {'b': 1, 'A': 2} | dictsort(true, 'value', reverse=true) }}", "[('A', 2), ('b', 1)]"},
       {"{{ [1] | dictsort }}", "error: line 1: dictsort expects a dict, found list"},
       {"{{ {} | dictsort(by='x') }}",
        "error: line 1: dictsort expects by to be key or value, found x"},
       {"{{ [3, 1, 2] | min }}{{ [3, 1, 2] | max }}{{ ['b', 'A'] | min }}{{ [] | max }}", "13A"},
       {"{{ [{'n': 2}, {'n': 1}] | min(attribute='n') }}", "{'n': 1}"},
       {"{{ [1, 'a'] | max }}",
        "error: line 1: expected two numbers, strings or lists to order, found str and int"},
       {"{{ [1, 2.5] | sum }}{{ [{'n': 2}, {'n': 3}] | sum('n', 10) }}{{ [] | sum }}", "3.5150"},
       {"{{ [[1], [2]] | sum(start=[]) }}", "[1, 2]"}});
}

TEST(JinjaTest, IndentsLines) {
  Expect({{"{{ 'a\nb\n\nc' | indent }}", "a\n    b\n\n    c"},
          {"{{ 'a\nb\n' | indent(2) }}|", "a\n  b\n|"},
          {"{{ 'a\n\nb' | indent(1, true, true) }}", " a\n \n b"},
          {"{{ 'a\nb' | indent('> ', first=true) }}", "> a\n> b"},
          {"{{ '' | indent(first=true) }}|", "    |"},
          {"{{ 'a' | indent(1001) }}", "error: line 1: indent expects a width of at most 1000"}});
}

TEST(JinjaTest, CallBlocksGiveMacrosAText) {
  Expect({{"{% macro m(a) %}<{{ caller() }}{{ a }}{{ caller() }}>{% endmacro %}"
           "{% for i in [1, 2] %}{% call m(i + 1) %}[{{ i }}{{ a is defined }}]{% endcall %}"
           "{% endfor %}",
           "<[1False]2[1False]><[2False]3[2False]>"},
          {"{% macro i() %}({{ caller() }}){% endmacro %}"
           "{% macro o() %}{% call i() %}{{ caller() }}!{% endcall %}{% endmacro %}"
           "{% call o() %}x{% endcall %}",
           "error: line 1: 'caller' is undefined"},
          {"{% macro m() %}{{ caller() }}{% endmacro %}\n{{ m() }}",
           "error: line 1: 'caller' is undefined"},
          {"{% macro m() %}{% endmacro %}{% call m() %}x{% endcall %}",
           "error: line 1: macro m calls no caller()"},
          {"{% call x %}{% endcall %}", "error: line 1: a call block expects a macro's call"},
          {"{% call range(2) %}{% endcall %}",
           "error: line 1: a call block expects a macro, found function"},
          {"{{ caller() }}", "error: line 1: the variable caller is not supported"}});
}

TEST(JinjaTest, ScopesNamesByWith) {
  Expect({{"{% set x = 1 %}{% with x = 2, y = x %}{{ x }}{{ y }}{% set z = 3 %}{% endwith %}"
           "{{ x }}{{ y is defined }}{{ z is defined }}",
           "211FalseFalse"},
          {"{% with %}a{% endwith %}", "a"},
          {"{% for i in [1, 2, 3] %}{% with j = i %}{% if j == 2 %}{% break %}{% endif %}{{ j }}"
           "{% endwith %}{% endfor %}",
           "1"},
          {"{% with x %}{% endwith %}", "error: line 1: expected =, found %}"}});
}

TEST(JinjaTest, FilterBlocksPrintTheirTextThroughFilters) {
  Expect(
      {{"{% filter upper %}a{{ 1 }}b{% endfilter %}c", "A1Bc"},
       {"{% filter trim | replace('a', 'b') %} a {% endfilter %}|", "b|"},
       {"{% set x = 1 %}{% filter upper %}{% set x = 2 %}{% endfilter %}{{ x }}", "1"},
       {"{% for i in 'ab' %}{% filter upper %}{{ i }}{% endfilter %}{% endfor %}", "AB"},
       {"\n{% filter length %}a{% endfilter %}",
        "error: line 2: expected text of the filters of a block, found int"},
       {"{% filter %}a{% endfilter %}", "error: line 1: expected the name of a filter, found %}"},
       {"{% filter wordwrap %}{% endfilter %}",
        "error: line 1: the filter \"wordwrap\" is not supported"},
       {"{% filter upper %}a",
        "error: line 1: expected endfilter for the block that begins in line 1, found the end of "
        "the template"},
       {"{% for i in 'ab' %}{% filter upper %}{% break %}{% endfilter %}{% endfor %}",
        "error: line 1: break expects a for around it"}});
}

TEST(JinjaTest, WritesJsonAsTransformers) {
  const json context = {
      {"x", {{"a", {1, 1.0, nullptr, true}}, {"b", "é\"\\\n\t\x01/<'"}, {"c", json::array()}}}};
  Expect({{"{{ x | tojson }}",
           "{\"a\": [1, 1.0, null, true], \"b\": \"é\\\"\\\\\\n\\t\\u0001/<'\", \"c\": []}"},
          {"{{ {'a': [1, {'b': 2}], 'c': {}} | tojson(indent=2) }}",
           "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ],\n  \"c\": {}\n}"},
          {"{{ {'b': 'é😀', 'a': 1} | tojson(ensure_ascii=true, separators=(',', ':'), "
           "sort_keys=true) }}",
           "{\"a\":1,\"b\":\"\\u00e9\\ud83d\\ude00\"}"},
          {"{{ nothing | tojson }}",
           "error: line 1: tojson: expected a plain value, found Undefined"}},
         context);
}

TEST(JinjaTest, AppliesTests) {
  Expect({{"{{ 'a' is string }}{{ 1 is number }}{{ true is number }}{{ true is integer }}",
           "TrueTrueTrueFalse"},
          {"{{ {} is mapping }}{{ [] is sequence }}{{ 'a' is iterable }}{{ 1 is iterable }}",
           "TrueTrueTrueFalse"},
          {"{{ true is boolean }}{{ true is true }}{{ 1 is true }}{{ false is false }}",
           "TrueTrueFalseTrue"},
          {"{{ 1 is eq 1 }}{{ 1 is ne(1) }}{{ 1 is lt 2 }}{{ 1 is gt 2 }}{{ 1 is in [1] }}",
           "TrueFalseTrueFalseTrue"},
          {"{{ 3 is odd }}{{ 3 is even }}{{ 9 is divisibleby 3 }}{{ none is none }}",
           "TrueFalseTrueTrue"},
          {"{{ x is not defined and 1 is not none }}", "True"}});
}

TEST(JinjaTest, CallsMethodsAndFunctions) {
  Expect(
      {{"{{ ' a '.strip() }}{{ 'xa'.lstrip('x') }}{{ 'ax'.rstrip('x') }}|", "aaa|"},
       {"{{ 'a,b,c'.split(',') }}{{ 'a,b,c'.split(',', 1)[-1] }}{{ 'a,b,c'.rsplit(',', 1)[0] }}",
        "['a', 'b', 'c']b,ca,b"},
       {"{{ ' a  b '.split() }}{{ ' a  b c '.split(none, 1) }}{{ ' a b  c '.rsplit(none, 1) }}",
        "['a', 'b']['a', 'b c '][' a b', 'c']"},
       {"{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}", "TrueTrue"},
       {"{{ 'aB'.upper() }}{{ 'aB'.lower() }}{{ \"it's\".title() }}{{ 'aa'.replace('a', 'b') }}",
        "ABabIt'Sbb"},
       {"{{ ','.join(['a', 'b']) }}{{ 'éab'.find('b') }}{{ 'a'.find('z') }}", "a,b2-1"},
       {"{{ {'a': 1}.get('a') }}{{ {}.get('a') }}{{ {}.get('a', 2) }}", "1None2"},
       {"{{ {'a': 1}.keys() | list }}{{ {'a': 1}.values() | list }}{{ {'a': 1}.items() }}",
        "['a'][1]dict_items([('a', 1)])"},
       {"{{ range(3) | list }}{{ range(5, 0, -2) | list }}", "[0, 1, 2][5, 3, 1]"},
       {"{{ strftime_now('%d %b %Y %H:%M:%S %A %j %-d') }}", "05 Mar 2026 14:07:09 Thursday 064 5"},
       {"a\n{{ raise_exception('no ' ~ 1) }}", "error: line 2: no 1"}});
  const auto parsed = Template::Parse("{{ strftime_now is defined }}");
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(parsed.value().Render({}).value().bytes, "False");
}

TEST(JinjaTest, RefusesAtParseWithLineAndName) {
  Expect(
      {{"a\n{% include 'x' %}",
        "error: line 2: the statement include is not supported; expected if, for, set, macro, "
        "call, with, filter, generation, break, continue or raw"},
       {"{{ x | wordwrap }}", "error: line 1: the filter \"wordwrap\" is not supported"},
       {"\n\n{{ x is sameas y }}", "error: line 3: the test \"sameas\" is not supported"},
       {"{{ lipsum() }}", "error: line 1: the function lipsum is not supported"},
       {"{{ '%s' % 1 }}", "error: line 1: the operator % on a string is not supported"},
       {"{{ x | map('wordwrap') }}", "error: line 1: the filter \"wordwrap\" is not supported"},
       {"{{ x | tojson(color=1) }}", "error: line 1: tojson does not expect the argument color"},
       {"{{ x | replace('a') }}", "error: line 1: replace expects the argument new, found none"},
       {"{% for x in y recursive %}{% endfor %}",
        "error: line 1: recursive in a for is not supported"},
       {"{% if x %}\n",
        "error: line 1: expected endif for the block that begins in line 1, "
        "found the end of the template"},
       {"{% endif %}", "error: line 1: found endif, which ends no open block"},
       {"{{ (1 }}", "error: line 1: unexpected }"},
       {"{{ 1 +", "error: line 1: expected }}, found the end of the template"},
       {"{{ 'a }}", "error: line 1: expected ' to end the string, found the end of the template"},
       {"{{ a ! b }}", "error: line 1: unexpected character '!'"},
       {"{% break %}", "error: line 1: break expects a for around it"},
       {"{{ }}", "error: line 1: expected an expression, found }}"}});
}

TEST(JinjaTest, FindsAndCutsFromBothEnds) {
  Expect({{"{{ 'aXbXc'.rsplit('X', 1) }}{{ 'aXbXc'.split('X', 1) }}", "['aXb', 'c']['a', 'bXc']"},
          {"{{ 'aaa'.rsplit('aa') }}{{ 'aaa'.split('aa') }}", "['a', '']['', 'a']"},
          {"{{ ''.rsplit('a') }}{{ 'a'.rsplit('ab') }}", "['']['a']"},
          {"{{ 'abcab'.rfind('ab') }}{{ '\u00e9-\u00e9'.rfind('\u00e9') }}{{ 'ab'.rfind('') }}",
           "322"},
          {"{{ 'abcab'.find('ab') }}{{ 'ab'.find('') }}{{ 'ab'.rfind('abc') }}", "00-1"},
          {"{{ '\u00e9\u00e8x\u00e9'.strip('\u00e9\u00e8') }}", "x"}});
}

TEST(JinjaTest, KeysThatAreEqualAreOne) {
  Expect({{"{{ {1: 'a', true: 'b', 1.0: 'c'} }}", "{1: 'c'}"},
          {"{{ {0: 1}[-0.0] }}{{ {0.5: 2}.get(0.5) }}{{ {none: 3}[none] }}", "123"},
          {"{{ 2**53 + 1 == 2.0**53 }} {{ 2.0**53 in {2**53 + 1: 1} }}", "False False"},
          {"{{ 'a' in {'a': 1} }} {{ '1' in {1: 1} }} {{ 1 in {'1': 1} }}", "True False False"},
          {"{% set d = dict({'a': 1}, b=2) %}{{ d['a'] }}{{ d.b }}{{ dict(d, a=3) }}",
           "12{'a': 3, 'b': 2}"}});
}

TEST(JinjaTest, BoundsNames) {
  const std::string name(256, 'a');
  EXPECT_EQ(Rendered("{{ " + name + " }}{{ x." + name + " }}", {{"x", 1}}), "");
  EXPECT_EQ(Rendered("{{ x." + name + "a }}"),
            "error: line 1: expected a name of at most 256 bytes, found 257");
  std::string params = "p";
  for (int i = 1; i < 255; ++i) params += ", p" + std::to_string(i);
  EXPECT_EQ(Rendered("{% macro f(" + params + ") %}a{% endmacro %}{{ f() }}"), "a");
  EXPECT_EQ(Rendered("{% macro f(" + params + ", q) %}{% endmacro %}"),
            "error: line 1: macro f expects at most 255 parameters");
}

TEST(JinjaTest, BoundsDepth) {
  const auto repeat = [](const std::string& what, int times) {
    std::string out;
    for (int i = 0; i < times; ++i) out += what;
    return out;
  };
  for (const int times : {1000, 50'000}) {
    for (const std::string& source :
         {"{{ " + repeat("(", times) + "1" + repeat(")", times) + " }}",
          "{{ " + repeat("[", times) + repeat("]", times) + " }}",
          "{{ " + repeat("not ", times) + "1 }}", "{{ " + repeat("-", times) + "1 }}",
          "{{ 1" + repeat(" + 1", times) + " }}", "{{ x" + repeat(".x", times) + " }}",
          "{{ x" + repeat("|list", times) + " }}", "{{ " + repeat("1 if 1 else ", times) + "1 }}",
          repeat("{% if 1 %}", times)}) {
      EXPECT_EQ(Rendered(source),
                "error: line 1: expected nesting of at most 300 levels, found more")
          << source.substr(0, 20);
    }
  }
  EXPECT_EQ(Rendered("{{ 1" + repeat(" + 1", 250) + " }}"), "251");
  EXPECT_EQ(Rendered("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}"),
            "error: line 1: expected at most 600 levels of nesting while rendering, found more");
  EXPECT_EQ(
      Rendered("{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}"
               "{% endfor %}"),
      "error: line 1: expected at most 64 lists or dicts within each other, found more");
}

TEST(JinjaTest, BoundsStepsAndOutput) {
  const std::string steps = "error: line 1: expected at most 4000000 steps, found more";
  const std::string loop = "{% for a in range(100000) %}";
  EXPECT_EQ(Rendered(loop + loop + "{% endfor %}{% endfor %}"), steps);
  const std::string twice = "{% set ns = namespace(x='ab', l=[1]) %}{% for i in range(60) %}";
  EXPECT_EQ(Rendered(twice + "{% set ns.x = ns.x + ns.x %}{% endfor %}"),
            "error: line 1: expected texts of at most 16777216 bytes, found more");
  EXPECT_EQ(Rendered(twice + "{% set ns.l = ns.l + ns.l %}{% endfor %}"), steps);
  EXPECT_EQ(Rendered(twice + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}"), steps);
  EXPECT_EQ(Rendered(twice + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l == ns.l }}"), steps);
  EXPECT_EQ(Rendered("{{ 'a' * 10000000000 }}"),
            "error: line 1: expected texts of at most 16777216 bytes, found more");
  EXPECT_EQ(Rendered("{{ [1] * 10000000000 }}"), steps);
  EXPECT_EQ(Rendered("{{ range(200000) }}"),
            "error: line 1: range expects at most 100000 elements");
  const Limits small{.max_output_bytes = 10};
  EXPECT_EQ(Rendered("{% for i in range(20) %}x{% endfor %}", json::object(), small),
            "error: line 1: expected an output of at most 10 bytes, found more");
  EXPECT_EQ(Rendered(std::string(50, 'x'), json::object(), Limits{.max_source_bytes = 49}),
            "error: expected a template of at most 49 bytes, found 50");
}

// A step is short work, whatever texts, keys and lists a template makes for it: each of these does
// one thing until its steps are spent.
TEST(JinjaTest, StepsBoundTime) {
  constexpr double kSeconds = 2.5 * kSlowdown;  // a fourth of what all steps may take
#if defined(INNERQ_SANITIZED)
  const Limits limits{.max_steps = 20'000};
#else
  const Limits limits{.max_steps = 1'000'000};
#endif
  const std::string texts =
      "{% set one = 'a' * 60 %}{% set many = 'a' * 1000000 %}"
      "{% set part = 'b' + 'a' * 199 %}{% set long = 'a' * 5000 + 'b' + 'a' * 5000 %}"
      "{% set odd = '\\x01' * 200000 %}{% set set = 'b' * 100000 %}"
      "{% set r = range(100000) %}{% set pairs = {many: 1, many + 'b': 2} %}"
      "{% set deep = [[[[[[[[[[[[[[[[[[[[odd]]]]]]]]]]]]]]]]]]]] %}";
  std::string numbers = "{% set numbers = {";
  for (int i = 0; i < 5000; ++i) numbers += std::to_string(i) + ": 0, ";
  numbers += "} %}";
  constexpr const char* kExpressions[] = {"long in many",
                                          "part in many",
                                          "many.find(long)",
                                          "many.find(part)",
                                          "many.rfind(long)",
                                          "many.rfind(part)",
                                          "many.split(long)",
                                          "many.split(part)",
                                          "many.rsplit(long)",
                                          "many.rsplit(part)",
                                          "many.replace(long, '')",
                                          "many | replace(part, '')",
                                          "many.count(long)",
                                          "many.count(part)",
                                          "one.strip(set)",
                                          "one | trim(set)",
                                          "many.strip('a')",
                                          "many.strip()",
                                          "(' ' * 1000000).strip()",
                                          "many[0]",
                                          "many[::-1]",
                                          "many[:-1]",
                                          "many | length",
                                          "many | title",
                                          "many | upper",
                                          "many.capitalize()",
                                          "many.splitlines()",
                                          "many.split()",
                                          "many.startswith((one,) * 100000)",
                                          "numbers[-1]",
                                          "numbers.get(-1)",
                                          "-1 in numbers",
                                          "0.5 in numbers",
                                          "none in numbers",
                                          "pairs[many]",
                                          "pairs.get(many)",
                                          "many in pairs",
                                          "{many: 1}",
                                          "{many: 1}[long]",
                                          "{}[odd]",
                                          "namespace(a=1)[many]",
                                          "r | sum",
                                          "r | max",
                                          "r | map(attribute=many) | list",
                                          "([many] * 1000) | map(attribute=0) | list",
                                          "r | join(attribute=many)",
                                          "r | selectattr(many) | list",
                                          "deep ~ ''",
                                          "deep | string",
                                          "deep | tojson",
                                          "odd | tojson",
                                          "deep in [deep, deep]",
                                          "deep == deep",
                                          "deep in deep",
                                          "[r, r] | sort",
                                          "r | unique",
                                          "'a' * 1000000",
                                          "many | indent",
                                          "many ~ many",
                                          "dict(pairs, a=1)",
                                          "many | int",
                                          "r | first",
                                          "loop.cycle(many, 1)",
                                          "loop.changed(many ~ loop.index0)",
                                          "loop.changed(deep)"};
  for (const char* expression : kExpressions) {
    const double begin = ThreadSeconds();
    const std::string out =
        Rendered(texts + numbers + "{% for i in r %}{% for j in r %}{% set x = " + expression +
                     " %}{% endfor %}{% endfor %}",
                 json::object(), limits);
    const double seconds = ThreadSeconds() - begin;
    EXPECT_TRUE(out.starts_with("error: line 1: expected at most " +
                                std::to_string(limits.max_steps) + " steps"))
        << expression << ": " << out.substr(0, 100);
    EXPECT_TRUE(seconds <= kSeconds) << expression << ": " << seconds << " s";
  }
}

// The output's segments, each in T() if it is trusted, else in U().
std::string WithTrust(std::string_view source, const json& context) {
  const Result<Template> parsed = Template::Parse(source);
  if (!parsed.ok()) return "error: " + parsed.error().message;
  const Result<Text> text = parsed.value().Render(Variables(context), kNow);
  if (!text.ok()) return "error: " + text.error().message;
  std::string out;
  for (const TextSegment& segment : text.value().Segments()) {
    out += segment.trusted ? "T(" + segment.text + ")" : "U(" + segment.text + ")";
  }
  return out;
}

TEST(JinjaTest, TellsTemplateFromContext) {
  EXPECT_EQ(Rendered("{{ m.trim() }}", {{"m", " a "}}),  // a filter, not a method
            "error: line 1: the method 'trim' of str is not supported");
  EXPECT_EQ(WithTrust("<s>{{ '[I]' + m | trim + '[/I]' }}{{ m[1:3] ~ '|' ~ m.replace('a', 'b') }}",
                      {{"m", " <s>a "}}),
            "T(<s>[I])U(<s>a)T([/I])U(<s)T(|)U( <s>)T(b)U( )");
}

TEST(JinjaTest, ArgumentsFromContextAreNotTheTemplates) {
  const json context = {{"m", "<s>"}};
  const auto trust = [&](std::string_view source) { return WithTrust(source, context); };
  EXPECT_EQ(trust("{{ strftime_now(m) }}"), "U(<s>)");
  EXPECT_EQ(trust("{{ strftime_now('%Y') }}"), "T(2026)");
  EXPECT_EQ(trust("{{ [1, 2] | tojson(separators=(m, ':')) }}"), "U([1<s>2])");
  EXPECT_EQ(trust("{{ {'a': 1} | tojson(separators=(',', m)) }}"), "U({\"a\"<s>1})");
  EXPECT_EQ(trust("{{ [1, 2] | tojson(separators=(',', ':')) }}"), "T([1,2])");
  EXPECT_EQ(trust("{{ 'a\nb' | indent(m) }}"), "T(a\n)U(<s>)T(b)");
  EXPECT_EQ(trust("{{ m | indent(2, first=true) }}"), "T(  )U(<s>)");
}

// What the fuzzer starts from leads it far only if it runs.
TEST(JinjaTest, SeedsOfTheFuzzerRender) {
  const json function = {{"name", "weather"}, {"parameters", {{"type", "object"}}}};
  const json call = {{"name", "weather"}, {"arguments", {{"city", "Paris"}, {"days", 3}}}};
  const json context = {
      {"messages",
       {{{"role", "system"}, {"content", " Be brief.\n"}},
        {{"role", "user"}, {"content", "Hi <b>"}},
        {{"role", "assistant"}, {"content", nullptr}, {"tool_calls", {{{"function", call}}}}},
        {{"role", "tool"}, {"content", "{\"t\": 21.5}"}},
        {{"role", "user"}, {"content", "Hi"}}}},
      {"tools", {{{"type", "function"}, {"function", function}}}},
      {"add_generation_prompt", true},
      {"bos_token", "<s>"},
      {"eos_token", "</s>"}};
  int seeds = 0;
  for (const auto& seed :
       std::filesystem::directory_iterator(INNERQ_SOURCE_DIR "/tests/fuzz/seeds/jinja_fuzz")) {
    const std::string out = Rendered(ReadAll(seed.path()), context);
    EXPECT_FALSE(out.starts_with("error: ") || out.empty()) << seed.path() << ": " << out;
    ++seeds;
  }
  EXPECT_GE(seeds, 8);
}

// Templates and contexts through Python's Jinja2 and through ours.
class JinjaReferenceTest : public ::testing::Test {
 protected:
  static std::string Python() {
    const char* python = std::getenv("INNERQ_PYTHON");
    return python != nullptr ? python : "python3";
  }

  static bool HasJinja2() {
    return std::system((Python() + " -c 'import jinja2' 2>/dev/null").c_str()) == 0;
  }

  void Add(const std::string& source, const json& context) {
    cases_.push_back({{"template", source}, {"context", context}});
  }

  // Compares all cases added; where one errs, the other must.
  void Compare(int min_rendered) {
    TemporaryDirectory directory;
    std::string lines;
    for (const json& one : cases_) lines += one.dump() + "\n";
    WriteAll(directory.path() / "in", lines);
    const std::string script = INNERQ_SOURCE_DIR "/tests/models/jinja_reference.py";
    const std::string at = directory.path().string();
    ASSERT_EQ(std::system((Python() + " " + script + " <" + at + "/in >" + at + "/out").c_str()),
              0);
    std::istringstream answers(ReadAll(directory.path() / "out"));
    int rendered = 0;
    for (const json& one : cases_) {
      std::string line;
      ASSERT_TRUE(std::getline(answers, line));
      const json answer = json::parse(line);
      const std::string ours = Rendered(one["template"].get<std::string>(), one["context"]);
      const std::string about = one["template"].get<std::string>().substr(0, 300) + "\nwith " +
                                one["context"].dump().substr(0, 300);
      if (answer.contains("error")) {
        EXPECT_EQ(ours.substr(0, 7), "error: ") << about << "\nexpected " << answer;
      } else {
        EXPECT_EQ(ours, answer["output"].get<std::string>()) << about;
        ++rendered;
      }
    }
    EXPECT_GE(rendered, min_rendered) << "of " << cases_.size() << " cases";
    RecordProperty("rendered", rendered);
    RecordProperty("erred", static_cast<int>(cases_.size()) - rendered);
  }

 private:
  std::vector<json> cases_;
};

json Message(const std::string& role, const json& content) {
  return {{"role", role}, {"content", content}};
}

// Conversations for chat templates, with and without what they may ask for.
std::vector<json> Contexts() {
  const json tool = json::parse(R"({"type": "function", "function": {"name": "weather",
    "description": "Wetter \"heute\" für <Städte> & 'Orte'", "parameters": {"type": "object",
    "properties": {"city": {"type": "string", "enum": ["Köln", "東京"]}, "days": {"type": "integer",
    "default": 3, "maximum": 1e2}, "exact": {"type": "boolean", "default": false}},
    "required": ["city"], "items": [], "empty": {}}}})");
  const json call = json::parse(R"([{"id": "c1", "type": "function", "function": {"name": "weather",
    "arguments": {"city": "Köln", "note": "a\nb \"q\""}}}])");
  json caller = Message("assistant", "");
  caller["tool_calls"] = call;
  json caller_twice = caller;
  caller_twice["tool_calls"].push_back(call[0]);
  const json user = Message("user", "  Hello, how are you?\n");
  const json assistant = Message("assistant", " I'm doing great. 😀 <|eot_id|> ");
  const json system = Message("system", "\tYou are a \"helpful\" assistant.\n ");
  const json parts = json::array({{{"type", "image"}}, {{"type", "text"}, {"text", " Look "}}});
  const std::vector<json> conversations = {
      json::array({user}),
      json::array({system, user}),
      json::array({user, assistant, Message("user", "more {{ x }}")}),
      json::array({system, user, assistant, Message("user", "")}),
      json::array({system, user, assistant}),
      json::array({assistant, user}),
      json::array({system}),
      json::array({user, caller, Message("tool", {{"temperature", 21.5}, {"wind", nullptr}})}),
      json::array({user, caller, Message("ipython", "21 °C"), assistant}),
      json::array({system, user, caller_twice}),
      json::array({Message("user", parts)}),
      json::array({Message("developer", "x"), user}),
      json::array()};
  std::vector<json> out;
  for (const json& messages : conversations) {
    json context = {{"messages", messages}, {"bos_token", "<s>"}, {"eos_token", "</s>"}};
    out.push_back(context);
    context["add_generation_prompt"] = true;
    out.push_back(context);
    context["tools"] = json::array({tool, tool["function"]});
    out.push_back(context);
    context["tools_in_user_message"] = false;
    context["date_string"] = "1 Jan 2025";
    out.push_back(context);
    context["builtin_tools"] = {"code_interpreter", "weather"};
    context.erase("tools");
    out.push_back(context);
    context["custom_tools"] = json::array({tool});
    context["add_generation_prompt"] = false;
    context["documents"] = json::array({{{"title", "t"}, {"text", "x"}}});
    out.push_back(context);
  }
  return out;
}

TEST_F(JinjaReferenceTest, RendersTheChatTemplatesOfTheAssetsAsJinja2) {
  const auto folder = SharedPath("assets/chat_templates");
  SKIP_WITHOUT(folder);
  if (!HasJinja2()) GTEST_SKIP() << "no jinja2 for " << Python() << "; set INNERQ_PYTHON";
  std::vector<std::string> templates;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".jinja") templates.push_back(ReadAll(entry.path()));
  }
  const json index = json::parse(ReadAll(folder / "ollama_template_index.json"));
  for (const json& one : index) templates.push_back(one["template"].get<std::string>());
  EXPECT_GE(templates.size(), 30u);
  const std::vector<json> contexts = Contexts();
  for (const std::string& source : templates) {
    const Result<Template> parsed = Template::Parse(source);
    EXPECT_TRUE(parsed.ok()) << parsed.error().message << "\n" << source.substr(0, 300);
    for (const json& context : contexts) Add(source, context);
  }
  Compare(1000);
}

TEST_F(JinjaReferenceTest, RendersTheLanguageAsJinja2) {
  if (!HasJinja2()) GTEST_SKIP() << "no jinja2 for " << Python() << "; set INNERQ_PYTHON";
  const json context = {{"s", " Ünï  côde x-y's\n"},
                        {"d", {{"items", 1}, {"b", {1, 2.0, nullptr}}, {"", "e"}}},
                        {"l", {3, 1, 2}},
                        {"f", {0.1, 1e17, 1e-7, -0.0, 123456789.125, 5e-324}}};
  for (const char* source :
       {"{{ s.split() }}{{ s.split(' ') }}{{ s.split(none, 2) }}{{ s.rsplit(' ', 1) }}",
        "{{ s | upper }}{{ s.lower() }}{{ s | title }}{{ s.title() }}{{ 'ß' | upper }}{{ "
        "'ßa'.capitalize() }}{{ s | capitalize }}",
        "{{ [s, '\\x7f\\u200b\\u00a0\\U0001f600', \"'\", '\"\\''] }}{{ s | tojson }}",
        "{{ s[::-1] }}{{ s[2:-3:2] }}{{ s[-100:3] }}{{ s[5:2] }}{{ s[99] is defined }}",
        "{{ s.replace('', '-') }}{{ s.replace('x', 'yy', 1) }}{{ s | replace('x', 1) }}",
        "{{ s.find('x') }}{{ s.rfind('-') }}{{ s.count('') }}{{ s.splitlines() }}",
        "{{ s.strip(' \\nÜ') }}|{{ s | trim }}|{{ s.lstrip() }}|{{ s.rstrip() }}|",
        "{{ d }}{{ d.b }}{{ d['items'] }}{{ d.items is defined }}{{ d[''] }}{{ d.zz }}",
        "{{ d.keys() }}{{ d.values() }}{{ d.items() | list }}{{ d | list }}{{ d | length }}",
        "{{ d.items() | length }}{{ d.items()[0] is defined }}{{ d | first }}{{ d | last }}",
        "{{ l | sort }}{{ l | sort(reverse=true) }}{{ l | reverse | list }}{{ l | join('-') }}",
        "{{ l[::-1] }}{{ l[-2:] }}{{ l[10] is defined }}{{ l[true] }}{{ l.0 }}{{ l[1:][0] }}",
        "{{ f }}{{ f | map('string') | list }}{{ f | map('int') | list }}{{ f | tojson }}",
        "{{ 7.5 // 2 }} {{ -7.5 % 2 }} {{ 7 % -3 }} {{ 2 ** 0.5 }} {{ 1 / 3 }} {{ 10 // -3 }}",
        "{{ 1 / 0 }}",
        "{{ 1.0 % 0 }}",
        "{{ 's' + 1 }}",
        "{{ none + 1 }}",
        "{{ l + 's' }}",
        "{{ 1 < 'a' }}",
        "{{ d < d }}",
        "{{ 1 in 1 }}",
        "{{ 1 in 's' }}",
        "{{ none.x }}",
        "{{ none.x.y }}",
        "{{ x.y }}",
        "{{ x() }}",
        "{{ l.x() }}",
        "{{ d.get() }}",
        "{{ x | int }}",
        "{{ x | upper }}{{ x | trim }}{{ x | join }}{{ x | list }}{{ x ~ 1 }}",
        "{{ x == y }}{{ x == none }}{{ 1 in x }}{{ x is sequence }}{{ x is iterable }}",
        "{{ x | tojson }}",
        "{{ -x }}",
        "{{ x[0] }}",
        "{{ x[1:] }}",
        "{{ x < 1 }}",
        "{{ none | tojson }}{{ none | string }}{{ none | default('x') }}{{ none | list }}",
        "{{ l | map('upper') | list }}{{ l | select('gt', 1) | list }}{{ l | select | list }}x",
        "{{ 'yes' if l | select('gt', 9) else 'no' }}",
        "{{ l | select | length }}",
        "{{ none | map('upper') | list }}{{ 0 | map(attribute='a') | join }}{{ false | select | "
        "list }}{{ none | reject('odd') | list }}{{ x | selectattr('a') | list }}{{ 0.0 | "
        "rejectattr('a', 'eq', 1) | list }}{{ none | map('upper') is iterable }}",
        "{{ 1 | map('upper') | list }}",
        "{{ true | select | list }}",
        "{{ [[1, 2], [3]] | map('join', '-') | list }}{{ [d] | map(attribute='b.0') | list }}",
        "{{ [d, {}] | map(attribute='q', default='z') | list }}{{ [{}] | map(attribute='q') | "
        "list }}",
        "{{ ['b', 'A', 'a'] | unique | list }}{{ ['b', 'A', 'a'] | sort(case_sensitive=true) }}",
        "{{ [{'n': 2}, {'n': 1}] | sort(attribute='n') }}{{ [1, 'a'] | sort }}",
        "{{ 0.5 | round }}{{ 1.5 | round }}{{ 2 | round }}{{ 1.005 | round(2) }}{{ -2.5 | round "
        "}}{{ 3.14159 | round(3, 'floor') }}",
        "{{ '0x1f' | int(base=16) }}{{ '1f' | int(0, 16) }}{{ '1e3' | int }}{{ 3.9 | int }}{{ "
        "'-2.5' | float }}{{ 'q' | float(1.5) }}",
        "{{ ([1, 2] | first) is number }}{{ [] | first is defined }}{{ '' | last }}|",
        "{{ {'a': {'b': [1, {'c': []}]}, 'd': {}} | tojson(indent=4) }}",
        "{{ {1: 2, none: 3, true: 4, 'z': 1.0} | tojson }}{{ (1, 'é') | tojson(true) }}",
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}",
        "{{ (1,) }}{{ () }}{{ 1, 2 }}{{ [1, 2,] }}{{ {'a': 1,} }}{{ {1: 2}[1] }}{{ [[]] == [[]] "
        "}}{{ (1,) == [1] }}",
        "{{ 'a' 'b' ~ 'c' * 2 }}{{ 1 + 2 ~ 3 }}{{ 2 * 3 ~ 4 }}{{ -2 ** 2 }}{{ 2 ** 3 ** 2 }}",
        "{{ not 1 == 2 }}{{ not false and false }}{{ 1 if 0 else 2 if 0 else 3 }}",
        "{{ 1 < 2 > 1 }}{{ 3 > 2 > 2 }}{{ 1 == 1 in [true] }}{{ 'a' not in 'b' }}",
        "{{ 3 is odd and 4 is even }}{{ 4 is not odd }}{{ 1 is not string }}{{ 6 is divisibleby "
        "3 }}",
        "{{ true is number }}{{ 1.5 is integer }}{{ 1.5 is float }}{{ d is sequence }}{{ 's' is "
        "mapping }}{{ range is callable }}{{ (l | map('string')) is iterable }}",
        "{{ 10 is ge 10 }}{{ 1 is lessthan 2 }}{{ 1 is in l }}{{ 's' is eq 's' }}{{ 1 is ne 2 }}",
        "{% for x in l %}{{ loop.index }}{{ loop.last }}{{ loop.nextitem }}{{ loop.length }}{% "
        "endfor %}{{ loop is defined }}",
        "{% for x in l if x > 1 %}{{ loop.revindex }}{{ loop.first }}{{ x }}{{ loop.previtem is "
        "defined }}{% else %}-{% endfor %}{{ x is defined }}",
        "{% for a in l %}{% for b in l %}{{ loop.index }}{% endfor %}{{ loop.index }}{% endfor "
        "%}",
        "{% for a in l %}{% set o = loop %}{% for b in l if b != a %}{{ o.index }}{{ b }}{% "
        "endfor %}{% endfor %}",
        "{% for x in l %}{{ loop.cycle('a', 2) }}{{ loop.changed(x > 1) }}{{ loop.changed() }}{% "
        "endfor %}",
        "{% for x in [1, 1.0, true, '1', none, y] %}{{ loop.changed(x) }}{{ loop.changed(x, [x]) "
        "}}{{ loop.changed(x, [x]) }}{% endfor %}",
        "{% for x in l %}{{ loop.cycle() }}{% endfor %}",
        "{% for x in l %}{{ loop.cycle(x=1) }}{% endfor %}",
        "{% for x in l %}{{ loop.changed(x=1) }}{% endfor %}",
        "{% for x in l %}{{ loop.nope() }}{% endfor %}",
        "{% if not l %}{{ l.append(1) }}{{ s.format(a=1) }}{{ d.pop('b') }}{% endif %}x",
        "{{ l.append(1) }}",
        "{{ d.update({'a': 1}) }}",
        "{% for c in 'aé' %}[{{ c }}]{% endfor %}{% for k in d %}{{ k }},{% endfor %}",
        "{% for x in none %}{% endfor %}",
        "{% for x in 5 %}{% endfor %}",
        "{% for a, b in d.items() %}{{ a }}{{ b }}{{ loop.last }}{% endfor %}",
        "{% for a, b in l %}{% endfor %}",
        "{% set a, b = 'xy' %}{{ b }}{{ a }}",
        "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}",
        "{% set x = 1 %}{% for i in l %}{% set x = i %}{{ x }}{% endfor %}{{ x }}",
        "{% set x %}{{ s }}{% set y = 1 %}{% endset %}{{ x | length }}{{ y is defined }}",
        "{% set n = namespace(a=[]) %}{% for i in l %}{% set n.a = n.a + [i] %}{% endfor %}{{ n.a "
        "}}",
        "{% macro m(a, b=2) %}{{ a }}-{{ b }}{{ x is defined }}{% endmacro %}{% set x = 1 %}{{ "
        "m(1) }}{{ m(b=3, a=2) }}{{ m() }}",
        "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}",
        "{% macro m(a) %}{% endmacro %}{{ m(z=2) "
        "}}",
        "{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) | length }}{{ m(1) == '11' }}",
        "{{ strftime_now('%Y-%m-%d %H:%M %A %B %b %a %y %j %-d %I %p %%') }}",
        "{{ dict(a=1) }}{{ range(2, 8, 3) | list }}{{ range(0) | list }}{{ range(3, 0) | list }}",
        "{% generation %}x{% endgeneration %}\ny",
        "{{ raise_exception('x') }}",
        "  {% if 1 %}\n  a\n  {% endif %}\n b\n",
        "a{#- c -#} b\n\n{# d #}\n  {# e #}\nf",
        "{%- for i in l -%}\n {{ i }} \n{%- endfor %}\n",
        "x\n \t{%+ if 1 %}y{% endif %}  \n z",
        "{{ 1 -}}  \n  {{- 2 }} \n {{+ 3 }}",
        "{% raw %}\n {{ a }} {% endraw %}\n b",
        " {%- raw -%} {% x %} {%- endraw -%} b",
        "\n\n{{ 1 }}\n\n",
        "{{ '\\n\\t\\\\\\'' }}",
        "\xc2\xa0{%- if 1 %}\xe3\x80\x80{%- endif %}\xe2\x80\xa8 x",
        "{{ d.copy is defined }}",
        "{{ s.upper is defined }}{{ s.nope is defined }}{{ 'a'.__class__ }}"}) {
    Add(source, context);
  }
  Compare(60);
}

TEST_F(JinjaReferenceTest, RendersCollectionsAndBlocksAsJinja2) {
  if (!HasJinja2()) GTEST_SKIP() << "no jinja2 for " << Python() << "; set INNERQ_PYTHON";
  const json context = {{"s", " Two\nlines\n\n"},
                        {"d", {{"b", {1, 2.0}}, {"A", {3}}}},
                        {"l", {3, 1, 2}},
                        {"f", {0.1, 1e17, -0.0}}};
  for (const char* source :
       {"{{ {'b': 1, 'A': 2, 'a': none, 'B': 'x'} | dictsort }}",
        "{{ {'b': 1, 'A': 2, 'a': 0} | dictsort(true, by='value') }}",
        "{{ {3: 1, 2: 4} | dictsort(reverse=true) }}{{ d | dictsort(by='value') }}",
        "{{ {'b': 1, 2: 4} | dictsort }}",
        "{{ l | min }}{{ l | max }}{{ f | max }}{{ s | min }}{{ ['b', 'B', 'a'] | max(true) }}",
        "{{ [] | min is defined }}{{ ['b', 'B'] | max }}{{ [{'x': 2}, {'x': 1}] | "
        "min(attribute='x') "
        "}}",
        "{{ l | sum }}{{ f | sum }}{{ [{'x': 2}, {'x': 1}] | sum('x', 5) }}{{ [] | sum }}",
        "{{ l | map('string') | sum }}",
        "{{ [d, {'b': [2]}] | sum('b.0') }}{{ l | sum(start=0.5) }}",
        "{{ s | indent }}|{{ (s * 3) | indent(2, blank=true) }}|{{ s | indent('> ', true) }}|",
        "{{ 'a\\r\\nb\\x0bc' | indent(1) }}{{ '' | indent(first=true) }}|{{ 'a' | indent(-1) }}",
        "{% macro m(a) %}{{ a }}{{ caller() }}{{ caller() | upper }}{% endmacro %}{% for i in l "
        "%}{% "
        "call m(i) %}{{ i }}{{ a is defined }}{% set i = 9 %}x{% endcall %}{{ i }}{% endfor %}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{{ m() }}",
        "{% macro m() %}{% endmacro %}{% call m() %}x{% endcall %}",
        "{% macro i() %}({{ caller() }}){% endmacro %}{% macro o() %}{% call i() %}{{ caller() "
        "}}!{% "
        "endcall %}{% endmacro %}{% call o() %}x{% endcall %}",
        "{% filter upper %}a{{ s }}{% endfilter %}|{% filter indent(2) | trim %} x\ny{% endfilter "
        "%}",
        "{% filter replace('a', x) %}{% set x = 'b' %}ca{% endfilter %}{{ x is defined }}",
        "{% filter length %}a{% endfilter %}",
        "{% filter list %}a{% endfilter %}",
        "{% filter upper is string %}a{% endfilter %}",
        "{% filter upper %}a{% filter lower %}B{% endfilter %}{% endfilter %}c",
        "{% macro m(a) %}{% filter upper %}{{ a }}{% endfilter %}{% endmacro %}{{ m('x') }}",
        "{% for i in l %}{% filter string | replace('1', 'one') %}{{ i }}{% endfilter %}{% endfor "
        "%}",
        "{% with a = l, b = 2 %}{{ a }}{{ b }}{% with a = b %}{{ a }}{% endwith %}{{ a }}{% "
        "endwith "
        "%}{{ a }}",
        "{% with b = 1, c = b %}{{ c }}{% endwith %}|{% with %}{% set z = 1 %}{% endwith %}{{ z "
        "}}"}) {
    Add(source, context);
  }
  Compare(12);
}

}  // namespace
}  // namespace innerq::jinja
