// SPDX-License-Identifier: MIT
// Which kept page goes first. Knows page ids and an order, no hashes, no tokens.
#pragma once

#include <span>
#include <vector>

#include "scheduler/pages.h"

namespace tokenspeed {

// All operations O(1). A page is in the order from `idle` until `removed`.
class EvictionPolicy {
  public:
    virtual ~EvictionPolicy() = default;
    virtual void idle(PageId page) = 0;        // no one uses it any more
    virtual void removed(PageId page) = 0;     // used again, or dropped
    virtual void superseded(PageId page) = 0;  // REQUIRES: idle; a newer branch took its place
    virtual void postpone(PageId page) = 0;    // REQUIRES: idle; others still build on it
    virtual PageId victim() const = 0;         // kNoPage when nothing is idle
    virtual void order(std::vector<PageId>& pages) const = 0;  // appends, next victim first
};

// Superseded branches first (deepest first, as `superseded` is called from the root down), then
// the least recently used.
class SupersededThenLru : public EvictionPolicy {
  public:
    explicit SupersededThenLru(int num_pages) : links_(num_pages + 2) {
        for (int list : {0, 1}) links_[num_pages + list] = {num_pages + list, num_pages + list};
    }
    void idle(PageId page) override { insert_before(page, lru()); }
    void removed(PageId page) override { unlink(page); }
    void superseded(PageId page) override {
        unlink(page);
        insert_before(page, links_[stale()].next);
    }
    void postpone(PageId page) override {
        unlink(page);
        insert_before(page, lru());
    }
    PageId victim() const override {
        if (links_[stale()].next != stale()) return links_[stale()].next;
        return links_[lru()].next != lru() ? links_[lru()].next : kNoPage;
    }
    void order(std::vector<PageId>& pages) const override {
        for (int list : {stale(), lru()}) {
            for (int at = links_[list].next; at != list; at = links_[at].next) pages.push_back(at);
        }
    }

  private:
    struct Link {
        int32_t previous, next;
    };
    int stale() const { return static_cast<int>(links_.size()) - 2; }
    int lru() const { return static_cast<int>(links_.size()) - 1; }
    void insert_before(int page, int next) {
        links_[page] = {links_[next].previous, next};
        links_[links_[page].previous].next = page;
        links_[next].previous = page;
    }
    void unlink(int page) {
        links_[links_[page].previous].next = links_[page].next;
        links_[links_[page].next].previous = links_[page].previous;
    }
    std::vector<Link> links_;  // [num_pages] and the heads of the two lists
};

}  // namespace tokenspeed
