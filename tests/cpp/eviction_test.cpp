// SPDX-License-Identifier: MIT
// The order of eviction against a model that sorts all pages from scratch after each call, and what
// retention promises, in words.
#include "scheduler/eviction.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <tuple>
#include <vector>

#include "scheduler/check.h"
#include "scheduler/ghosts.h"

namespace tokenspeed {
namespace {

using Pages = std::vector<PageId>;

// Follows the text of eviction.h, with no list and no tree.
class Model {
  public:
    Model(int num_pages, int max_marked) : max_marked_(max_marked), pages_(num_pages) {}

    bool idle(PageId page) const { return pages_[page].idle; }
    bool pinned(PageId page) const { return pages_[page].pinned; }
    void enter(PageId page) {
        Page& p = pages_[page];
        p.idle = true;
        p.stale = 0;
        p.tick = ++tick_;
        if (!p.pinned && p.deadline <= now_) p.marked = 0;
    }
    void leave(PageId page) { pages_[page].idle = false; }
    void supersede(PageId page) {
        clear(page);
        pages_[page].stale = --stale_;
    }
    void retain(PageId page, TimeUs deadline, bool pinned) {
        Page& p = pages_[page];
        if (!pinned && !p.pinned && std::max(p.deadline, deadline) <= now_) return;
        p.deadline = std::max(p.deadline, deadline);
        p.pinned |= pinned;
        p.marked = ++grants_;
        while (std::ssize(marks()) > max_marked_) unretain(marks().front());
        if (p.idle) enter(page);
    }
    void unretain(PageId page) {
        const bool held = pages_[page].idle && (pages_[page].pinned || pages_[page].deadline > 0);
        clear(page);
        if (held) enter(page);
    }
    void advance(TimeUs now) {
        now_ = now;
        for (Page& p : pages_) {
            if (p.idle && !p.pinned && p.deadline <= now_) p.marked = 0;
        }
    }
    Pages marks() const {
        return sorted([](const Page& p) { return p.marked > 0; },
                      [](const Page& p) { return std::tuple(p.pinned, p.marked, 0); });
    }
    Pages order() const {
        return sorted([](const Page& p) { return p.idle; },
                      [](const Page& p) {
                          if (p.stale < 0) return std::tuple(0, p.stale, int64_t{0});
                          if (p.pinned) return std::tuple(4, p.tick, int64_t{0});
                          if (p.marked > 0) return std::tuple(3, p.deadline, p.tick);
                          return std::tuple(p.deadline > 0 ? 2 : 1, p.tick, int64_t{0});
                      });
    }

