// SPDX-License-Identifier: MIT
// Finds sealed pages by what they hold: page k of a sequence is keyed by the chained hash of its
// salt and of all tokens up to the page's end. Keeps pages that no request uses until the pool
// needs them. Knows tokens and pages, no requests.
//
// Invariants:
//  X1  An entry is a sealed page whose tokens were written by a committed step.
//  X2  A hit's tokens are compared with the page's own; a hash alone is never believed.
//  X3  A page without users is in the eviction order exactly if it is an entry.
//  X4  Nothing depends on the order of the table: it is only ever probed, never iterated.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "scheduler/eviction.h"
#include "scheduler/ghosts.h"
#include "scheduler/hash.h"
#include "scheduler/pages.h"

namespace tokenspeed {

// A cache group says which pages of the prefix a request needs that resumes at a page boundary.
class CacheGroup {
  public:
    virtual ~CacheGroup() = default;
    // Resuming at token boundary * page_size reads pages [first_needed(boundary), boundary).
    // Never falls when the boundary grows.
    virtual int first_needed(int boundary) const = 0;
};

// Why a page of a prompt was not found.
enum class Miss : int32_t {
    kNone = 0,         // all that could be found was
    kDiverged = 1,     // the page before it is cached, and goes on otherwise
    kEvicted = 2,      // it was cached a while ago
    kNeverCached = 3,  // as far as anybody remembers
    kDisabled = 4,     // nobody looked
};

class FullAttention : public CacheGroup {
  public:
    int first_needed(int) const override { return 0; }
};

class PrefixIndex : public PageKeeper {
  public:
    PrefixIndex(PagePool& pool, int page_size, HashKey key, std::unique_ptr<EvictionPolicy> policy);
    ~PrefixIndex() override { clear(); }

    Hash128 root(std::span<const uint8_t> salt) const;
    // The link of one page: REQUIRES tokens.size() == page_size.
    Hash128 link(Hash128 parent, std::span<const int32_t> tokens) const;

    // The entry for this hash with these tokens, or kNoPage. Takes no reference.
    PageId find(Hash128 hash, std::span<const int32_t> tokens) const;
    // Makes the page findable; does nothing when an equal entry exists. `generated`: the page
    // holds sampled tokens, so only a continuation of this very sequence can ever ask for it.
    void publish(const SealedPage& page, Hash128 parent, Hash128 hash,
                 std::span<const int32_t> tokens, bool generated);
    // Forgets an entry; the page stays with its users.
    void forget(const SealedPage& page);
    // Drops every kept page; returns how many.
    int clear();
    // Drops one page. REQUIRES: it is an entry, and no one uses it.
    void drop(PageId page);

    // Marks an entry, in use or not; `unretain` takes the mark back. See EvictionPolicy::retain.
    void retain(PageId page, TimeUs deadline, bool pinned);
    void unretain(PageId page) { policy_->unretain(page); }
    void advance(TimeUs now) { policy_->advance(now); }
    // Why there is no entry for this hash; `parent`: the entry before it, or kNoPage.
    Miss why(Hash128 hash, PageId parent) const;
    // Of a run of entries from a root on: the index of the first page on which no other branch
    // builds, superseded ones not counted.
    int own_tail(std::span<const PageId> run) const;

    bool keep(PageId page) override;
    void reused(PageId page) override;
    PageId give_back() override;
    int num_kept() const override {
        if (!mutant(Mutant::kR3MarksHoldBack)) return num_kept_;
        return std::max(0, num_kept_ - policy_->num_retained() - policy_->num_pinned());
    }

    bool published(PageId page) const { return entries_[page].published; }
    Hash128 hash(PageId page) const { return entries_[page].hash; }
    std::span<const int32_t> tokens(PageId page) const {
        return {tokens_.get() + int64_t{page} * page_size_, static_cast<size_t>(page_size_)};
    }
    const EvictionPolicy& policy() const { return *policy_; }

  private:
    friend class Inspector;  // tests/cpp/explore_inspect.h
    struct Entry {
        Hash128 hash;
        PageId parent = kNoPage, first_child = kNoPage;
        PageId next_sibling = kNoPage, previous_sibling = kNoPage;
        bool published = false;
        bool generated = false;
        bool superseded = false;
    };

    int probe(Hash128 hash) const;
    void remove(PageId page);
    void table_erase(PageId page);
    void attach(PageId page, PageId parent);
    void detach(PageId page);
    void supersede_siblings(PageId page);
    bool can_supersede(PageId page) const;
    void supersede(PageId top);

    PagePool& pool_;
    int page_size_;
    HashKey key_;
    std::unique_ptr<EvictionPolicy> policy_;
    int num_kept_ = 0;
    std::vector<Entry> entries_;         // [num_pages]
    std::unique_ptr<int32_t[]> tokens_;  // [num_pages, page_size], touched when published
    std::vector<PageId> table_;          // open addressing, linear probing, power of two
    std::vector<PageId> walk_;           // reused by supersede
    Ghosts ghosts_;
};

}  // namespace tokenspeed
