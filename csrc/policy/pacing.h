// SPDX-License-Identifier: MIT
// Keeps every stream at or above its floor of tokens per second: how much of prompts a step may
// have, who may run beside those that run, how long others wait. Knows streams, floors and when
// tokens came; no pages, no tokens' values, and no clock but what `advance` tells.
//
// When a stream's tokens are due, and whether it is behind, is in pacing_floor.h.
//
//   P1  Each step, all streams are looked at anew: none is held to what was found when it came.
//   P2  A step that has prompts ends, as predicted and with kMargin standard deviations to spare,
//       before any token is due, and leaves time for the step in which the token can come: who
//       speculates is not in each. So while a stream is behind, prompts have nothing; but those
//       that wait get kLeastShare of the time all the same, so that they end (`num_forced`).
//   P3  One more stream runs only if nobody is behind, and a step with it is predicted to hold
//       every floor and to leave prompts their least share; the first one always runs.
//   P4  A floor that a stream cannot have even alone is none from then on, and is told once
//       (`num_unmeetable`): by prediction when it comes, later when it has been behind for a
//       second though it was alone, or though it is predicted to be behind alone too.
//   P5  A key is what is to be computed plus kAgeing times the tokens that could have been computed
//       until now, so whoever comes late enough is behind: nobody starves.
//   P6  A clock that goes back, or on by more than kLeapS at once, stood still.
//   P7  The same calls give the same answers.
//
// Time: O(streams that run) for each step and each who would run too, else O(log streams); what is
// for who looks on costs what it returns.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "policy/pacing_floor.h"
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
    static constexpr double kMargin = 2;
    static constexpr double kLeastShare = 0.05;
    static constexpr double kAgeing = 2;
    static constexpr double kUnknownWaitS = 1;
    static constexpr double kLeastRetryS = 1;
    static constexpr double kWaitMargin = 1.5;  // who comes later may go first
    static constexpr double kLeapS = 10;        // no step takes so long
    static constexpr int32_t kLeastChunk = 16;  // tokens; all chunks but the last are multiples
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
    Loss loss(uint64_t id, int32_t num_tokens, int32_t num_uncached) const override;
    void decodes(uint64_t id) override;
    void load(const StepLoad& load) override;
    int32_t chunk(uint64_t id, int32_t start, int32_t num_wanted) override;
    void planned() override;
    void committed() override;

    // Until a waiting request runs, if streams last as long as they did lately, and prompts before
    // it are computed as fast: 0 if it may run at once, kUnknownWaitS where nothing has ended yet.
    // 0 for those that run and unknown ones. O(waiting + running).
    double predicted_wait_s(uint64_t id) const;
    // Whether its wait, kWaitMargin times what is predicted, is longer than it may be: better told
    // at once than after having waited.
    bool hopeless(uint64_t id) const;
    // When it may be asked again with better luck.
    double retry_after_s(uint64_t id) const;
    // Requests that have waited for their first step longer than they may.
    std::vector<uint64_t> overdue() const;

    // Tokens per second that each of these streams must have, if prompts have their least share
    // beside them, 0 for none; and behind them the most that any other stream must have that
    // decodes. O(ids log ids + running log ids).
    std::vector<double> least_rates(std::span<const uint64_t> ids) const;

    std::vector<StreamView> streams() const;  // by id
    int64_t num_forced() const { return num_forced_; }
    int64_t num_behind() const;                     // streams, now
    int64_t num_late() const { return num_late_; }  // outputs that came after they were due
    int64_t num_unmeetable() const { return num_unmeetable_; }
    double last_unmeetable() const { return last_unmeetable_; }  // the floor; 0: there was none
    double budget_s() const { return budget_s_; }  // of the last step with prompts; may be infinite

  private:
    static constexpr double kForever = std::numeric_limits<double>::infinity();

    struct Stream {
        uint64_t id;
        FloorSchedule floor;
        double max_wait_s;
        double deadline_s;  // for its first step; infinite: none
        double admitted_s = 0;
        double behind_since_s = kForever;
        int64_t context;
        int64_t num_emitted = 0;
        int64_t last_row = -1, row_before = -1;  // the steps that it was in
        int64_t last_commit = 0;                 // the step that brought its tokens
        int32_t priority;
        int32_t num_uncached;
        uint64_t key;
        bool runs = false, decodes = false;
    };
    // What a step has.
    struct Work {
        double rows = 0, drafts = 0, proposed = 0, most_proposed = 0, context = 0;
        double prefills = 0, prefill = 0, pairs = 0;

        Work with(int32_t start, int32_t num_tokens) const;  // of a prompt
    };
    struct Flight {
        double end_s, stddev;  // as predicted
    };

    using Turn = std::tuple<int32_t, uint64_t, uint64_t>;  // priority, key, id
    using Prompts = std::map<Turn, int32_t>;               // tokens to be computed

    static Turn turn(const Stream& s) { return {s.priority, s.key, s.id}; }
    double stream_wait_s(const Stream& stream, int64_t num_before) const;
    Features features(const Work& work) const;
    double seconds(const Work& work) const { return times_->seconds(features(work)); }
    Work decoding(double rows, double context) const;
    double row_interval_s(int64_t rows, int64_t context) const;
    bool holds(int64_t rows, int64_t context, double times_per_s) const;
    bool meetable(const Stream& stream) const;
    static double least_rate(const Stream& stream);
    double times_per_s(const Stream& stream) const;
    double most_times_per_s() const;
    bool in_flight(const Stream& stream) const;
    bool in_step(const Stream& stream) const { return stream.last_row == num_planned_; }
    double next_step_s() const;
    bool fits(const Work& work) const;
    int32_t most_that_fits(int32_t start, int32_t num_wanted) const;
    bool owes(int32_t start, int32_t num_wanted) const;
    void judge();
    bool was_alone() const;
    void give_up(Stream& stream);
    void join_queue(Stream& stream);
    void leave_queue(Stream& stream);
    void stop(Stream& stream);

    const StepTimeModel* times_;
    PacingOptions options_;
    TimeUs told_us_ = 0, now_us_ = 0;  // the latter without leaps
    double now_s_ = 0;
    double aged_ = 0;  // tokens, for the keys

    std::unordered_map<uint64_t, Stream> streams_;  // never iterated where order matters
    std::vector<Stream*> running_;                  // in order of admission
    std::set<std::pair<double, uint64_t>> deadlines_;
    Prompts waiting_, prefilling_;
    int64_t running_context_ = 0, waiting_context_ = 0;

    // Means of lately: of a row, and from a row with tokens to the stream's next one.
    double tokens_per_row_ = 1, drafts_per_row_ = 0, proposed_per_row_ = 0, most_proposed_ = 0;
    double steps_per_row_ = 1;
    double prompt_tokens_ = 0,
           prompt_s_ = 0;     // computed lately, while prompts waited, and how long
    double planned_s_ = -1;   // when the last step with prompts was; -1: it had none
    double mean_life_s_ = 0;  // from admission to the end; 0: nobody has ended
    double alone_since_s_ = 0;

    Work decodes_, work_;  // of the step being planned: without prompts, with them
    bool wanted_ = false;  // prompts would have taken more or less
    double budget_s_ = 0;
    double owed_s_ = 0;           // of the least share
    std::deque<Flight> flights_;  // steps that are not over
    int64_t num_planned_ = 0;     // steps; the oldest in flight is flights_.size() before

    int64_t num_forced_ = 0, num_late_ = 0, num_unmeetable_ = 0;
    double last_unmeetable_ = 0;
};

}  // namespace tokenspeed::policy
