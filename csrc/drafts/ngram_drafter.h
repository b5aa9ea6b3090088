// SPDX-License-Identifier: MIT
// Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023; the method "ngram" of vLLM): the longest
// n-gram, of min_n to max_n tokens, that ends a request and occurred in it before; proposes what
// followed its latest occurrence. Knows each request by itself. Not thread-safe.
//
// A table per n maps n-grams to the position behind their latest occurrence, as soon as a token
// follows: a token costs max_n - min_n + 1 look-ups, a proposal as many, whatever the length.
#pragma once

#include <span>
#include <unordered_map>
#include <vector>

#include "drafts/draft.h"

namespace tokenspeed::drafts {

inline constexpr int32_t kMaxN = 64;

class NgramIndex {
  public:
    // REQUIRES: 1 <= min_n <= max_n <= kMaxN.
    NgramIndex(int32_t min_n, int32_t max_n, uint64_t seed)
        : min_n_(min_n), seed_(seed), tables_(max_n - min_n + 1) {}

    // REQUIRES: tokens.size() + what is there < 2^31.
    void append(std::span<const Token> tokens);
    // Where the text ends the draft itself is read on, so that periods go on.
    Draft propose(size_t max_tokens) const;

    size_t size() const { return text_.size(); }
    size_t num_bytes() const;

  private:
    struct Table {
        std::vector<int32_t> ends = std::vector<int32_t>(16);  // 0: free
        size_t num_used = 0;
    };
    struct Hashes {
        uint64_t of[kMaxN + 1];  // by n
    };

    int32_t max_n(size_t end) const;
    Hashes hashes(size_t end) const;
    uint32_t find(const Table& table, int32_t n, size_t end, uint64_t hash) const;
    void put(Table& table, int32_t n, size_t end, uint64_t hash);
    void grow(Table& table, int32_t n) const;

    int32_t min_n_;
    uint64_t seed_;
    std::vector<Token> text_;
    std::vector<Table> tables_;  // by n - min_n
};

class NgramDrafter {
  public:
    // REQUIRES: 1 <= min_n <= max_n <= kMaxN. `seed` is secret; see place_of.
    NgramDrafter(int32_t min_n, int32_t max_n, uint64_t seed)
        : min_n_(min_n), max_n_(max_n), seed_(seed) {}

    bool has(uint64_t id) const { return requests_.contains(id); }
    // REQUIRES: !has(id); no token is negative.
    void add(uint64_t id, std::span<const Token> prompt) {
        requests_.try_emplace(id, min_n_, max_n_, seed_).first->second.append(prompt);
    }
    // REQUIRES (and for what follows): has(id).
    // Returns how long the n-gram is that was found again, as propose() does.
    int32_t extend(uint64_t id, std::span<const Token> tokens) {
        NgramIndex& index = requests_.at(id);
        index.append(tokens);
        return index.propose(0).match_len;
    }
    Draft propose(uint64_t id, size_t max_tokens) const {
        return requests_.at(id).propose(max_tokens);
    }
    void remove(uint64_t id) { requests_.erase(id); }

    size_t num_tokens() const;
    size_t num_bytes() const;

  private:
    int32_t min_n_, max_n_;
    uint64_t seed_;
    std::unordered_map<uint64_t, NgramIndex> requests_;
};

}  // namespace tokenspeed::drafts
