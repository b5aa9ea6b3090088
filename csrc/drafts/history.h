// SPDX-License-Identifier: MIT
// The tokens of one session, turn after turn, and their suffix tree. Knows one sequence of tokens
// at a time: the turn's prompt and output. Knows no ids of requests and no salts.
//
// A turn that goes on otherwise than the last one (its answer was rendered anew) keeps the tree:
// the text then has a separator, the last kContext tokens that both share, and what is new. What
// was dropped is still found by matches.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "drafts/suffix_tree.h"

namespace tokenspeed::drafts {

// Tokens before a match's end that a shared store looks at, and that a resumed history repeats.
inline constexpr int32_t kContext = 64;

class History {
  public:
    explicit History(uint64_t seed) : tree_(seed) {}

    // How many tokens of `prompt` would not be built anew; 0 if that is less than half the text, so
    // that what was dropped never outweighs what is used.
    size_t usable(std::span<const Token> prompt) const;
    // The sequence is now `prompt`.
    void begin(std::span<const Token> prompt);
    void extend(Token token) {
        tree_.append(token);
        ++length_;
    }

    const SuffixTree& tree() const { return tree_; }
    size_t length() const { return length_; }  // of the sequence
    // The sequence's first tokens in order. REQUIRES: length <= length().
    template <class Visit>
    void each(size_t length, const Visit& visit) const {
        for (const Piece& piece : pieces_) {
            const bool last = &piece == &pieces_.back();
            const size_t count = last ? length : std::min(length, piece.length);
            for (const Token token : tree_.text().subspan(piece.begin, count)) visit(token);
            length -= count;
        }
    }
    // What extend() brought since begin().
    std::span<const Token> output() const { return tree_.text().subspan(output_); }
    // The last kContext tokens of the sequence, or all.
    std::span<const Token> context() const;

  private:
    struct Piece {
        size_t begin;   // in the text
        size_t length;  // the last one's is not kept
    };

    size_t shared(std::span<const Token> prompt) const;
    void cut(size_t length);

    SuffixTree tree_;
    std::vector<Piece> pieces_;  // the sequence, in the text
    size_t length_ = 0;          // of the sequence
    size_t output_ = 0;          // in the text
};

}  // namespace tokenspeed::drafts
