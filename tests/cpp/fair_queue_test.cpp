// SPDX-License-Identifier: MIT
// The fair queue against a model that looks at everything, and what F1 to F4 promise.
#include "scheduler/fair_queue.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <random>
#include <vector>

#include "scheduler/check.h"

namespace tokenspeed {
namespace {

using Keys = std::vector<uint64_t>;

struct Waiter {
    uint64_t arrival, user;
    bool returns;
    int num_passed = 0;
};

// Knows no ranks: each answer is worked out from all waiters. It never forgets a tag.
struct Model {
    std::vector<Waiter> waiters;  // by arrival
    std::map<uint64_t, uint64_t> tags;
    uint64_t time = 0, highest = 0;

    bool waits(uint64_t user) const {
        return std::ranges::any_of(waiters, [&](const Waiter& w) { return w.user == user; });
    }
    void push(const Waiter& waiter) {
        if (!waiter.returns && !waits(waiter.user)) {
            tags[waiter.user] = std::max(tags[waiter.user], time);
        }
        waiters.push_back(waiter);
        std::ranges::sort(waiters, {}, &Waiter::arrival);
    }
    void erase(uint64_t arrival) {
        std::erase_if(waiters, [&](const Waiter& w) { return w.arrival == arrival; });
        if (waiters.empty()) time = highest;
    }
    void admitted(const Waiter& waiter) {
        if (!waiter.returns) time = std::max(time, tags[waiter.user]);
        erase(waiter.arrival);
        if (!waiters.empty() && waiters[0].arrival < waiter.arrival) ++waiters[0].num_passed;
    }
    void charge(uint64_t user, uint64_t tokens) {
        tags[user] += tokens;
        highest = std::max(highest, tags[user]);
    }
    // All users that wait, in the order in which they would be asked.
    Keys order() const {
        Keys users;
        const auto add = [&](uint64_t user) {
            if (std::ranges::find(users, user) == users.end()) users.push_back(user);
        };
        for (const Waiter& w : waiters) {
            if (w.returns) {
                add(w.user);
                break;
            }
        }
        if (!waiters.empty() && waiters[0].num_passed >= FairQueue::kMaxBypass) {
            add(waiters[0].user);
        }
        std::vector<Waiter> rest = waiters;  // stable: among equals the earlier arrival
        std::ranges::stable_sort(rest, {}, [&](const Waiter& w) { return tags.at(w.user); });
        for (const Waiter& w : rest) add(w.user);
        return users;
    }
};

Keys order_of(FairQueue& queue) {
    std::vector<FairQueue::User*> looked_at;
    while (FairQueue::User* user = queue.next(looked_at)) looked_at.push_back(user);
    Keys keys;
    for (const FairQueue::User* user : looked_at) keys.push_back(user->key);
    return keys;
}

class Walk {
  public:
    explicit Walk(uint32_t seed) : random_(seed), num_users_(1 + below(6)) {}

    void run() {
        for (int i = 0; i < 6'000; ++i) {
            const int choice = below(10);
            if (choice < 4 && model_.waiters.size() < 12) submit();
            if (choice == 4 && !running_.empty()) retract();
            if (choice == 5 && !running_.empty()) finish();
            if (choice == 6 && !running_.empty()) charge(running_[below(std::ssize(running_))]);
            if (choice == 7 && !model_.waiters.empty()) abort();
            if (choice > 7) admit();
            TS_CHECK(queue_.size() == std::ssize(model_.waiters));
            TS_CHECK(order_of(queue_) == model_.order());
            TS_CHECK(num_users_ > 1 || in_order_of_arrival());
        }
    }

