// SPDX-License-Identifier: MIT
// Proposes the most frequent continuation of the longest suffix of a request that was seen before:
// in its own session's history, or in recent outputs of its salt where that matches more. Where
// that is short, what follows in the text that the request copies with changes (trail.h), if that
// was the better guess lately. Knows no steps and no acceptance. Not thread-safe.
//
// Histories of ended requests are kept, the most recently used first, up to `max_kept_tokens`
// tokens; the next request of the same salt that begins alike takes one over (kept_histories.h).
#pragma once

#include <span>
#include <string>
#include <unordered_map>

#include "drafts/draft.h"
#include "drafts/history.h"
#include "drafts/kept_histories.h"
#include "drafts/shared_store.h"
#include "drafts/trail.h"

namespace tokenspeed::drafts {

struct SuffixOptions {
    int32_t min_match = 2;
    size_t shared_store_tokens = 0;
    size_t max_kept_tokens = 0;
    uint64_t seed = 0;  // secret; see place_of
};

class SuffixDrafter {
  public:
    explicit SuffixDrafter(const SuffixOptions& options)
        : options_(options),
          stores_(options.shared_store_tokens, options.seed),
          kept_(options.max_kept_tokens, options.seed) {}

    bool has(uint64_t id) const { return requests_.contains(id); }
    // REQUIRES: !has(id); no token is negative.
    void add(uint64_t id, std::span<const Token> prompt, const std::string& salt);
    // REQUIRES (and for what follows): has(id).
    // Returns how long a suffix of the request now occurs earlier in its session.
    int32_t extend(uint64_t id, std::span<const Token> tokens);
    Draft propose(uint64_t id, size_t max_tokens);
    // As propose(), by what is the longest match alone.
    Draft longest(uint64_t id, size_t max_tokens);
    void remove(uint64_t id);
    // What is kept of requests that were removed.
    void forget_ended();

    // Of live requests, histories kept and stores; separators count.
    size_t num_tokens() const;
    size_t num_bytes() const;
    size_t num_kept_tokens() const { return kept_.num_tokens(); }
    size_t num_stored_tokens() const { return stores_.num_tokens(); }

  private:
    struct Request {
        History history;
        std::string salt;
        StoreView view;
        Trail trail{};
        // What comes next by the longest match and by the trail, where both had a say, and how
        // often the trail was right for longer, of the times that one of them was.
        std::vector<Token> by_match{}, by_trail{};
        float trust = 0.5F;
    };

    Found find_own(const History& history) const;
    void follow_trail(Request& request, Draft& draft, size_t max_tokens) const;

    SuffixOptions options_;
    SharedStores stores_;
    std::unordered_map<uint64_t, Request> requests_;
    KeptHistories kept_;
};

}  // namespace tokenspeed::drafts
