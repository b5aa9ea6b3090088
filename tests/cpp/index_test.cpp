// SPDX-License-Identifier: MIT
// The prefix index against a map from token sequences to pages, and the order of eviction.
#include <list>
#include <map>
#include <random>
#include <vector>

#include "scheduler/check.h"
#include "scheduler/prefix_index.h"

namespace tokenspeed {

class PageTestAccess {
  public:
    static Settled settled(int32_t tokens) { return Committed(tokens).settled(0); }
};

namespace {

constexpr int kPageSize = 2;
using Tokens = std::vector<int32_t>;

struct Fixture {
    explicit Fixture(int num_pages)
        : pool(num_pages),
          index(pool, kPageSize, HashKey{1, 2},
                std::make_unique<RetainingLru>(num_pages, num_pages / 2)) {}

    SealedPage fresh() {
        return pool.seal(pool.open(pool.take()), PageTestAccess::settled(kPageSize));
    }
    Hash128 hash(const Tokens& tokens) const {
        Hash128 hash = index.root({});
        for (size_t at = 0; at < tokens.size(); at += kPageSize) {
            hash = index.link(hash, std::span(tokens).subspan(at, kPageSize));
        }
        return hash;
    }
    PageId find(const Tokens& tokens) const { return index.find(hash(tokens), tail(tokens)); }
    static std::span<const int32_t> tail(const Tokens& tokens) {
        return std::span(tokens).last(kPageSize);
    }
    void publish(const SealedPage& page, const Tokens& tokens, bool generated = false) {
        const Tokens parent(tokens.begin(), tokens.end() - kPageSize);
        index.publish(page, hash(parent), hash(tokens), tail(tokens), generated);
    }
    // A sequence of published pages, as a request that computed all of them holds it.
    PageList sequence(const Tokens& tokens, int num_prompt) {
        PageList list;
        for (size_t end = kPageSize; end <= tokens.size(); end += kPageSize) {
            const Tokens prefix(tokens.begin(), tokens.begin() + static_cast<int>(end));
            const PageId known = find(prefix);
            list.adopt(known == kNoPage ? fresh() : pool.share_kept(known));
            if (known != kNoPage) continue;
            publish(list.sealed(list.size() - 1), prefix, static_cast<int>(end) > num_prompt);
        }
        return list;
    }

    PagePool pool;
    PrefixIndex index;
};

// Finds, publishes, forgets, releases and takes pages at random. The model maps each sequence to
// the page that was published for it first; a page leaves the model when the pool hands it out.
void random_against_map(uint32_t seed) {
    std::mt19937 random(seed);
    Fixture f(6);
    std::map<Tokens, PageId> model;
    std::list<SealedPage> held;
    for (int i = 0; i < 20'000; ++i) {
        Tokens tokens(kPageSize * (1 + random() % 3));
        for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 2);
        const auto entry = model.find(tokens);
        TS_CHECK(f.find(tokens) == (entry == model.end() ? kNoPage : entry->second));
        if (entry != model.end() && random() % 2 == 0) {
            held.push_back(f.pool.share_kept(entry->second));
        } else if (entry != model.end() && random() % 8 == 0) {
            f.index.forget(f.pool.share_kept(entry->second));
            model.erase(entry);
        } else if (f.pool.num_available() > 0 && random() % 2 == 0) {
            held.push_back(f.fresh());
            std::erase_if(model, [&](const auto& e) { return e.second == held.back().id(); });
            f.publish(held.back(), tokens);
            model.emplace(tokens, held.back().id());
        }
        while (!held.empty() && random() % 2 == 0) {
            held.erase(std::next(held.begin(), static_cast<int>(random() % held.size())));
        }
    }
}

// Leaves go before the pages they build on, the least recently used branch first.
void leaves_first() {
    Fixture f(6);
    {
        const PageList older = f.sequence({1, 1, 2, 2, 3, 3}, 6);
    }
    {
        const PageList newer = f.sequence({1, 1, 4, 4, 5, 5}, 6);
    }
    std::vector<FreePage> taken;
    for (const Tokens& goes : std::vector<Tokens>{
             {1, 1, 2, 2, 3, 3}, {1, 1, 2, 2}, {1, 1, 4, 4, 5, 5}, {1, 1, 4, 4}, {1, 1}}) {
        TS_CHECK(f.find(goes) != kNoPage);
        while (f.find(goes) != kNoPage) taken.push_back(f.pool.take());
    }
    TS_CHECK(taken.size() == 6);
}

// What an earlier turn sampled goes first once the conversation went on without it, however recent.
void superseded_first() {
    Fixture f(6);
    {
        const PageList other = f.sequence({9, 9}, 2);
    }
    {
        const PageList turn = f.sequence({1, 1, 2, 2, 3, 3}, 2);
    }  // {2, 2, 3, 3} was sampled
    {
        const PageList next = f.sequence({1, 1, 4, 4}, 4);
    }
    std::vector<FreePage> taken;
    taken.push_back(f.pool.take());
    taken.push_back(f.pool.take());
    TS_CHECK(f.find({1, 1, 2, 2, 3, 3}) == kNoPage && f.find({1, 1, 2, 2}) != kNoPage);
    taken.push_back(f.pool.take());
    TS_CHECK(f.find({1, 1, 2, 2}) == kNoPage && f.find({9, 9}) != kNoPage);
    taken.push_back(f.pool.take());
    TS_CHECK(f.find({9, 9}) == kNoPage && f.find({1, 1, 4, 4}) != kNoPage);
}

// A hash alone is never believed.
void tokens_are_verified() {
    Fixture f(2);
    const PageList list = f.sequence({1, 2}, 2);
    const Tokens other = {1, 3};
    TS_CHECK(f.find({1, 2}) != kNoPage);
    TS_CHECK(f.index.find(f.hash({1, 2}), other) == kNoPage);
}

}  // namespace
}  // namespace tokenspeed

int main() {
    for (uint32_t seed = 0; seed < 10; ++seed) tokenspeed::random_against_map(seed);
    tokenspeed::leaves_first();
    tokenspeed::superseded_first();
    tokenspeed::tokens_are_verified();
    return 0;
}