  private:
    int below(int64_t n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
    void submit() {
        const Waiter waiter{next_arrival_++, static_cast<uint64_t>(below(num_users_)), false};
        FairQueue::User& user = queue_.join(waiter.user);
        users_[waiter.user] = &user;
        queue_.push(user, waiter.arrival, nullptr, false);
        model_.push(waiter);
    }
    void charge(const Waiter& waiter) {
        const int tokens = below(3) == 0 ? below(1000) : below(10);
        queue_.charge(*users_[waiter.user], tokens);
        model_.charge(waiter.user, tokens);
    }
    void admit() {
        const Keys order = model_.order();
        if (order.empty()) return;
        const uint64_t user = order[below(4) == 0 ? below(std::ssize(order)) : 0];
        const auto first = std::ranges::find(model_.waiters, user, &Waiter::user);
        const Waiter waiter = *first;
        TS_CHECK(users_[user]->waiting.begin()->first == waiter.arrival);
        queue_.admitted(*users_[user], waiter.arrival);
        model_.admitted(waiter);
        charge(waiter);
        running_.push_back(waiter);
    }
    void retract() {
        const auto it = running_.begin() + below(std::ssize(running_));
        Waiter waiter{it->arrival, it->user, true};
        running_.erase(it);
        queue_.push(*users_[waiter.user], waiter.arrival, nullptr, true);
        model_.push(waiter);
    }
    void finish() {
        const auto it = running_.begin() + below(std::ssize(running_));
        FairQueue::User& user = *users_[it->user];
        running_.erase(it);
        queue_.leave(user);
    }
    void abort() {
        const Waiter waiter = model_.waiters[below(std::ssize(model_.waiters))];
        model_.erase(waiter.arrival);
        queue_.erase(*users_[waiter.user], waiter.arrival);
        queue_.leave(*users_[waiter.user]);
    }
    bool in_order_of_arrival() const {  // F1
        uint64_t last = 0;
        for (const auto& [arrival, entry] : queue_.all()) {
            if (arrival < last || entry.user->waiting.begin()->first > arrival) return false;
            last = arrival;
        }
        return true;
    }

    std::mt19937_64 random_;
    int num_users_;
    FairQueue queue_;
    Model model_;
    std::map<uint64_t, FairQueue::User*> users_;
    std::vector<Waiter> running_;
    uint64_t next_arrival_ = 0;
};

struct Served {
    FairQueue queue;
    uint64_t next_arrival = 0;
    void submit(uint64_t key) { queue.push(queue.join(key), next_arrival++, nullptr, false); }
    // Admits the next request, which costs that much and ends at once; returns its user.
    uint64_t serve(int64_t cost) {
        FairQueue::User& user = *queue.next({});
        const uint64_t key = user.key;
        queue.admitted(user, user.waiting.begin()->first);
        queue.charge(user, cost);
        queue.leave(user);
        return key;
    }
};

// A user with a hundred requests does not keep one with three waiting; tokens count, not requests.
void users_share() {
    Served s;
    for (int i = 0; i < 100; ++i) s.submit(1);
    for (int i = 0; i < 3; ++i) s.submit(2);
    Keys got;
    for (int i = 0; i < 6; ++i) got.push_back(s.serve(10));
    TS_CHECK((got == Keys{1, 2, 1, 2, 1, 2}));
    for (int i = 0; i < 40; ++i) s.submit(3);
    int64_t tokens[4] = {};
    for (int i = 0; i < 40; ++i) {
        const uint64_t user = s.queue.next({})->key;
        const int64_t cost = user == 3 ? 100 : 300;
        s.serve(cost);
        tokens[user] += cost;
    }
    TS_CHECK(std::abs(tokens[1] - tokens[3]) <= 300);
}

// F3: new users come for ever, each of them ahead by its tag.
void nobody_starves() {
    Served s;
    s.submit(1);
    s.submit(1);
    s.submit(2);
    TS_CHECK(s.serve(1'000'000) == 1);
    for (int i = 0; i < FairQueue::kMaxBypass; ++i) {
        s.submit(100 + i);
        TS_CHECK(s.serve(1) != 1);
    }
    s.submit(99);
    TS_CHECK(s.serve(1) == 1);
}

// F2: whose retracted request stands behind others of its own takes its turn among all.
void a_retracted_request_helps_no_other() {
    Served s;
    FairQueue::User& one = s.queue.join(1);
    s.queue.push(one, {10, 0, s.next_arrival++}, nullptr, true);
    for (int i = 0; i < 6; ++i) s.submit(1);
    for (int i = 0; i < 3; ++i) s.submit(2);
    Keys got;
    for (int i = 0; i < 6; ++i) got.push_back(s.serve(10));
    TS_CHECK((got == Keys{1, 2, 1, 2, 1, 2}));
    for (int i = 0; i < 4; ++i) TS_CHECK(s.serve(10) == 1);
    TS_CHECK(s.queue.size() == 0);
}

// F4: users that never come back are forgotten, in a crowd that never ends too.
void memory_is_bounded() {
    Served s;
    s.submit(0);
    for (uint64_t user = 1; user < 20'000; ++user) {
        s.submit(user);
        s.serve(1000);
        TS_CHECK(s.queue.num_users() <= FairQueue::kMaxParked + 2);
    }
    while (s.queue.size() > 0) s.serve(1);
    TS_CHECK(s.queue.num_users() <= 1);
}

}  // namespace
}  // namespace tokenspeed

int main() {
    for (uint32_t seed = 0; seed < 30; ++seed) tokenspeed::Walk(seed).run();
    tokenspeed::users_share();
    tokenspeed::nobody_starves();
    tokenspeed::a_retracted_request_helps_no_other();
    tokenspeed::memory_is_bounded();
    return 0;
}
