// SPDX-License-Identifier: MIT
// Recent outputs, one store per salt, and where a request stands in its salt's. A request sees the
// store of its salt only: what it finds, and how long finding takes, depends on no other salt's
// tokens. What others can tell is how much they are pushed out. Knows no requests.
//
// Bound: all stores together hold at most `max_tokens` tokens and separators. A store has two
// trees: the young one takes outputs up to half of the bound, then it becomes the old one and the
// old one goes. If the stores together are too large, whole ones go, the least recently used first.
#pragma once

#include <array>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>

#include "drafts/history.h"

namespace tokenspeed::drafts {

// A place in each of a store's trees. Stale ones find themselves anew.
struct StoreView {
    std::array<Locus, 2> loci = {};
    std::array<uint64_t, 2> versions = {};  // of the trees; 0: none
    size_t seen = 0;                        // tokens of the request's text
};

struct Found {
    const SuffixTree* tree = nullptr;
    Locus at;
    int32_t match_len = 0;
};

class SharedStores {
  public:
    SharedStores(size_t max_tokens, uint64_t seed) : half_(max_tokens / 2), seed_(seed) {}

    SharedStores(const SharedStores&) = delete;
    SharedStores& operator=(const SharedStores&) = delete;

    // The end of an output that is too long is taken.
    void add(const std::string& salt, std::span<const Token> output);

    // The longest match of the last kContext tokens of `history` that goes on; the young tree's of
    // equals.
    Found find(const std::string& salt, const History& history, StoreView& view);

    // All of them.
    void clear();

    size_t num_tokens() const { return num_tokens_; }
    size_t num_bytes() const;

  private:
    struct Generation {
        std::unique_ptr<SuffixTree> tree;
        uint64_t version = 0;  // unlike every other tree's and time's
        size_t size() const { return tree ? tree->size() : 0; }
    };
    struct Store {
        std::string salt;
        std::array<Generation, 2> generations;  // young, old
        size_t size() const { return generations[0].size() + generations[1].size(); }
    };

    Store* use(const std::string& salt);

    size_t half_;
    uint64_t seed_;
    uint64_t version_ = 0;
    size_t num_tokens_ = 0;
    std::list<Store> stores_;  // the most recently used first
    std::unordered_map<std::string, std::list<Store>::iterator> by_salt_;
};

}  // namespace tokenspeed::drafts
