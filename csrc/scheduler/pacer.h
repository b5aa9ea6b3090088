// SPDX-License-Identifier: MIT
// What the scheduler asks of somebody who knows how long steps take: how many tokens of prompts a
// step may have, whether one more request may run, and who is next. Knows no pages and no tokens'
// values. Without a pacer the scheduler asks nobody.
//
//   queued -> [admitted -> emitted ... -> retracted] ... -> left        one request
//   decodes ... -> load -> chunk ... -> planned -> committed            one step
#pragma once

#include <compare>
#include <cstdint>
#include <optional>

#include "scheduler/eviction.h"

namespace tokenspeed {

// What a request asks of time.
struct Terms {
    std::optional<double> tps_floor = {};    // tokens per second; unset: the default class; 0: none
    std::optional<TimeUs> max_wait_us = {};  // before its first step; unset: the default
    int32_t priority = 0;                    // lower is sooner
};

// What the step being planned has beside prompts.
struct StepLoad {
    int32_t num_decodes = 0, num_drafts = 0, num_proposed = 0, most_proposed = 0;
    int64_t num_context = 0;  // tokens of KV that these rows read
    bool must_run = false;    // nothing is in flight, and nothing else is in the step
};

// What is lost with a request that gives its pages back and comes again; less goes first.
struct Loss {
    bool floor = false;   // that it could not hold meanwhile
    int32_t urgency = 0;  // higher is sooner
    double cost = 0;      // the time until it returns x the time to compute it again
    auto operator<=>(const Loss&) const = default;
};

inline constexpr double kMostFloor = 10'000;  // tokens per second

class Pacer {
  public:
    virtual ~Pacer() = default;

    virtual void advance(TimeUs now) = 0;

    // A request of `num_tokens` waits, of which `num_uncached` are to be computed. Of two requests
    // of one priority the one with the smaller key is next; later calls give no key below all
    // earlier ones for ever (ageing).
    virtual uint64_t queued(uint64_t id, const Terms& terms, int32_t num_tokens,
                            int32_t num_uncached) = 0;
    // Whether the floors of all would hold with this one too. True while nobody runs.
    virtual bool admits(uint64_t id) = 0;
    virtual void admitted(uint64_t id, int32_t num_uncached) = 0;
    virtual void retracted(uint64_t id) = 0;
    virtual void emitted(uint64_t id, int32_t num_tokens) = 0;
    virtual void left(uint64_t id) = 0;  // over, whichever way

    // Of a request that runs, has `num_tokens`, and would compute `num_uncached` of them again.
    virtual Loss loss(uint64_t id, int32_t num_tokens, int32_t num_uncached) const = 0;

    virtual void decodes(uint64_t id) = 0;  // the step being planned has a row of it
    virtual void load(const StepLoad& load) = 0;
    // How many of a request's next `num_wanted` tokens, from `start` on, the step takes too.
    virtual int32_t chunk(uint64_t id, int32_t start, int32_t num_wanted) = 0;
    virtual void planned() = 0;    // the step runs as it was told
    virtual void committed() = 0;  // the oldest step in flight
};

}  // namespace tokenspeed
