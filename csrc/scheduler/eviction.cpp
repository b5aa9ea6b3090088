// SPDX-License-Identifier: MIT
#include "scheduler/eviction.h"

#include <algorithm>

namespace tokenspeed {

PageRings::PageRings(int num_pages, int num_rings)
    : num_pages_(num_pages), links_(num_pages + num_rings) {
    for (int ring = 0; ring < num_rings; ++ring) links_[head(ring)] = {head(ring), head(ring)};
}

void PageRings::insert_before(int page, int next) {
    links_[page] = {links_[next].previous, next};
    links_[links_[page].previous].next = page;
    links_[next].previous = page;
}

void PageRings::unlink(PageId page) {
    links_[links_[page].previous].next = links_[page].next;
    links_[links_[page].next].previous = links_[page].previous;
}

void PageRings::list(int ring, std::vector<PageId>& pages) const {
    for (int at = links_[head(ring)].next; at != head(ring); at = links_[at].next) {
        pages.push_back(at);
    }
}

RetainingLru::Held RetainingLru::held(PageId page) const {
    const Page& p = pages_[page];
    if (p.pinned) return {Rank::kPinned, p.tick, p.tick, page};
    if (p.marked) return {Rank::kRetained, p.deadline, p.tick, page};
    return {Rank::kExpired, p.tick, p.tick, page};
}

void RetainingLru::put_in(PageId page) {
    Page& p = pages_[page];
    p.tick = ++tick_;
    if (p.deadline == 0 && !p.pinned) {
        p.place = Place::kListed;
        return lists_.push_back(kLru, page);
    }
    if (!p.pinned && p.deadline <= now_) unmark(page);
    p.place = Place::kHeld;
    held_.insert(held(page));
}

void RetainingLru::take_out(PageId page) {
    Page& p = pages_[page];
    if (p.place == Place::kListed) lists_.unlink(page);
    if (p.place == Place::kHeld) held_.erase(held(page));
    p.place = Place::kOut;
}

void RetainingLru::superseded(PageId page) {
    take_out(page);
    unretain(page);
    pages_[page].place = Place::kListed;
    lists_.push_front(kStale, page);
}

void RetainingLru::postpone(PageId page) {
    take_out(page);
    put_in(page);
}

PageId RetainingLru::victim() const {
    for (List list : {kStale, kLru}) {
        if (const PageId page = lists_.front(list); page != kNoPage) return page;
    }
    return held_.empty() ? kNoPage : held_.begin()->page;
}

void RetainingLru::order(std::vector<PageId>& pages) const {
    for (List list : {kStale, kLru}) lists_.list(list, pages);
    for (const Held& held : held_) pages.push_back(held.page);
}

void RetainingLru::marks(std::vector<PageId>& pages) const {
    for (Mark kind : {kTimed, kPinned}) marks_.list(kind, pages);
}

void RetainingLru::mark(PageId page) {
    Page& p = pages_[page];
    const Mark kind = p.pinned ? kPinned : kTimed;
    marks_.push_back(kind, page);
    ++num_marked_[kind];
    p.marked = true;
}

void RetainingLru::unmark(PageId page) {
    Page& p = pages_[page];
    if (!p.marked) return;
    marks_.unlink(page);
    --num_marked_[p.pinned ? kPinned : kTimed];
    p.marked = false;
}

void RetainingLru::retain(PageId page, TimeUs deadline, bool pinned) {
    Page& p = pages_[page];
    const TimeUs latest = std::max(p.deadline, deadline);
    if (!pinned && !p.pinned && latest <= now_) return;
    const bool idle = p.place != Place::kOut;
    take_out(page);
    unmark(page);
    p.deadline = latest;
    p.pinned |= pinned;
    mark(page);
    while (num_marked_[kTimed] + num_marked_[kPinned] > max_marked_ &&
           !mutant(Mutant::kR1BudgetIgnored)) {
        unretain(marks_.front(num_marked_[kTimed] > 0 ? kTimed : kPinned));
    }
    if (idle) put_in(page);
}

void RetainingLru::unretain(PageId page) {
    Page& p = pages_[page];
    const bool idle = p.place == Place::kHeld;
    if (idle) take_out(page);
    unmark(page);
    p.deadline = 0;
    p.pinned = false;
    if (idle) put_in(page);
}

void RetainingLru::advance(TimeUs now) {
    now_ = std::max(now_, now);
    for (int i = 0; i < kExpiries; ++i) {
        const auto next = held_.lower_bound({Rank::kRetained, INT64_MIN, 0, 0});
        if (next == held_.end() || next->rank != Rank::kRetained || next->order > now_) return;
        const PageId page = next->page;
        held_.erase(next);
        unmark(page);
        held_.insert(held(page));
    }
}

}  // namespace tokenspeed
