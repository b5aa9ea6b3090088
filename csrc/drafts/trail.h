// SPDX-License-Identifier: MIT
// Where a request copies from, although it changes something now and then: an edited file goes on
// behind the change where the original does. Knows one text and places in it; no tree, no drafts.
//
//   original   a b c d e | f g h i j
//   copy       a b c d e | x y | f g ...
//                        ^       ^ resume(): f follows what is before the place, near the trail
//                        place(): behind the last token copied
//
// 1. place() is 0 (nothing is copied) or in [1, size of the text).
// 2. No place is behind the tokens that it is asked for: what it proposes was there before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "drafts/draft.h"

namespace tokenspeed::drafts {

class Trail {
  public:
    static constexpr int32_t kLong = 8;  // tokens of a match that is taken for copying

    struct Place {
        size_t next = 0;    // index of the token that may come; 0: no place
        int32_t match = 0;  // tokens before it that are those at the text's end
    };

    // The text has one more token, the last of `text`. `known`: the index behind an earlier
    // occurrence of its last kLong tokens or more; 0: there is none.
    void extend(std::span<const Token> text, size_t known);
    size_t place() const { return place_; }
    // The likeliest place to go on after a change: the longest match near the trail, and of equals
    // the nearest one behind it. REQUIRES: `text` is that of the last extend().
    Place resume(std::span<const Token> text) const;

  private:
    static constexpr int32_t kPatience = 64;  // tokens until it is given up
    static constexpr size_t kBack = 64, kAhead = 256;
    static constexpr int32_t kMostMatch = 16;

    static int32_t match(std::span<const Token> text, size_t next);

    size_t place_ = 0;
    int32_t num_lost_ = 0;  // tokens since one was copied
};

}  // namespace tokenspeed::drafts
