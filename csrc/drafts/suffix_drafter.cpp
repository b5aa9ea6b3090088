// SPDX-License-Identifier: MIT
#include "drafts/suffix_drafter.h"

#include <utility>

namespace tokenspeed::drafts {

// The kept history that saves most; a new one if none does.
History SuffixDrafter::take_kept(std::span<const Token> prompt, const std::string& salt) {
    auto best = kept_.end();
    size_t most = 0;
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        if (it->salt != salt) continue;
        const size_t usable = it->history.usable(prompt);
        if (usable <= most) continue;
        most = usable;
        best = it;
    }
    if (best == kept_.end()) return History(options_.seed);
    History history = std::move(best->history);
    num_kept_tokens_ -= history.tree().size();
    kept_.erase(best);
    return history;
}

void SuffixDrafter::add(uint64_t id, std::span<const Token> prompt, const std::string& salt) {
    History history = take_kept(prompt, salt);
    history.begin(prompt);
    requests_.emplace(id, Request{std::move(history), salt, {}});
}

int32_t SuffixDrafter::extend(uint64_t id, std::span<const Token> tokens) {
    History& history = requests_.at(id).history;
    for (const Token token : tokens) history.extend(token);
    return history.tree().length(history.tree().match());
}

// The longest match that goes on, or one that is up to kContext tokens shorter.
Found SuffixDrafter::find_own(const History& history) const {
    const SuffixTree& tree = history.tree();
    Locus at = tree.match();
    for (int32_t i = 0; i <= kContext && tree.length(at) > 0; ++i) {
        if (tree.continues(at, tree.end())) return {&tree, at, tree.length(at)};
        tree.shorten(at);
    }
    return {};
}

Draft SuffixDrafter::propose(uint64_t id, size_t max_tokens) {
    Request& request = requests_.at(id);
    Found found = find_own(request.history);
    const Found stored = stores_.find(request.salt, request.history, request.view);
    if (stored.match_len > found.match_len) found = stored;
    Draft draft;
    if (found.match_len < options_.min_match || found.tree == nullptr) return draft;
    draft.match_len = found.match_len;
    found.tree->follow(found.at, request.history.tree().end(), max_tokens, draft.ids);
    return draft;
}

void SuffixDrafter::remove(uint64_t id) {
    auto node = requests_.extract(id);
    Request& request = node.mapped();
    stores_.add(request.salt, request.history.output());
    num_kept_tokens_ += request.history.tree().size();
    kept_.push_front(std::move(request));
    while (num_kept_tokens_ > options_.max_kept_tokens) {
        num_kept_tokens_ -= kept_.back().history.tree().size();
        kept_.pop_back();
    }
}

size_t SuffixDrafter::num_tokens() const {
    size_t tokens = num_kept_tokens_ + stores_.num_tokens();
    for (const auto& [id, request] : requests_) tokens += request.history.tree().size();
    return tokens;
}

size_t SuffixDrafter::num_bytes() const {
    size_t bytes = stores_.num_bytes();
    for (const auto& [id, request] : requests_) bytes += request.history.tree().num_bytes();
    for (const Request& request : kept_) bytes += request.history.tree().num_bytes();
    return bytes;
}

}  // namespace tokenspeed::drafts
