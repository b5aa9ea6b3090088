// SPDX-License-Identifier: MIT
// Waiting requests, in a fair order among users: start-time fair queueing (Goyal, Vin, Cheng 1996),
// counted in tokens. Knows users, arrivals and costs; requests only as pointers.
//
// Each user has a tag: the tokens that were computed for it. The user with the smallest tag is
// next, among equals the earlier arrival; within a user, order of arrival. Who comes back after a
// pause starts where the others are (`virtual_time_`), so that nobody saves up. A request of a
// lower priority comes first whatever its user's tag. Where a pacer gives keys (pacer.h), tokens
// too, they count as if its user had had them already, and within a user the smaller key is first.
//  F1  With one user, this is order of arrival.
//  F2  A request that was admitted before (retracted) comes before all others, in order of arrival,
//      unless its user has others of a lower priority: then these take their turn among all first.
//  F3  The earliest waiting request is passed at most `kMaxBypass` times; then it is next, unless
//      others are of a lower priority. With keys its user is next.
//  F4  Memory: users with live requests, and at most `kMaxParked` that have a debt.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace tokenspeed {

struct Request;

class FairQueue {
  public:
    static constexpr int kMaxBypass = 64;
    static constexpr int kMaxParked = 4096;

    // Of a waiting request, within its user.
    struct Place {
        Place(uint64_t arrival_in) : arrival(arrival_in) {}
        Place(int32_t priority_in, uint64_t key_in, uint64_t arrival_in)
            : priority(priority_in), key(key_in), arrival(arrival_in) {}
        auto operator<=>(const Place&) const = default;

        int32_t priority = 0;
        uint64_t key = 0;
        uint64_t arrival;
    };

    struct User {
        uint64_t key = 0;
        uint64_t tag = 0;
        int64_t num_live = 0;  // requests that are not over
        std::map<Place, Request*> waiting;
        uint64_t ranked_tag = 0;  // as `ranking_` has it; tags only rise
    };

    // Each live request counts once: `join` when it is submitted, `leave` when it is over.
    User& join(uint64_t key);
    void leave(User& user);

    void push(User& user, const Place& place, Request* request, bool returns);
    // By value: the place may be the key of the very entry that goes.
    void erase(User& user, Place place);     // aborted
    void admitted(User& user, Place place);  // taken out because it runs now
    void charge(User& user, int64_t num_tokens) {
        user.tag += static_cast<uint64_t>(num_tokens);
        if (user.tag > highest_tag_) highest_tag_ = user.tag;
    }
    // Whose request is next, leaving out those in `looked_at`; nullptr: nobody's. O(log users).
    User* next(std::span<User* const> looked_at);

    int64_t size() const { return static_cast<int64_t>(all_.size()); }
    int64_t num_users() const { return static_cast<int64_t>(users_.size()); }
    uint64_t virtual_time() const { return virtual_time_; }
    struct Entry {
        Request* request;
        User* user;
        int num_passed;  // admissions of others while it was the earliest
        int32_t priority;
    };
    const std::map<uint64_t, Entry>& all() const { return all_; }  // by arrival

  private:
    friend class Inspector;  // tests/cpp/explore_inspect.h
    struct Ranked {
        int32_t priority;
        uint64_t tag, head;  // with the first request's key; its arrival
        User* user;
        bool operator<(const Ranked& other) const {
            return std::tie(priority, tag, head) < std::tie(other.priority, other.tag, other.head);
        }
    };
    static Ranked ranked(User& user);
    void rank(User& user);
    void unrank(User& user);
    void move_time(uint64_t to);

    std::unordered_map<uint64_t, User> users_;        // never iterated
    std::map<uint64_t, Entry> all_;                   // by arrival
    std::map<uint64_t, User*> returning_;             // by arrival
    std::set<Ranked> ranking_;                        // users with waiting requests
    std::set<std::pair<uint64_t, uint64_t>> parked_;  // tag and key of users without requests
    uint64_t virtual_time_ = 0;                       // tag of the last user that was admitted
    uint64_t highest_tag_ = 0;
};

}  // namespace tokenspeed
