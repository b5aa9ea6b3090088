// SPDX-License-Identifier: MIT
// Reads a scheduler's private state for the explorer: a canonical hash in which everything counts
// that a later plan can depend on, and which pages are where. Changes nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "scheduler/scheduler.h"

namespace tokenspeed {

class Digest {
  public:
    void add(uint64_t word) {
        state_ = (state_ ^ word) * 0x9e3779b97f4a7c15;
        state_ ^= state_ >> 29;
        state_ *= 0xbf58476d1ce4e5b9;
        state_ ^= state_ >> 32;
    }
    uint64_t value() const { return state_; }

  private:
    uint64_t state_ = 0x243f6a8885a308d3;
};

// Names things in the order in which they are first mentioned: what differs only by which page or
// slot happened to be free looks the same.
class Names {
  public:
    explicit Names(int count) : names_(count, -1) {}
    uint64_t of(int thing) {
        if (thing < 0) return ~uint64_t{0};
        if (names_[thing] < 0) names_[thing] = next_++;
        return static_cast<uint64_t>(names_[thing]);
    }

  private:
    std::vector<int> names_;
    int next_ = 0;
};

class Inspector {
  public:
    explicit Inspector(const Scheduler& scheduler) : s_(scheduler) {}

    bool is_free_or_kept(PageId page) const { return s_.pool_.num_users(page) == 0; }
    bool is_published(PageId page) const { return s_.index_.published(page); }
    bool finds(Hash128 hash) const {
        return std::ranges::any_of(s_.index_.entries_, [&](const auto& entry) {
            return entry.published && entry.hash == hash;
        });
    }
    int num_published() const {
        return static_cast<int>(std::ranges::count_if(
            s_.index_.entries_, [](const auto& entry) { return entry.published; }));
    }
    Hash128 hash(PageId page) const { return s_.index_.hash(page); }
    const PrefixIndex& index() const { return s_.index_; }
    // Pages that anybody could still take, less those that were promised.
    int64_t num_unpromised() const {
        return s_.pool_.num_available() - s_.ledger_.soft - s_.ledger_.firm;
    }

    // `shares`: there is more than one user.
    uint64_t canonical_hash(bool shares) const {
        Digest digest;
        Names pages(s_.pool_.num_pages()), slots(s_.slots_.num_slots());
        const std::vector<const Request*> all = s_.all_requests();
        for (const Request* request : all) add_request(*request, all, digest, pages, slots);
        add_index(digest, pages);
        if (shares) add_shares(all, digest);
        for (const auto& step : s_.in_flight_) {
            digest.add(step.rows.size());
            for (const auto& row : step.rows) {
                const auto who = std::ranges::find(all, row.request) - all.begin();
                for (uint64_t word : {uint64_t(who), slots.of(row.slot), uint64_t(row.start),
                                      uint64_t(row.num_tokens), uint64_t(row.samples()),
                                      uint64_t(row.num_propose), uint64_t(row.num_draft())}) {
                    digest.add(word);
                }
                for (int32_t id : row.draft) digest.add(static_cast<uint64_t>(id));
            }
        }
        return digest.value();
    }

  private:
    void add_request(const Request& request, const std::vector<const Request*>& all, Digest& digest,
                     Names& pages, Names& slots) const {
        uint64_t twin = 0;  // its rank, 0 for none
        for (size_t i = 0; i < all.size() && request.twin_pages > 0; ++i) {
            if (all[i]->arrival == request.twin) twin = i + 1;
        }
        for (uint64_t word :
             {request.id, uint64_t(request.state.index()), uint64_t(request.retractions),
              uint64_t(request.num_cached), uint64_t(request.refused_at == s_.room_version_), twin,
              uint64_t(request.twin_pages), uint64_t(request.tainted), s_.turn(request),
              uint64_t(request.reported), uint64_t(request.tokens.size())}) {
            digest.add(word);
        }
        for (int32_t token : request.tokens) digest.add(static_cast<uint64_t>(token));
        digest.add(uint64_t(request.num_propose) << 32 | request.draft.size());
        for (int32_t id : request.draft) digest.add(static_cast<uint64_t>(id));
        const Holdings* held = holdings(request.state);
        if (held == nullptr) return;
        for (uint64_t word :
             {slots.of(held->slot.id()), uint64_t(held->settled), uint64_t(held->scheduled),
              uint64_t(held->promise.firm()), uint64_t(held->promise.num_left()),
              uint64_t(held->pages.num_sealed()), uint64_t(held->pages.size())}) {
            digest.add(word);
        }
        for (int i = 0; i < held->pages.size(); ++i) digest.add(pages.of(held->pages.id(i)));
    }

