// SPDX-License-Identifier: MIT
// A suffix tree that grows token by token (Ukkonen, "On-line construction of suffix trees", 1995).
// It was preferred to the suffix automaton (Blumer et al., 1985), whose proofs it shares: a leaf
// takes no memory but its edge, edges are never copied, and the longest suffix that occurred before
// is the place where the tree grows, so that it is known at no cost. Knows tokens, no requests.
//
// A separator is a token below zero that occurs once: no match crosses it, no draft contains it.
//
// Invariants
// 1. The leaf of suffix i is the child ~i; suffixes [0, num_leaves) have theirs, the others are as
//    long as a match and have none. An internal node is a child >= 0; node 0 is the root.
// 2. The path of node v is text[latest(v), latest(v) + depth(v)).
// 3. Every internal node but the root has two children or more, and a suffix link to the node of
//    its path without the first token, once append() is through.
// 4. count(v) is the number of leaves below v, latest(v) their last and top(v) the child with
//    most leaves, the later one of equals (-1: all begin with separators), as long as no path has
//    more than kMaxWalk nodes: append() tells no more of a leaf's ancestors, as runs of one token
//    would make it quadratic.
//
// Memory: 4 bytes a token, 24 an internal node, 8 / load an edge; there are less than n of the
// former and 2n of the latter.
#pragma once

#include <span>
#include <vector>

#include "drafts/child_table.h"
#include "drafts/draft.h"

namespace tokenspeed::drafts {

inline constexpr int32_t kMaxWalk = 64;

// Where a string ends in a tree: `len` tokens below `node`. The string itself is held by who asks:
// functions take `end`, one past its last token.
struct Locus {
    int32_t node = 0;
    int32_t len = 0;
};

class SuffixTree {
  public:
    explicit SuffixTree(uint64_t seed) : edges_(seed) { nodes_.emplace_back(); }

    void reserve(size_t num_tokens);

    // Amortized constant time; one call may take as long as the match that it ends.
    // REQUIRES: size() < 2^31 - 1, token >= 0.
    void append(Token token);
    void separate() { push(--separator_); }

    size_t size() const { return text_.size(); }
    std::span<const Token> text() const { return text_; }
    const Token* end() const { return text_.data() + text_.size(); }

    // The longest suffix of the text that also occurs earlier in it.
    Locus match() const { return active_; }
    int32_t length(Locus at) const { return nodes_[at.node].depth + at.len; }

    // The index behind the latest occurrence of what ends at `end`. REQUIRES: length(at) > 0.
    size_t behind(Locus at, const Token* end) const;

    // `at` was the longest suffix of [.., end - 1) that occurs here, now of [.., end).
    void step(Locus& at, const Token* end) const;
    // Without its first token. REQUIRES: length(at) > 0.
    void shorten(Locus& at) const;
    // Whether a token that is no separator follows.
    bool continues(Locus at, const Token* end) const;
    // The most frequent continuation; the latest counts twice, and before its equals. Where the
    // text ends the draft itself is read on, so that periods go on. Appends to `ids` up to
    // `max_tokens`.
    void follow(Locus at, const Token* end, size_t max_tokens, std::vector<Token>& ids) const;

    size_t num_bytes() const {
        return text_.capacity() * sizeof(Token) + nodes_.capacity() * sizeof(Node) +
               edges_.num_bytes();
    }

  private:
    static constexpr int32_t kNone = INT32_MIN;  // no child

    struct Node {
        int32_t depth = 0;
        int32_t parent = -1;
        int32_t link = 0;
        int32_t count = 0;
        int32_t latest = 0;
        int32_t top = kNone;
    };

    static bool is_leaf(int32_t child) { return child < 0; }
    int32_t start(int32_t child) const { return is_leaf(child) ? ~child : nodes_[child].latest; }
    int32_t count(int32_t child) const { return is_leaf(child) ? 1 : nodes_[child].count; }
    Token first(int32_t node, int32_t child) const {
        return text_[start(child) + nodes_[node].depth];
    }
    int32_t edge_len(int32_t node, int32_t child) const {
        return is_leaf(child) ? INT32_MAX : nodes_[child].depth - nodes_[node].depth;
    }
    auto firsts() const {
        return [this](int32_t node, int32_t child) { return first(node, child); };
    }
    const ChildTable::Edge* find(int32_t node, Token token) const {
        return edges_.find(node, token, firsts());
    }

    void push(Token token);
    const ChildTable::Edge* settle(Locus& at, const Token* end) const;
    int32_t split(const ChildTable::Edge* edge, int32_t len);
    void add_leaf(int32_t node, Token token);
    int32_t favourite(int32_t node) const;

    std::vector<Token> text_;
    std::vector<Node> nodes_;
    ChildTable edges_;
    Locus active_;
    int32_t num_leaves_ = 0;
    Token separator_ = 0;
};

}  // namespace tokenspeed::drafts
