// SPDX-License-Identifier: MIT
#include "scheduler/fair_queue.h"

#include <algorithm>

#include "scheduler/check.h"

namespace tokenspeed {

FairQueue::User& FairQueue::join(uint64_t key) {
    User& user = users_[key];
    user.key = key;
    if (user.num_live++ == 0) parked_.erase({user.tag, key});
    return user;
}

void FairQueue::leave(User& user) {
    TS_CHECK(user.num_live > 0);
    if (--user.num_live > 0) return;
    TS_CHECK(user.waiting.empty());
    if (user.tag <= virtual_time_) {
        users_.erase(user.key);
        return;
    }
    parked_.emplace(user.tag, user.key);
    if (std::ssize(parked_) <= kMaxParked) return;
    users_.erase(parked_.begin()->second);
    parked_.erase(parked_.begin());
}

void FairQueue::push(User& user, const Place& place, Request* request, bool returns) {
    if (user.waiting.empty()) {
        if (!returns) user.tag = std::max(user.tag, virtual_time_);
    } else {
        unrank(user);
    }
    user.waiting.emplace(place, request);
    all_.emplace(place.arrival, Entry{request, &user, 0, place.priority});
    if (returns) returning_.emplace(place.arrival, &user);
    rank(user);
}

void FairQueue::erase(User& user, Place place) {
    if (!user.waiting.contains(place)) return;
    unrank(user);
    user.waiting.erase(place);
    all_.erase(place.arrival);
    returning_.erase(place.arrival);
    if (!user.waiting.empty()) rank(user);
    // Everybody has what they asked for: nobody owes anything.
    if (all_.empty()) move_time(highest_tag_);
}

void FairQueue::admitted(User& user, Place place) {
    const uint64_t arrival = place.arrival;
    if (!returning_.contains(arrival)) move_time(std::max(virtual_time_, user.tag));
    erase(user, place);
    if (!all_.empty() && all_.begin()->first < arrival) ++all_.begin()->second.num_passed;
}

FairQueue::User* FairQueue::next(std::span<User* const> looked_at) {
    const auto fresh = [&](User* user) {
        return std::ranges::find(looked_at, user) == looked_at.end();
    };
    if (!returning_.empty()) {
        User* const user = returning_.begin()->second;
        const bool is_first = returning_.contains(user->waiting.begin()->first.arrival);
        if (is_first && fresh(user)) return user;
    }
    if (all_.empty()) return nullptr;
    const Entry& earliest = all_.begin()->second;
    const bool passed = earliest.num_passed >= kMaxBypass && !ranking_.empty() &&
                        earliest.priority <= ranking_.begin()->priority;
    if (passed && fresh(earliest.user)) return earliest.user;
    for (auto at = ranking_.begin(); at != ranking_.end();) {
        User& user = *at->user;
        if (user.tag != user.ranked_tag) {  // it was charged since: it stands further back
            unrank(user);
            rank(user);
            at = ranking_.begin();
        } else if (fresh(&user)) {
            return &user;
        } else {
            ++at;
        }
    }
    return nullptr;
}

void FairQueue::rank(User& user) {
    user.ranked_tag = user.tag;
    ranking_.insert(ranked(user));
}

void FairQueue::unrank(User& user) { ranking_.erase(ranked(user)); }

FairQueue::Ranked FairQueue::ranked(User& user) {
    const Place& head = user.waiting.begin()->first;
    return {head.priority, user.ranked_tag + head.key, head.arrival, &user};
}

void FairQueue::move_time(uint64_t to) {
    virtual_time_ = to;
    while (!parked_.empty() && parked_.begin()->first <= to) {
        users_.erase(parked_.begin()->second);
        parked_.erase(parked_.begin());
    }
}

}  // namespace tokenspeed
