// SPDX-License-Identifier: MIT
// Remembers which hashes left the prefix index a while ago, in bounded memory. It may forget, and
// it decides nothing: it only says why a page was not found. Knows hashes.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "scheduler/hash.h"

namespace tokenspeed {

// Sets of eight fingerprints, the latest first: one cache line a look. O(1).
class Ghosts {
  public:
    explicit Ghosts(int capacity)
        : sets_(std::bit_ceil(static_cast<size_t>(std::max(capacity, kWays)) / kWays)) {}

    void add(Hash128 hash) {
        Set& set = sets_[hash.low & (sets_.size() - 1)];
        uint64_t* const end = set.of + kWays;
        uint64_t* const old = std::find(set.of, end - 1, fingerprint(hash));
        std::move_backward(set.of, old, old + 1);
        set.of[0] = fingerprint(hash);
    }
    bool contains(Hash128 hash) const {
        const Set& set = sets_[hash.low & (sets_.size() - 1)];
        return std::find(set.of, set.of + kWays, fingerprint(hash)) != set.of + kWays;
    }

  private:
    static constexpr int kWays = 8;
    struct alignas(64) Set {
        uint64_t of[kWays] = {};  // 0: empty
    };
    static uint64_t fingerprint(Hash128 hash) { return hash.high | 1; }
    std::vector<Set> sets_;
};

}  // namespace tokenspeed
