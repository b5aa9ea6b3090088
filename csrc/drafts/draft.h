// SPDX-License-Identifier: MIT
// What every drafter of this folder answers, and how it hashes. Knows no method of drafting.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenspeed::drafts {

using Token = int32_t;  // ids are not negative; below zero are separators, each of them unique

struct Draft {
    std::vector<Token> ids;
    int32_t match_len = 0;  // tokens that matched
};

// A place in [0, size) for `key`. `seed` is secret: nobody can aim at crowded places.
inline uint32_t place_of(uint64_t key, uint64_t seed, uint32_t size) {
    uint64_t x = (key ^ seed) * 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93;
    return static_cast<uint32_t>((x >> 32) * size >> 32);
}

}  // namespace tokenspeed::drafts
