// The filters of templates on lists and dicts.
#include <algorithm>
#include <bit>

#include "models/jinja_program.h"

namespace innerq::jinja {
namespace {

using Flavor = Sequence::Flavor;

Result<Value> JoinFilter(Call& call) {
  Text separator;
  if (call.has(1)) {
    RETURN_IF_ERROR(call.budget.SpendOn(call.arg(1)));
    ASSIGN_OR_RETURN(separator, Str(call.arg(1)));
  }
  ASSIGN_OR_RETURN(const auto items, Iterate(call.input(), call.budget));
  Text out;
  for (size_t i = 0; i < items->size(); ++i) {
    Value item = (*items)[i];
    if (call.has(2)) {
      ASSIGN_OR_RETURN(item, GetPath(item, call.arg(2), call.budget));
    }
    RETURN_IF_ERROR(call.budget.SpendOn(item));
    ASSIGN_OR_RETURN(const Text text, Str(item));
    if (i > 0) out.Append(separator);
    RETURN_IF_ERROR(
        call.budget.Spend(static_cast<int64_t>((separator.bytes.size() + text.bytes.size()) / 64)));
    out.Append(text);
    if (static_cast<int64_t>(out.bytes.size()) > call.budget.limits().max_output_bytes) {
      RETURN_IF_ERROR(call.budget.SpendBytes(static_cast<int64_t>(out.bytes.size())));
    }
  }
  return Value::String(std::move(out));
}

Result<Value> ListFilter(Call& call) {
  ASSIGN_OR_RETURN(const auto items, Iterate(call.input(), call.budget));
  RETURN_IF_ERROR(call.budget.Spend(static_cast<int64_t>(items->size())));
  return Value::List(*items);
}

Result<Value> FirstFilter(Call& call) {
  ASSIGN_OR_RETURN(const auto items, Iterate(call.input(), call.budget));
  return items->empty() ? Value::Undefined("no first item, the sequence is empty") : items->front();
}

Result<Value> LastFilter(Call& call) {
  if (call.input().is(Value::Kind::kSequence) &&
      call.input().sequence()->flavor == Flavor::kIterator) {
    return InvalidArgument("last expects a list, found an iterator (use the filter list)");
  }
  ASSIGN_OR_RETURN(const auto items, Iterate(call.input(), call.budget));
  return items->empty() ? Value::Undefined("no last item, the sequence is empty") : items->back();
}

Result<Value> ItemsFilter(Call& call) {
  if (call.input().is_undefined()) return Value::Of(Flavor::kIterator, {});
  if (!call.input().is(Value::Kind::kDict)) {
    return InvalidArgument("items expects a dict, found " + TypeName(call.input()));
  }
  std::vector<Value> out;
  for (const auto& [key, value] : call.input().dict().items()) {
    RETURN_IF_ERROR(call.budget.Spend(4));
    out.push_back(Value::Tuple({key, value}));
  }
  return Value::Of(Flavor::kIterator, std::move(out));
}

constexpr size_t kNone = ~size_t{0};  // no argument

// What is compared of an item: itself or its attribute, in lower case unless that matters.
// `attribute` is the index of the argument that names one.
Result<Value> Key(Call& call, const Value& item, bool case_sensitive, size_t attribute) {
  Value key = item;
  if (call.has(attribute) && !call.arg(attribute).is_none()) {
    ASSIGN_OR_RETURN(key, GetPath(item, call.arg(attribute), call.budget));
  }
  if (case_sensitive || !key.is_string()) return key;
  RETURN_IF_ERROR(call.budget.SpendBytes(static_cast<int64_t>(key.text().bytes.size())));
  return Value::String(Lower(key.text().bytes));
}

struct Keyed {
  Value key;
  Value item;
};

Result<std::vector<Keyed>> Keys(Call& call, bool case_sensitive, size_t attribute) {
  ASSIGN_OR_RETURN(const auto items, Iterate(call.input(), call.budget));
  std::vector<Keyed> out;
  for (const Value& item : *items) {
    RETURN_IF_ERROR(call.budget.Spend(1));
    ASSIGN_OR_RETURN(Value key, Key(call, item, case_sensitive, attribute));
    out.push_back({std::move(key), item});
  }
  return out;
}

Result<void> StableSort(std::vector<Keyed>& items, bool descending, Budget& budget) {
  int64_t weight = 0;
  for (const Keyed& item : items) {
    RETURN_IF_ERROR(budget.SpendOn(item.key));  // so the sum is below the limit of steps
    weight += item.key.extent().weight;
  }
  RETURN_IF_ERROR(budget.Spend(weight * (1 + std::bit_width(items.size()))));
  // A comparison that fails is remembered; the order of the rest no longer matters.
  std::optional<Error> failed;
  std::stable_sort(items.begin(), items.end(), [&](const Keyed& a, const Keyed& b) {
    if (failed) return false;
    const Result<int> order = Order(a.key, b.key);
    if (!order.ok()) failed = order.error();
    return order.ok() && (descending ? *order > 0 : *order < 0);
  });
  if (failed) return *failed;
  return {};
}

Value Unkeyed(Flavor flavor, std::vector<Keyed> items) {
  std::vector<Value> out;
  for (Keyed& item : items) out.push_back(std::move(item.item));
  return Value::Of(flavor, std::move(out));
}

Result<Value> SortFilter(Call& call) {
  if (call.has(3) && call.arg(3).is_string() &&
      call.arg(3).text().bytes.find(',') != std::string::npos) {
    return InvalidArgument("sort expects one attribute, found several");
  }
  ASSIGN_OR_RETURN(std::vector<Keyed> items, Keys(call, call.Flag(2), 3));
  RETURN_IF_ERROR(StableSort(items, call.Flag(1), call.budget));
  return Unkeyed(Flavor::kList, std::move(items));
}

Result<Value> UniqueFilter(Call& call) {
  ASSIGN_OR_RETURN(std::vector<Keyed> items, Keys(call, call.Flag(1), 2));
  std::vector<Keyed> out;
  for (Keyed& item : items) {
    bool seen = false;
    for (const Keyed& other : out) {
      RETURN_IF_ERROR(call.budget.Spend(1));
      ASSIGN_OR_RETURN(const bool same, Compare("==", item.key, other.key, call.budget));
      seen = seen || same;
    }
    if (!seen) out.push_back(std::move(item));
  }
  return Unkeyed(Flavor::kIterator, std::move(out));
}

Result<Value> ReverseFilter(Call& call) {
  if (call.input().is_string()) {
    const std::optional<int64_t> backwards[3] = {std::nullopt, std::nullopt, -1};
    return Slice(call.input(), backwards, call.budget);
  }
  ASSIGN_OR_RETURN(const auto items, Iterate(call.input(), call.budget));
  RETURN_IF_ERROR(call.budget.Spend(static_cast<int64_t>(items->size())));
  return Value::Of(Flavor::kIterator, {items->rbegin(), items->rend()});
}

// The key or the value of each pair decides; "by" says which.
Result<Value> DictSortFilter(Call& call) {
  if (!call.input().is(Value::Kind::kDict)) {
    return InvalidArgument("dictsort expects a dict, found " + TypeName(call.input()));
  }
  ASSIGN_OR_RETURN(const std::string by, call.String(2, "key"));
  if (by != "key" && by != "value") {
    return InvalidArgument("dictsort expects by to be key or value, found " + by);
  }
  std::vector<Keyed> pairs;
  for (const auto& [key, value] : call.input().dict().items()) {
    RETURN_IF_ERROR(call.budget.Spend(4));
    ASSIGN_OR_RETURN(Value judged, Key(call, by == "key" ? key : value, call.Flag(1), kNone));
    pairs.push_back({std::move(judged), Value::Tuple({key, value})});
  }
  RETURN_IF_ERROR(StableSort(pairs, call.Flag(3), call.budget));
  return Unkeyed(Flavor::kList, std::move(pairs));
}

// The first of the smallest or largest items; undefined if there are none.
template <bool kLargest>
Result<Value> ExtremeFilter(Call& call) {
  ASSIGN_OR_RETURN(const std::vector<Keyed> items, Keys(call, call.Flag(1), 2));
  if (items.empty()) return Value::Undefined("no smallest or largest item, the sequence is empty");
  const Keyed* best = &items[0];
  for (size_t i = 1; i < items.size(); ++i) {
    RETURN_IF_ERROR(call.budget.SpendOn(items[i].key));
    ASSIGN_OR_RETURN(const int order, Order(items[i].key, best->key));
    if (kLargest ? order > 0 : order < 0) best = &items[i];
  }
  return best->item;
}

Result<Value> SumFilter(Call& call) {
  ASSIGN_OR_RETURN(const auto items, Iterate(call.input(), call.budget));
  Value sum = call.has(2) ? call.arg(2) : Value::Int(0);
  for (Value item : *items) {
    RETURN_IF_ERROR(call.budget.Spend(1));
    if (call.has(1) && !call.arg(1).is_none()) {
      ASSIGN_OR_RETURN(item, GetPath(item, call.arg(1), call.budget));
    }
    if (sum.is_string()) return InvalidArgument("sum expects numbers or lists, found str");
    ASSIGN_OR_RETURN(sum, Binary("+", sum, item, call.budget));
  }
  return sum;
}

}  // namespace

const std::vector<Signature>& CollectionFilters() {
  static const std::vector<Signature> kFilters = {
      {"dictsort", {"case_sensitive", "by", "reverse"}, 0, DictSortFilter},
      {"first", {}, 0, FirstFilter},
      {"items", {}, 0, ItemsFilter},
      {"join", {"d", "attribute"}, 0, JoinFilter},
      {"last", {}, 0, LastFilter},
      {"list", {}, 0, ListFilter},
      {"max", {"case_sensitive", "attribute"}, 0, ExtremeFilter<true>},
      {"min", {"case_sensitive", "attribute"}, 0, ExtremeFilter<false>},
      {"reverse", {}, 0, ReverseFilter},
      {"sort", {"reverse", "case_sensitive", "attribute"}, 0, SortFilter},
      {"sum", {"attribute", "start"}, 0, SumFilter},
      {"unique", {"case_sensitive", "attribute"}, 0, UniqueFilter},
  };
  return kFilters;
}

}  // namespace innerq::jinja
