// SPDX-License-Identifier: MIT
#include "drafts/trail.h"

#include <algorithm>

namespace tokenspeed::drafts {

int32_t Trail::match(std::span<const Token> text, size_t next) {
    int32_t length = 0;
    while (length < kMostMatch && next > static_cast<size_t>(length)) {
        const Token token = text[next - 1 - length];
        if (token < 0 || token != text[text.size() - 1 - length]) break;
        ++length;
    }
    return length;
}

void Trail::extend(std::span<const Token> text, size_t known) {
    const size_t last = text.size() - 1;
    if (place_ != 0 && place_ < last && text[place_] == text[last]) {
        ++place_;
        num_lost_ = 0;
        return;
    }
    ++num_lost_;
    if (known != 0) {
        const Place near = resume(text);
        place_ = near.match >= kLong ? near.next : known;
        num_lost_ = 0;
    } else if (num_lost_ > kPatience) {
        place_ = 0;
    }
}

Trail::Place Trail::resume(std::span<const Token> text) const {
    Place best;
    if (place_ == 0) return best;
    const size_t end = std::min(place_ + kAhead, text.size() - 1);
    const auto look = [&](size_t next) {
        const int32_t length = match(text, next);
        if (length > best.match) best = {next, length};
    };
    for (size_t next = place_; next <= end; ++next) look(next);
    for (size_t next = place_; next > 1 && place_ - next < kBack; --next) look(next - 1);
    return best;
}

}  // namespace tokenspeed::drafts
