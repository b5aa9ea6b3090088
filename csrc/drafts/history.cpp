// SPDX-License-Identifier: MIT
#include "drafts/history.h"

#include <algorithm>

namespace tokenspeed::drafts {

// Tokens at the beginning of both the sequence and `prompt`.
size_t History::shared(std::span<const Token> prompt) const {
    size_t length = 0;
    for (const Piece& piece : pieces_) {
        const bool last = &piece == &pieces_.back();
        const auto mine = tree_.text().subspan(piece.begin, last ? length_ - length : piece.length);
        const auto theirs = prompt.subspan(length);
        const size_t same = std::ranges::mismatch(mine, theirs).in1 - mine.begin();
        length += same;
        if (same < mine.size()) break;
    }
    return length;
}

size_t History::usable(std::span<const Token> prompt) const {
    const size_t length = shared(prompt);
    return 2 * length >= tree_.size() ? length : 0;
}

// Keeps the first `length` tokens of the sequence.
void History::cut(size_t length) {
    length_ = length;
    for (size_t i = 0; i < pieces_.size(); ++i) {
        if (length > pieces_[i].length && i + 1 < pieces_.size()) {
            length -= pieces_[i].length;
            continue;
        }
        pieces_[i].length = length;
        pieces_.resize(i + 1);
    }
}

void History::begin(std::span<const Token> prompt) {
    const size_t kept = shared(prompt);
    if (pieces_.empty()) {
        tree_.reserve(prompt.size() + prompt.size() / 16);
        pieces_.push_back({0, 0});
    } else if (kept < length_) {
        cut(kept);
        tree_.separate();
        const size_t again = std::min<size_t>(kept, kContext);
        for (const Token token : prompt.subspan(kept - again, again)) tree_.append(token);
        pieces_.push_back({tree_.size(), 0});
    }
    for (const Token token : prompt.subspan(kept)) extend(token);
    output_ = tree_.size();
}

std::span<const Token> History::context() const {
    return tree_.text().last(std::min<size_t>(length_, kContext));
}

}  // namespace tokenspeed::drafts
