// SPDX-License-Identifier: MIT
#include "drafts/shared_store.h"

#include <algorithm>
#include <utility>

namespace tokenspeed::drafts {

// The salt's store, now the most recently used; null if there is none.
SharedStores::Store* SharedStores::use(const std::string& salt) {
    const auto found = by_salt_.find(salt);
    if (found == by_salt_.end()) return nullptr;
    stores_.splice(stores_.begin(), stores_, found->second);
    return &stores_.front();
}

void SharedStores::add(const std::string& salt, std::span<const Token> output) {
    if (half_ < 2 || output.empty()) return;
    output = output.last(std::min(output.size(), half_ - 1));
    Store* store = use(salt);
    if (store == nullptr) {
        stores_.push_front(Store{.salt = salt, .generations = {}});
        by_salt_[salt] = stores_.begin();
        store = &stores_.front();
    }
    auto& [young, old] = store->generations;
    if (young.size() + output.size() + 1 > half_) {
        num_tokens_ -= old.size();
        old = std::exchange(young, {});
    }
    if (!young.tree) young.tree = std::make_unique<SuffixTree>(seed_);
    for (const Token token : output) young.tree->append(token);
    young.tree->separate();
    young.version = ++version_;
    num_tokens_ += output.size() + 1;
    while (num_tokens_ > 2 * half_) {
        num_tokens_ -= stores_.back().size();
        by_salt_.erase(stores_.back().salt);
        stores_.pop_back();
    }
}

void SharedStores::clear() {
    stores_.clear();
    by_salt_.clear();
    num_tokens_ = 0;
}

Found SharedStores::find(const std::string& salt, const History& history, StoreView& view) {
    Store* store = use(salt);
    if (store == nullptr) return {};
    const auto context = history.context();
    const size_t size = history.tree().size();
    Found best;
    for (size_t i = 0; i < 2; ++i) {
        const auto& [tree, version] = store->generations[i];
        if (!tree) continue;
        Locus& at = view.loci[i];
        size_t news = size - view.seen;
        if (view.versions[i] != version || news >= context.size()) {
            at = {};
            news = context.size();
        }
        view.versions[i] = version;
        for (const Token* end = history.tree().end() - news; end < history.tree().end();) {
            tree->step(at, ++end);
            if (tree->length(at) > kContext) tree->shorten(at);
        }
        Locus place = at;
        while (tree->length(place) > 0 && !tree->continues(place, history.tree().end())) {
            tree->shorten(place);
        }
        const int32_t length = tree->length(place);
        if (length > best.match_len) best = {tree.get(), place, length};
    }
    view.seen = size;
    return best;
}

size_t SharedStores::num_bytes() const {
    size_t bytes = 0;
    for (const Store& store : stores_) {
        for (const Generation& generation : store.generations) {
            if (generation.tree) bytes += generation.tree->num_bytes();
        }
    }
    return bytes;
}

}  // namespace tokenspeed::drafts