    // Marks in order of granting, and when pages became idle: their deadlines' order hides it.
    void add_retention(Digest& digest, Names& pages) const {
        const auto& policy = static_cast<const RetainingLru&>(s_.index_.policy());
        std::vector<PageId> marks, idle;
        policy.marks(marks);
        for (PageId page : marks) digest.add(pages.of(page));
        bool any = false;
        for (PageId page = 0; page < s_.pool_.num_pages(); ++page) {
            const TimeUs deadline = policy.deadline(page);
            any |= deadline > 0 || policy.pinned(page);
            if (is_published(page) && s_.pool_.num_users(page) == 0) idle.push_back(page);
        }
        if (!any) return;
        std::ranges::sort(idle, {}, [&](PageId page) { return policy.pages_[page].tick; });
        for (PageId page : idle) digest.add(pages.of(page));
    }
    uint64_t retention_of(PageId page) const {
        const auto& policy = static_cast<const RetainingLru&>(s_.index_.policy());
        const TimeUs deadline = policy.deadline(page);
        const TimeUs left = deadline == 0 ? 0 : std::max<TimeUs>(deadline - s_.now_, 0) + 1;
        return uint64_t(left) << 2 | uint64_t(policy.pinned(page)) << 1 |
               uint64_t(policy.pages_[page].marked);
    }

    // One user alone is served in order of arrival, whatever its tag.
    void add_shares(const std::vector<const Request*>& all, Digest& digest) const {
        for (const Request* request : all) {
            digest.add(request->user == nullptr ? 0 : request->user->key);
        }
        std::map<uint64_t, uint64_t> tags;
        for (const auto& [key, user] : s_.waiting_.users_) tags.emplace(key, user.tag);
        for (const auto& [key, tag] : tags) {
            digest.add(key);
            digest.add(tag);
        }
        digest.add(s_.waiting_.highest_tag_);
        digest.add(s_.waiting_.virtual_time());
        for (const auto& [arrival, entry] : s_.waiting_.all()) digest.add(entry.num_passed);
    }

    // Superseded and least recently used pages stand in one order, and new ones join at its two
    // ends, so where the first kind stops does not matter.
    void add_index(Digest& digest, Names& pages) const {
        std::vector<PageId> order;
        s_.index_.policy().order(order);
        digest.add(order.size());
        for (PageId page : order) digest.add(pages.of(page));
        add_retention(digest, pages);
        std::vector<PageId> named(s_.pool_.num_pages(), kNoPage);
        for (PageId page = 0; page < s_.pool_.num_pages(); ++page) {
            if (is_published(page)) named[pages.of(page)] = page;
        }
        for (PageId page : named) {
            if (page == kNoPage) continue;
            const auto& entry = s_.index_.entries_[page];
            for (uint64_t word :
                 {pages.of(page), entry.hash.low, uint64_t(entry.generated),
                  uint64_t(entry.superseded), retention_of(page), pages.of(entry.parent),
                  pages.of(entry.first_child), pages.of(entry.next_sibling)}) {
                digest.add(word);
            }
        }
    }

    const Scheduler& s_;
};

}  // namespace tokenspeed