  private:
    struct Page {
        bool idle = false, pinned = false;
        int64_t stale = 0, tick = 0, deadline = 0, marked = 0;
    };
    void clear(PageId page) {
        pages_[page].pinned = false;
        pages_[page].deadline = pages_[page].marked = 0;
    }
    template <class Keep, class Key>
    Pages sorted(Keep keep, Key key) const {
        Pages all;
        for (PageId page = 0; page < std::ssize(pages_); ++page) {
            if (keep(pages_[page])) all.push_back(page);
        }
        std::ranges::sort(all, {}, [&](PageId page) { return key(pages_[page]); });
        return all;
    }
    int max_marked_;
    TimeUs now_ = 0;
    int64_t tick_ = 0, stale_ = 0, grants_ = 0;
    std::vector<Page> pages_;
};

void compare(const RetainingLru& policy, const Model& model) {
    Pages order, marks;
    policy.order(order);
    policy.marks(marks);
    TS_CHECK(order == model.order());
    TS_CHECK(marks == model.marks());
    TS_CHECK(policy.victim() == (order.empty() ? kNoPage : order.front()));
    TS_CHECK(policy.num_retained() + policy.num_pinned() == std::ssize(marks));
    TS_CHECK(policy.num_pinned() ==
             std::ranges::count_if(marks, [&](PageId page) { return model.pinned(page); }));
}

void random_against_model(uint32_t seed) {
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    const int num_pages = 1 + below(12);
    const int max_marked = below(num_pages + 1);
    RetainingLru policy(num_pages, max_marked);
    Model model(num_pages, max_marked);
    TimeUs now = 0;
    for (int i = 0; i < 4'000; ++i) {
        const PageId page = below(num_pages);
        const bool idle = model.idle(page);
        const int choice = below(16);
        if (choice < 7 && !idle) {
            policy.idle(page);
            model.enter(page);
        } else if (choice < 5) {
            policy.removed(page);
            model.leave(page);
        } else if (choice < 7 && !model.pinned(page)) {
            policy.superseded(page);
            model.supersede(page);
        } else if (choice == 7 && idle) {
            policy.postpone(page);
            model.enter(page);
        } else if (choice < 12) {
            const TimeUs deadline = below(4) == 0 ? 0 : now + below(20);
            const bool pinned = below(5) == 0;
            policy.retain(page, deadline, pinned);
            model.retain(page, deadline, pinned);
        } else if (choice == 12) {
            policy.unretain(page);
            model.unretain(page);
        } else {
            now += below(8);
            policy.advance(now);
            model.advance(now);
        }
        compare(policy, model);
    }
}

// Superseded, plain, past the deadline, retained, pinned.
void in_the_order_of_the_header() {
    RetainingLru policy(6, 6);
    policy.retain(0, 50, true);
    policy.retain(1, 90, false);
    policy.retain(2, 80, false);
    policy.retain(3, 10, false);
    for (PageId page = 0; page < 6; ++page) policy.idle(page);
    policy.superseded(5);
    policy.advance(60);
    Pages order;
    policy.order(order);
    TS_CHECK((order == Pages{5, 4, 3, 2, 1, 0}));
    TS_CHECK(policy.num_retained() == 2 && policy.num_pinned() == 1);
}

// Beyond the budget the oldest marks go, and pins after all others.
void the_oldest_marks_go_first() {
    RetainingLru policy(6, 3);
    for (PageId page = 0; page < 6; ++page) policy.idle(page);
    policy.retain(0, 0, true);
    for (PageId page = 1; page < 5; ++page) policy.retain(page, 100 - page, false);
    Pages marks;
    policy.marks(marks);
    TS_CHECK((marks == Pages{3, 4, 0}));
    policy.retain(5, 0, true);
    policy.retain(1, 0, true);
    policy.retain(2, 100, false);  // no room beside pins
    marks.clear();
    policy.marks(marks);
    TS_CHECK((marks == Pages{0, 5, 1}));
    policy.retain(4, 0, true);
    marks.clear();
    policy.marks(marks);
    TS_CHECK((marks == Pages{5, 1, 4}));
}

// Many deadlines may pass at once; a call moves a bounded number, and no victim is wrong.
void expiry_is_bounded() {
    constexpr int kPages = 1000;
    RetainingLru policy(kPages, kPages);
    for (PageId page = 0; page < kPages; ++page) {
        policy.retain(page, 1 + page % 7, false);
        policy.idle(page);
    }
    policy.advance(100);
    TS_CHECK(policy.num_retained() > 0);
    TS_CHECK(policy.deadline(policy.victim()) <= 100);
    for (int i = 0; i < 4; ++i) policy.advance(100);
    TS_CHECK(policy.num_retained() == 0);
    Pages order;
    policy.order(order);
    TS_CHECK(std::ranges::is_sorted(order));  // least recently used first
}

void ghosts_remember_in_bounded_memory() {
    std::mt19937_64 random(7);
    Ghosts ghosts(4096);
    std::vector<Hash128> added;
    for (int i = 0; i < 100'000; ++i) {
        const Hash128 hash{random(), random()};
        TS_CHECK(!ghosts.contains(hash));
        ghosts.add(hash);
        ghosts.add(hash);  // once is enough
        TS_CHECK(ghosts.contains(hash));
        added.push_back(hash);
    }
    const auto remembered =
        std::ranges::count_if(added, [&](Hash128 h) { return ghosts.contains(h); });
    TS_CHECK(remembered == 4096);
    const auto late = std::ranges::count_if(added.end() - 1024, added.end(),
                                            [&](Hash128 h) { return ghosts.contains(h); });
    TS_CHECK(late > 1000);
}

}  // namespace
}  // namespace tokenspeed

int main() {
    for (uint32_t seed = 0; seed < 60; ++seed) tokenspeed::random_against_model(seed);
    tokenspeed::in_the_order_of_the_header();
    tokenspeed::the_oldest_marks_go_first();
    tokenspeed::expiry_is_bounded();
    tokenspeed::ghosts_remember_in_bounded_memory();
    return 0;
}
