// SPDX-License-Identifier: MIT
#include "drafts/ngram_drafter.h"

#include <algorithm>

namespace tokenspeed::drafts {

// The longest n-gram of interest that ends at `end`; below min_n_ if there is none.
int32_t NgramIndex::max_n(size_t end) const {
    return static_cast<int32_t>(std::min(end, min_n_ + tables_.size() - 1));
}

// Of the n-grams that end at `end`, from n = 1 to max_n(end).
NgramIndex::Hashes NgramIndex::hashes(size_t end) const {
    Hashes hashes;
    uint64_t hash = seed_;
    for (int32_t n = 1; n <= max_n(end); ++n) {
        hash = (hash ^ static_cast<uint32_t>(text_[end - n])) * 0x9e3779b97f4a7c15;
        hash ^= hash >> 29;
        hashes.of[n] = hash;
    }
    return hashes;
}

// Where the n-gram that ends at `end` stands in the table, or the free place for it.
uint32_t NgramIndex::find(const Table& table, int32_t n, size_t end, uint64_t hash) const {
    const auto size = static_cast<uint32_t>(table.ends.size());
    const Token* const gram = text_.data() + end - n;
    uint32_t at = place_of(hash, seed_, size);
    for (; table.ends[at] != 0; at = at + 1 == size ? 0 : at + 1) {
        if (std::equal(gram, gram + n, text_.data() + table.ends[at] - n)) break;
    }
    return at;
}

void NgramIndex::put(Table& table, int32_t n, size_t end, uint64_t hash) {
    if ((table.num_used + 1) * 4 > table.ends.size() * 3) grow(table, n);
    int32_t& place = table.ends[find(table, n, end, hash)];
    table.num_used += place == 0;
    place = static_cast<int32_t>(end);
}

void NgramIndex::grow(Table& table, int32_t n) const {
    std::vector<int32_t> old(table.ends.size() + table.ends.size() / 2);
    old.swap(table.ends);
    for (const int32_t end : old) {
        if (end != 0) table.ends[find(table, n, end, hashes(end).of[n])] = end;
    }
}

void NgramIndex::append(std::span<const Token> tokens) {
    for (const Token token : tokens) {
        const size_t end = text_.size();
        const Hashes known = hashes(end);
        for (int32_t n = min_n_; n <= max_n(end); ++n) {
            put(tables_[n - min_n_], n, end, known.of[n]);
        }
        text_.push_back(token);
    }
}

Draft NgramIndex::propose(size_t max_tokens) const {
    const size_t size = text_.size();
    const Hashes known = hashes(size);
    Draft draft;
    for (int32_t n = max_n(size); n >= min_n_; --n) {
        const Table& table = tables_[n - min_n_];
        const auto end = static_cast<size_t>(table.ends[find(table, n, size, known.of[n])]);
        if (end == 0) continue;
        draft.match_len = n;
        for (size_t i = 0; i < max_tokens; ++i) {
            const size_t at = end + i;
            draft.ids.push_back(at < size ? text_[at] : draft.ids[at - size]);
        }
        break;
    }
    return draft;
}

size_t NgramIndex::num_bytes() const {
    size_t bytes = text_.capacity() * sizeof(Token);
    for (const Table& table : tables_) bytes += table.ends.capacity() * sizeof(int32_t);
    return bytes;
}

size_t NgramDrafter::num_tokens() const {
    size_t tokens = 0;
    for (const auto& [id, index] : requests_) tokens += index.size();
    return tokens;
}

size_t NgramDrafter::num_bytes() const {
    size_t bytes = 0;
    for (const auto& [id, index] : requests_) bytes += index.num_bytes();
    return bytes;
}

}  // namespace tokenspeed::drafts
