#include "engine/sealed_group_counter.h"

#include <algorithm>

namespace innerq {
namespace {

// Of page-locked memory, or one page if that is more. A page of a model with 8 heads of 128
// channels in 32 layers has less than 1 MiB.
constexpr int64_t kMostCopiedBytes = int64_t{32} << 20;

// Only layers with hybrid groups have anything in a page that must be looked at.
bool HasHybridGroups(const KvLayerLayout& layer) {
  const auto is_hybrid = [](const QuantSpec& side) {
    return side.quantized() && side.mode == QuantMode::kHybrid;
  };
  return is_hybrid(layer.key) || is_hybrid(layer.value);
}

}  // namespace

Result<SealedGroupCounter> SealedGroupCounter::Create(Backend* backend,
                                                      std::span<const PagedKvView> layers,
                                                      int64_t most_seals) {
  SealedGroupCounter counter(backend, layers);
  if (backend->host_visible()) return counter;
  for (const PagedKvView& layer : layers) {
    if (HasHybridGroups(*layer.layout)) counter.page_bytes_ += layer.layout->sealed_page_bytes();
  }
  if (counter.page_bytes_ == 0) return counter;
  counter.room_ = std::clamp<int64_t>(kMostCopiedBytes / counter.page_bytes_, 1,
                                      std::max<int64_t>(most_seals, 1));
  ASSIGN_OR_RETURN(counter.pages_, backend->AllocateForHost(counter.room_ * counter.page_bytes_));
  return counter;
}

Result<void> SealedGroupCounter::Add(std::span<const SealItem> seals) {
  if (!seals.empty()) groups_.resize(layers_.size());
  while (!seals.empty()) {
    const size_t count =
        page_bytes_ == 0 ? seals.size() : std::min(seals.size(), static_cast<size_t>(room_));
    const auto place = [this](size_t i) {
      return pages_.data() + static_cast<int64_t>(i) * page_bytes_;
    };
    if (page_bytes_ > 0) {
      for (size_t i = 0; i < count; ++i) Copy(seals[i], place(i));
      RETURN_IF_ERROR(backend_->Synchronize());
    }
    for (size_t i = 0; i < count; ++i) Count(seals[i], place(i));
    seals = seals.subspan(count);
  }
  return {};
}

void SealedGroupCounter::Copy(const SealItem& seal, std::byte* to) {
  for (const PagedKvView& layer : layers_) {
    if (!HasHybridGroups(*layer.layout)) continue;
    const int64_t bytes = layer.layout->sealed_page_bytes();
    backend_->ReadToHost(layer.SealedHead(seal.sealed_id, 0), bytes, to);
    to += bytes;
  }
}

void SealedGroupCounter::Count(const SealItem& seal, std::byte* copied) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    PagedKvView view = layers_[i];
    int64_t id = seal.sealed_id;
    if (page_bytes_ > 0 && HasHybridGroups(*view.layout)) {
      view.sealed_pages = copied;
      copied += view.layout->sealed_page_bytes();
      id = 0;
    }
    const LayerGroups page = CountSealedGroups(view, id);
    groups_[i].key.Add(page.key);
    groups_[i].value.Add(page.value);
  }
}

}  // namespace innerq
