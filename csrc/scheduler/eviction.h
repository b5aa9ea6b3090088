// SPDX-License-Identifier: MIT
// Which kept page goes first, and which pages are under retention. Knows page ids, times and an
// order; no hashes, no tokens, no clock of its own.
#pragma once

#include <compare>
#include <cstdint>
#include <set>
#include <vector>

#include "scheduler/pages.h"

namespace tokenspeed {

using TimeUs = int64_t;  // microseconds on the caller's monotonic clock

// A page is in the order from `idle` until `removed`. Retention is a mark on a page, in use or not.
class EvictionPolicy {
  public:
    virtual ~EvictionPolicy() = default;
    virtual void idle(PageId page) = 0;        // no one uses it any more
    virtual void removed(PageId page) = 0;     // used again, or dropped
    virtual void superseded(PageId page) = 0;  // REQUIRES: idle; a newer branch took its place
    virtual void postpone(PageId page) = 0;    // REQUIRES: idle; others still build on it
    virtual PageId victim() const = 0;         // kNoPage when nothing is idle
    virtual void order(std::vector<PageId>& pages) const = 0;  // appends, next victim first

    // Extends the page's mark. Marks beyond the budget are taken back, the oldest first, so call
    // it for the deepest page of a branch first.
    virtual void retain(PageId page, TimeUs deadline, bool pinned) = 0;
    virtual void unretain(PageId page) = 0;  // takes the mark back
    virtual void advance(TimeUs now) = 0;    // time never goes back
    virtual bool pinned(PageId page) const = 0;
    virtual TimeUs deadline(PageId page) const = 0;  // 0: none
    virtual void marks(
        std::vector<PageId>& pages) const = 0;  // appends, next to be taken back first
    virtual int num_retained() const = 0;       // pages marked, pinned ones not counted
    virtual int num_pinned() const = 0;
};

// Doubly linked lists over page ids; a page is in one of them at most. All O(1).
class PageRings {
  public:
    PageRings(int num_pages, int num_rings);
    PageId front(int ring) const {
        const int first = links_[head(ring)].next;
        return first == head(ring) ? kNoPage : first;
    }
    void push_front(int ring, PageId page) { insert_before(page, links_[head(ring)].next); }
    void push_back(int ring, PageId page) { insert_before(page, head(ring)); }
    void unlink(PageId page);
    void list(int ring, std::vector<PageId>& pages) const;  // appends

  private:
    struct Link {
        int32_t previous, next;
    };
    int head(int ring) const { return num_pages_ + ring; }
    void insert_before(int page, int next);

    int num_pages_;
    std::vector<Link> links_;  // [num_pages], then the heads
};

// In this order:
//   1. superseded branches, deepest page first (`superseded` is called from the root down)
//   2. pages without a mark, least recently used first
//   3. pages whose deadline passed, least recently used first
//   4. retained pages, earliest deadline first
//   5. pinned pages, least recently used first
// 1 and 2 cost O(1) a page, the others O(log(pages with a mark)). At most `max_marked` pages are
// marked (4, 5, and those in use); beyond it the oldest marks go, pins only when nothing else is
// left. A mark never keeps a page from being a victim when there is no other.
class RetainingLru : public EvictionPolicy {
  public:
    RetainingLru(int num_pages, int max_marked)
        : max_marked_(max_marked), pages_(num_pages), lists_(num_pages, 2), marks_(num_pages, 2) {}

    void idle(PageId page) override { put_in(page); }
    void removed(PageId page) override { take_out(page); }
    void superseded(PageId page) override;
    void postpone(PageId page) override;
    PageId victim() const override;
    void order(std::vector<PageId>& pages) const override;

    void retain(PageId page, TimeUs deadline, bool pinned) override;
    void unretain(PageId page) override;
    void advance(TimeUs now) override;
    bool pinned(PageId page) const override { return pages_[page].pinned; }
    TimeUs deadline(PageId page) const override { return pages_[page].deadline; }
    void marks(std::vector<PageId>& pages) const override;
    int num_retained() const override { return num_marked_[kTimed]; }
    int num_pinned() const override { return num_marked_[kPinned]; }

  private:
    friend class Inspector;               // tests/cpp/explore_inspect.h
    enum List : int { kStale, kLru };     // of lists_
    enum Mark : int { kTimed, kPinned };  // of marks_, in order of granting
    enum class Place : uint8_t { kOut, kListed, kHeld };
    enum class Rank : uint8_t { kExpired, kRetained, kPinned };
    struct Held {  // one of 3 to 5
        Rank rank;
        int64_t order;  // deadline of retained ones, else the tick
        int64_t tick;
        PageId page;
        friend auto operator<=>(const Held&, const Held&) = default;
    };
    struct Page {
        TimeUs deadline = 0;
        int64_t tick = 0;  // when it became idle
        Place place = Place::kOut;
        bool pinned = false;
        bool marked = false;  // in marks_
    };
    static constexpr int kExpiries = 256;  // a call of `advance`: later ones stand first anyway

    Held held(PageId page) const;
    void put_in(PageId page);
    void take_out(PageId page);
    void mark(PageId page);
    void unmark(PageId page);

    int max_marked_;
    TimeUs now_ = 0;
    int64_t tick_ = 0;
    int num_marked_[2] = {0, 0};
    std::vector<Page> pages_;
    PageRings lists_, marks_;
    std::set<Held> held_;
};

}  // namespace tokenspeed
