// SPDX-License-Identifier: MIT
// The random walk's state and what it counts. See scheduler_walker.cpp.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "device.h"
#include "scheduler/scheduler.h"

namespace tokenspeed {

struct Counters {
    int64_t ops = 0, plans = 0, finished = 0, stopped = 0, errors = 0, aborts = 0, refused = 0;
    int64_t preemptions = 0, hit_tokens = 0, from_device = 0, malformed = 0, drained = 0;
    int64_t num_machines = 0, firm = 0, leaked = 0;
    int64_t micro_steps = 0, chunks_in_flight = 0;  // planned beside others in flight
    int64_t retained = 0, released = 0, misses[5] = {};
    int64_t drafts = 0, accepted = 0, proposing = 0, spoken_late = 0;
    int64_t foretold = 0;  // admissions of which `match_prefix` had said what they would find
};

class Walk {
  public:
    Walk(uint64_t seed, Counters& counters)
        : random_(seed),
          options_(random_options()),
          scheduler_(options_, HashKey{seed, ~seed}),
          device_(options_.page_size, options_.overlap_depth > 0),
          count_(counters) {}

    void run(int num_ops);

  private:
    int below(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
    bool one_in(int n) { return below(n) == 0; }
    SchedulerOptions random_options();
    void step();
    void submit();
    void abort();
    void plan();
    void commit();
    void commit_malformed();
    void refuse(const NewRequest& request);
    void take_updates(const Updates& updates);
    void check();
    void drain();
    void compare_replay();
    void foretell(const NewRequest& request);
    void take_receipts(const Updates& updates);
    void retain();
    void speculate();
    Tokens guess(const Truth& truth);
    void release();
    Tokens some_tokens(uint8_t& salt);
    NewRequest random_request(Truth& truth, Tokens& stop_ids);

    std::mt19937_64 random_;
    SchedulerOptions options_;
    Scheduler scheduler_;
    Device device_;
    Counters& count_;
    std::map<uint64_t, std::unique_ptr<Truth>> truths_;  // live ones
    std::vector<std::unique_ptr<Truth>> gone_;
    std::map<uint64_t, Truth*> by_id_;
    std::vector<Tokens> plans_;
    std::map<uint64_t, Retention> asked_;  // of those whose receipt has not come
    TimeUs now_ = 0;
    uint64_t next_id_ = 1;
    int32_t foretold_ = -1;  // tokens that the request `foretold_id_` will find; -1: unknown
    uint64_t foretold_id_ = 0;
    bool speculates_ = one_in(2);
};

// Guesses at what follows, most of them right, some of them far too long.
inline Tokens Walk::guess(const Truth& truth) {
    Tokens draft;
    for (int i = below(one_in(8) ? 40 : 6); i > 0; --i) {
        const auto at = static_cast<size_t>(truth.known) + draft.size();
        const bool right = at < truth.sequence.size() && !one_in(5);
        draft.push_back(right ? truth.sequence[at] : below(13));
    }
    return draft;
}

// Drafts for anybody at any time; those for nobody, and nonsense, change nothing.
inline void Walk::speculate() {
    uint64_t id = next_id_ - std::min<uint64_t>(next_id_ - 1, random_() % 12);
    if (!truths_.empty() && !one_in(5)) {
        id = std::next(truths_.begin(), below(static_cast<int>(truths_.size())))->first;
    }
    const auto found = truths_.find(id);
    const uint64_t before = scheduler_.state_hash();
    Tokens draft = found == truths_.end() ? Tokens{1} : guess(*found->second);
    if (one_in(20)) {
        draft.push_back(-1);
        bool refused = false;
        try {
            scheduler_.speculate(id, draft, 0);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        TS_CHECK(refused && scheduler_.state_hash() == before);
        return;
    }
    const bool live = scheduler_.speculate(id, draft, one_in(3) ? below(4) : 0);
    TS_CHECK(live == (found != truths_.end()));
    TS_CHECK(live || scheduler_.state_hash() == before);
    count_.spoken_late += !live;
}

inline void print(const Counters& c, double seconds) {
    std::printf(
        "%lld operations on %lld machines, %.0f per second, all invariants after each\n"
        "plans %lld, ended by length %lld, by a stop id %lld, by a failed row %lld, aborted %lld, "
        "refused %lld, malformed results %lld\n"
        "retractions %lld, firm promises after them %lld, tokens hit %lld, tokens from the device "
        "%lld, drained %lld times, "
        "leaked pages %lld\n"
        "marks after retaining by hand %lld, pages released by hand %lld; found all %lld, diverged "
        "%lld, evicted %lld, "
        "never cached %lld, not looked %lld\n"
        "steps planned beside others in flight %lld, chunks behind chunks in flight %lld\n"
        "drafts verified %lld, accepted %lld, rows that propose %lld, drafts for nobody %lld\n",
        (long long)c.ops, (long long)c.num_machines, double(c.ops) / seconds, (long long)c.plans,
        (long long)c.finished, (long long)c.stopped, (long long)c.errors, (long long)c.aborts,
        (long long)c.refused, (long long)c.malformed, (long long)c.preemptions, (long long)c.firm,
        (long long)c.hit_tokens, (long long)c.from_device, (long long)c.drained,
        (long long)c.leaked, (long long)c.retained, (long long)c.released, (long long)c.misses[0],
        (long long)c.misses[1], (long long)c.misses[2], (long long)c.misses[3],
        (long long)c.misses[4], (long long)c.micro_steps, (long long)c.chunks_in_flight,
        (long long)c.drafts, (long long)c.accepted, (long long)c.proposing,
        (long long)c.spoken_late);
}

// A walk that meets nothing proves nothing.
inline void check_met(const Counters& c) {
    for (int64_t met : {c.finished,
                        c.stopped,
                        c.errors,
                        c.aborts,
                        c.refused,
                        c.malformed,
                        c.preemptions,
                        c.firm,
                        c.hit_tokens,
                        c.from_device,
                        c.micro_steps,
                        c.chunks_in_flight,
                        c.foretold,
                        c.retained,
                        c.released,
                        c.accepted,
                        c.drafts - c.accepted,
                        c.proposing,
                        c.spoken_late,
                        c.misses[0],
                        c.misses[1],
                        c.misses[2],
                        c.misses[3],
                        c.misses[4]}) {
        TS_CHECK(met > 0);
    }
}

}  // namespace tokenspeed
