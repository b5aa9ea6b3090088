// SPDX-License-Identifier: MIT
#include "drafts/kept_histories.h"

#include <bit>
#include <iterator>
#include <utility>

namespace tokenspeed::drafts {
namespace {

// From one length of heads to the next.
size_t unit(size_t length) { return length < 16 ? 1 : std::bit_floor(length) / 8; }

// The longest length of heads that is at most `length`.
size_t head_length(size_t length) { return length - length % unit(length); }

}  // namespace

void KeptHistories::keep(const std::string& salt, History history) {
    if (max_tokens_ == 0) return;
    const size_t length = head_length((history.tree().size() + 1) / 2);
    uint64_t head = begin_head(salt);
    const bool is_usable = length <= history.length();
    if (is_usable) {
        history.each(length, [&](Token token) { head = extend_head(head, token); });
    }
    num_tokens_ += history.tree().size();
    kept_.push_front({salt, std::move(history), ++num_kept_, head});
    if (is_usable) by_head_.emplace(head, kept_.begin());
    while (num_tokens_ > max_tokens_) remove(std::prev(kept_.end()));
}

std::optional<History> KeptHistories::take(const std::string& salt, std::span<const Token> prompt) {
    Place best = kept_.end();
    size_t most = 0, length = 0;
    uint64_t head = begin_head(salt);
    for (size_t next = 1; next <= prompt.size(); next += unit(next)) {
        while (length < next) head = extend_head(head, prompt[length++]);
        const auto [begin, end] = by_head_.equal_range(head);
        for (auto it = begin; it != end; ++it) {
            const Place place = it->second;
            if (place->salt != salt) continue;
            const size_t usable = place->history.usable(prompt);
            if (usable < most || usable == 0) continue;
            if (usable == most && place->number < best->number) continue;
            most = usable;
            best = place;
        }
    }
    if (best == kept_.end()) return std::nullopt;
    return remove(best);
}

void KeptHistories::clear() {
    by_head_.clear();
    kept_.clear();
    num_tokens_ = 0;
}

size_t KeptHistories::num_bytes() const {
    size_t bytes = 0;
    for (const Kept& kept : kept_) bytes += kept.history.tree().num_bytes();
    return bytes;
}

History KeptHistories::remove(Place place) {
    const auto [begin, end] = by_head_.equal_range(place->head);
    for (auto it = begin; it != end; ++it) {
        if (it->second != place) continue;
        by_head_.erase(it);
        break;
    }
    History history = std::move(place->history);
    num_tokens_ -= history.tree().size();
    kept_.erase(place);
    return history;
}

}  // namespace tokenspeed::drafts
