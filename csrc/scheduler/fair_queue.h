// SPDX-License-Identifier: MIT
// Waiting requests, in a fair order among users: start-time fair queueing (Goyal, Vin, Cheng 1996),
// counted in tokens. Knows users, arrivals and costs; requests only as pointers.
//
// Each user has a tag: the tokens that were computed for it. The user with the smallest tag is
// next, among equals the earlier arrival; within a user, order of arrival. Who comes back after a
// pause starts where the others are (`virtual_time_`), so that nobody saves up.
//  F1  With one user, this is order of arrival.
//  F2  A request that was admitted before (retracted) comes before all others, in order of arrival
//      within its user.
//  F3  The earliest waiting request is passed at most `kMaxBypass` times; then it is next.
//  F4  Memory: users with live requests, and at most `kMaxParked` that have a debt.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>

namespace tokenspeed {

struct Request;

class FairQueue {
  public:
    static constexpr int kMaxBypass = 64;
    static constexpr int kMaxParked = 4096;

    struct User {
        uint64_t key = 0;
        uint64_t tag = 0;
        int64_t num_live = 0;                  // requests that are not over
        std::map<uint64_t, Request*> waiting;  // by arrival
        uint64_t ranked_tag = 0;               // as `ranking_` has it; tags only rise
    };

    // Each live request counts once: `join` when it is submitted, `leave` when it is over.
    User& join(uint64_t key);
    void leave(User& user);

    void push(User& user, uint64_t arrival, Request* request, bool returns);
    void erase(User& user, uint64_t arrival);     // aborted
    void admitted(User& user, uint64_t arrival);  // taken out because it runs now
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
    };
    const std::map<uint64_t, Entry>& all() const { return all_; }  // by arrival

  private:
    friend class Inspector;  // tests/cpp/explore_inspect.h
    struct Ranked {
        uint64_t tag, head;
        User* user;
        bool operator<(const Ranked& other) const {
            return std::pair(tag, head) < std::pair(other.tag, other.head);
        }
    };
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
