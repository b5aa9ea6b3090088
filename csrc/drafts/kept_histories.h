// SPDX-License-Identifier: MIT
// Histories of ended requests, of which the next turn of a session takes over its own. Knows no
// live requests.
//
// A history is of use to a prompt that shares at least half of its text (history.h). So it is found
// by its head: so many of its first tokens that whoever can use it has them all. A prompt asks for
// each of its own heads, and looks at those alone that have one of them: how many are kept that
// begin otherwise does not matter.
//
//     heads' lengths    1 2 3 .. 15 16 18 20 .. 30 32 36 .. : eight to each power of two
//     a text of S       has the longest that is no more than half of S, rounded up
#pragma once

#include <functional>
#include <list>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>

#include "drafts/history.h"

namespace tokenspeed::drafts {

class KeptHistories {
  public:
    // All together have at most `max_tokens` tokens and separators; `seed` is secret.
    KeptHistories(size_t max_tokens, uint64_t seed) : max_tokens_(max_tokens), seed_(seed) {}

    KeptHistories(const KeptHistories&) = delete;
    KeptHistories& operator=(const KeptHistories&) = delete;

    // Keeps it; if there are too many tokens then, the oldest ones go.
    void keep(const std::string& salt, History history);
    // The history of this salt that saves most, the latest of equals; none if none is usable.
    std::optional<History> take(const std::string& salt, std::span<const Token> prompt);
    void clear();

    size_t num_tokens() const { return num_tokens_; }
    size_t num_bytes() const;

  private:
    struct Kept {
        std::string salt;
        History history;
        uint64_t number;  // rises
        uint64_t head;    // a hash of salt and head
    };
    using Place = std::list<Kept>::iterator;

    uint64_t begin_head(const std::string& salt) const {
        return std::hash<std::string>{}(salt) ^ seed_;
    }
    uint64_t extend_head(uint64_t head, Token token) const {
        return (head ^ static_cast<uint32_t>(token)) * (seed_ | 1) + (head >> 32);
    }
    History remove(Place place);

    size_t max_tokens_;
    uint64_t seed_;
    uint64_t num_kept_ = 0;  // ever
    size_t num_tokens_ = 0;
    std::list<Kept> kept_;  // the latest first
    std::unordered_multimap<uint64_t, Place> by_head_;
};

}  // namespace tokenspeed::drafts
