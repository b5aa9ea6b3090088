// SPDX-License-Identifier: MIT
// Keeps every stream at or above its floor of tokens per second: how much of prompts a step may
// have, who may run beside those that run, how long others wait. Knows streams, floors and when
// tokens came; no pages, no tokens' values, and no clock but what `advance` tells.
//
// A stream with floor F has a time at which its next token is due. Tokens come at a rate of at
// least r = F / (1 - B) after that (F as a whole number, since tokens are), and a stream is at most
// B seconds ahead; what it has beyond that is forgotten, and so is what it is behind:
//
//      came                due                   due = clamp(due, came, came + B) + tokens / r
//   ----|---- up to B ------|--- 1 / r ---|--->
//
//   P1  A stream whose tokens come one by one and when due has at least r (1 - B) >= F tokens in
//       every window of one second from its first token on; if they come by n, up to n less.
//   P2  A step that has prompts ends, as predicted and with kMargin standard deviations to spare,
//       before any token is due; but prompts that wait get kLeastShare of the time all the same,
//       so that they end (`num_forced`).
//   P3  One more stream runs only if a step with it is predicted to hold every floor and to leave
//       prompts their least share; the first one always runs. A floor that a stream cannot have
//       even alone is none (`num_unmeetable`).
//   P4  A key is what is to be computed plus kAgeing times the tokens that could have been computed
//       until now, so whoever comes late enough is behind: nobody starves.
//   P5  The same calls give the same answers.
//
// Time: O(log streams) for each call; those for who looks on cost what they return.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "policy/step_time.h"
#include "scheduler/pacer.h"

namespace tokenspeed::policy {

struct PacingOptions {
    double tps_floor = 0;  // of the default class; 0: none
    double max_wait_s = std::numeric_limits<double>::infinity();
    int32_t max_num_seqs = 1;
    Experts experts;
};

// What one stream is promised and has, for who looks on.
struct StreamView {
    uint64_t id;
    double tps_floor;
    int64_t num_tokens;  // that came so far
    double ahead_s;      // until its next token is due; 0 without a floor or before the first token
    bool runs;
};

class Pacing : public Pacer {
  public:
    static constexpr double kBankS = 0.1;
    static constexpr double kMargin = 2;
    static constexpr double kLeastShare = 0.05;
    static constexpr double kAgeing = 2;
    static constexpr double kUnknownWaitS = 1;
    static constexpr double kLeastRetryS = 1;
    static constexpr int32_t kLeastChunk = 16;  // tokens; all chunks but a prompt's last are
                                                // multiples
    static constexpr uint64_t kKnown = 32;      // observed steps before a floor is called hopeless

    // `times` outlives this, and learns meanwhile.
    // REQUIRES: 0 <= tps_floor <= kMostFloor; max_wait_s >= 0; max_num_seqs >= 1.
    Pacing(const StepTimeModel* times, const PacingOptions& options);

    void advance(TimeUs now) override;
    uint64_t queued(uint64_t id, const Terms& terms, int32_t num_tokens,
                    int32_t num_uncached) override;
    bool admits(uint64_t id) override;
    void admitted(uint64_t id, int32_t num_uncached) override;
    void retracted(uint64_t id) override;
    void emitted(uint64_t id, int32_t num_tokens) override;
    void left(uint64_t id) override;
    void load(const StepLoad& load) override;
    int32_t chunk(uint64_t id, int32_t start, int32_t num_wanted) override;
    void planned() override;
    void committed() override;

    // Until a waiting request runs, if streams last as long as they did lately, and prompts before
    // it are computed as fast: 0 if it may run at once, kUnknownWaitS where nothing has ended yet.
    // 0 for those that run and unknown ones. O(waiting).
    double predicted_wait_s(uint64_t id) const;
    // Whether its wait is predicted to be longer than it may.
    bool hopeless(uint64_t id) const;
    // When it may be asked again with better luck.
    double retry_after_s(uint64_t id) const;
    // Requests that have waited for their first step longer than they may.
    std::vector<uint64_t> overdue() const;

    std::vector<StreamView> streams() const;  // by id
    int64_t num_forced() const { return num_forced_; }
    int64_t num_late() const { return num_late_; }  // outputs that came after they were due
    int64_t num_unmeetable() const { return num_unmeetable_; }
    double last_unmeetable() const { return last_unmeetable_; }  // the floor; 0: there was none
    double budget_s() const { return budget_s_; }  // of the last step with prompts; may be infinite

  private:
    struct Stream {
        double floor;
        double max_wait_s;
        double deadline_s;  // for its first step; infinite: none
        double admitted_s = 0;
        double due_s = 0;
        int64_t context;
        int64_t num_emitted = 0;
        int32_t priority;
        int32_t num_uncached;
        uint64_t key;
        bool runs = false, is_due = false;
    };

    using Turn = std::tuple<int32_t, uint64_t, uint64_t>;  // priority, key, id
    using Prompts = std::map<Turn, int32_t>;               // tokens to be computed

    static Turn turn(uint64_t id, const Stream& s) { return {s.priority, s.key, id}; }
    double stream_wait_s(const Stream& stream, int64_t num_before) const;
    static double rate(double floor);
    Features features(int64_t rows, double drafts, double proposed, double most_proposed,
                      int64_t prefill, int64_t context) const;
    Features step_features(int64_t prefill, int64_t prefill_context) const;
    double seconds_per_token(int64_t rows, int64_t context) const;
    bool holds(int64_t rows, int64_t context, double floor) const;
    bool meetable(const Stream& stream) const;
    double highest_floor() const { return floors_.empty() ? 0 : *floors_.rbegin(); }
    bool fits(int64_t prefill, int64_t context) const;
    int32_t most_that_fits(int32_t start, int32_t num_wanted) const;
    bool owes(int32_t start, int32_t num_wanted) const;
    void set_due(uint64_t id, Stream& stream, double due_s);
    void clear_due(uint64_t id, Stream& stream);
    void join_queue(uint64_t id, const Stream& stream);
    void leave_queue(uint64_t id, Stream& stream);
    void stop(uint64_t id, Stream& stream);

    const StepTimeModel* times_;
    PacingOptions options_;
    double now_s_ = 0;
    double aged_ = 0;  // tokens, for the keys

    std::unordered_map<uint64_t, Stream> streams_;
    std::set<std::pair<double, uint64_t>> dues_;
    std::set<std::pair<double, uint64_t>> deadlines_;
    std::multiset<double> floors_;  // of those that run
    Prompts waiting_, prefilling_;
    int64_t num_running_ = 0;
    int64_t running_context_ = 0, waiting_context_ = 0;

    double tokens_per_row_ = 1, drafts_per_row_ = 0, proposed_per_row_ = 0, most_proposed_ = 0;
    double prompt_tokens_ = 0,
           prompt_s_ = 0;     // computed lately, while prompts waited, and how long
    double planned_s_ = -1;   // when the last step with prompts was; -1: it had none
    double mean_life_s_ = 0;  // from admission to the end; 0: nobody has ended

    StepLoad load_;  // of the step being planned
    int64_t prefill_ = 0, prefill_context_ = 0;
    bool wanted_ = false;  // prompts would have taken more or less
    double budget_s_ = 0;
    double owed_s_ = 0;        // of the least share
    std::deque<double> ends_;  // of steps in flight, as predicted

    int64_t num_forced_ = 0, num_late_ = 0, num_unmeetable_ = 0;
    double last_unmeetable_ = 0;
};

}  // namespace tokenspeed::policy
