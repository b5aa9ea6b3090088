// SPDX-License-Identifier: MIT
#include "drafts/suffix_drafter.h"

#include <algorithm>
#include <utility>

namespace tokenspeed::drafts {
namespace {

constexpr float kTrailMemory = 0.2F;  // what one guess counts for

// How many leading tokens of the guess came.
size_t num_right(std::span<const Token> guess, std::span<const Token> tokens) {
    return static_cast<size_t>(std::ranges::mismatch(guess, tokens).in1 - guess.begin());
}

}  // namespace

void SuffixDrafter::add(uint64_t id, std::span<const Token> prompt, const std::string& salt) {
    std::optional<History> kept = kept_.take(salt, prompt);
    History history = kept ? *std::move(kept) : History(options_.seed);
    history.begin(prompt);
    requests_.emplace(id, Request{.history = std::move(history), .salt = salt, .view = {}});
}

int32_t SuffixDrafter::extend(uint64_t id, std::span<const Token> tokens) {
    Request& request = requests_.at(id);
    const SuffixTree& tree = request.history.tree();
    const auto right = num_right(request.by_match, tokens);
    const auto right_of_trail = num_right(request.by_trail, tokens);
    if (right != right_of_trail) {
        const float won = right_of_trail > right ? 1.0F : 0.0F;
        request.trust += (won - request.trust) * kTrailMemory;
    }
    request.by_match.clear(), request.by_trail.clear();
    for (const Token token : tokens) {
        request.history.extend(token);
        const bool copied = tree.length(tree.match()) >= Trail::kLong;
        request.trail.extend(tree.text(), copied ? tree.behind(tree.match(), tree.end()) : 0);
    }
    return tree.length(tree.match());
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

// Replaces the longest match's draft where what the request copies from is the better guess.
void SuffixDrafter::follow_trail(Request& request, Draft& draft, size_t max_tokens) const {
    const std::span<const Token> text = request.history.tree().text();
    const Trail::Place place = request.trail.resume(text);
    if (place.match == 0) return;
    const auto rest =
        text.subspan(place.next).first(std::min(max_tokens, text.size() - place.next));
    const auto separator = std::ranges::find_if(rest, [](Token token) { return token < 0; });
    std::vector<Token> ids(rest.begin(), separator);
    if (ids.empty()) return;
    const bool either = !draft.ids.empty();
    if (either) request.by_match = draft.ids, request.by_trail = ids;
    if (either && request.trust < 0.5F) return;
    draft = {.ids = std::move(ids), .match_len = 1};  // a kind of its own if min_match > 1
}

Draft SuffixDrafter::longest(uint64_t id, size_t max_tokens) {
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

Draft SuffixDrafter::propose(uint64_t id, size_t max_tokens) {
    Draft draft = longest(id, max_tokens);
    if (draft.match_len < Trail::kLong && max_tokens > 0) {
        follow_trail(requests_.at(id), draft, max_tokens);
    }
    return draft;
}

void SuffixDrafter::remove(uint64_t id) {
    auto node = requests_.extract(id);
    Request& request = node.mapped();
    stores_.add(request.salt, request.history.output());
    kept_.keep(request.salt, std::move(request.history));
}

void SuffixDrafter::forget_ended() {
    kept_.clear();
    stores_.clear();
}

size_t SuffixDrafter::num_tokens() const {
    size_t tokens = kept_.num_tokens() + stores_.num_tokens();
    for (const auto& [id, request] : requests_) tokens += request.history.tree().size();
    return tokens;
}

size_t SuffixDrafter::num_bytes() const {
    size_t bytes = kept_.num_bytes() + stores_.num_bytes();
    for (const auto& [id, request] : requests_) bytes += request.history.tree().num_bytes();
    return bytes;
}

}  // namespace tokenspeed::drafts
