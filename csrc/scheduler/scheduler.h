// SPDX-License-Identifier: MIT
// The scheduler: decides what the next step runs, and takes in what a step produced. Knows token
// ids, slots and pages; no tensors, no clock (`advance` tells it the time), no threads. One thread
// calls it.
//
// Order of service is order of arrival, and fair among users (fair_queue.h). Each step takes,
// within a budget of tokens, one token of every decoding request, then chunks of prompts. Nobody
// starves:
//  S1  A request is admitted only if the pages of its whole known sequence, and one page for each
//      decoding request, are there on top of what others were promised.
//  S2  When a decoding request finds no page, the latest arrival (with a pacer, whoever loses least
//      by it) is retracted: its pages go back, it waits at its old place and is recomputed. A
//      request that was retracted `max_retractions` times is admitted only with a firm promise of
//      all it can ever need.
//  S3  A request that could not finish alone on an empty machine is refused when it is submitted.
// A retracted request never has a step in flight: the planner leaves it out of plans until then.
//
// Several steps may be in flight; they commit in order. There are two ways, and not both at once:
//  overlap_depth 1: a request may be in two steps, one behind the other. What the first samples the
//  second reads on the device; the host knows it one step late.
//  num_micro_steps P, for the stages of a pipeline: up to P steps share the requests.
//  M1  A request whose next token is being computed is in no other step. Chunks of one prompt
//      may be, for they pass through the stages one behind the other; the last one samples.
//      With overlap_depth 1 this holds for rows that speculate.
//  M2  A step takes at most an equal share (1/P, rounded up) of the decoding requests and of the
//      budget of tokens, so that there is as much left for the other stages. Who was served
//      longest ago goes first.
//
// A decoding row may carry drafts, guesses at its next tokens, which the step verifies
// (`speculate`):
//  D1  They only use what is left: tokens of the budget when every decoding request has its one
//      (half of it while prompts wait), and pages that nobody was promised, less one for each
//      running request. Before anybody is retracted, pages that only rejected drafts wanted go
//      back.
//  D2  Who speculates ends with the same tokens as who does not: ids are taken one by one, up to a
//      stop id or the limit, and nothing behind them counts.
//
// A pacer (`pace`, pacer.h), if there is one, says how many tokens of prompts a step may have and
// whether one more request may run; then prompts are computed one after the other, in the order of
// those that wait (paced.cpp). Without one nothing of this is asked.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "scheduler/event_log.h"
#include "scheduler/fair_queue.h"
#include "scheduler/pacer.h"
#include "scheduler/plan.h"
#include "scheduler/prefix_index.h"
#include "scheduler/states.h"

namespace tokenspeed {

struct SchedulerOptions {
    int32_t num_pages = 0;
    int32_t page_size = 0;
    int32_t max_num_seqs = 0;
    int32_t max_num_batched_tokens = 0;
    int32_t max_model_len = 0;
    int32_t max_num_partial_prefills = 4;
    int32_t overlap_depth = 0;
    int32_t num_micro_steps = 1;
    int32_t enable_prefix_caching = 1;
    int32_t max_retractions = 3;
    int32_t record_events = 0;
    int32_t retention_permille = 500;  // of the pages may be under retention or pinned
};

inline constexpr TimeUs kMaxRetentionUs = int64_t{7} * 24 * 3600 * 1'000'000;

// How long pages should stay after their last use, if nobody else needs them.
struct Retention {
    TimeUs for_us = 0;    // what is longer than kMaxRetentionUs is the same as that
    bool pinned = false;  // evicted only when nothing else is left
};

struct NewRequest {
    uint64_t id = 0;
    std::span<const int32_t> prompt;
    int32_t max_tokens = 1;
    int32_t min_tokens = 0;
    std::span<const int32_t> stop_ids;
    std::span<const uint8_t> salt;
    bool read_cache = true;
    bool prompt_logprobs = false;
    uint64_t user = 0;    // whose share it takes from
    Retention retention;  // of its prompt and output, from its end on
    Terms terms;          // all but the priority need a pacer
};

struct Request {
    uint64_t id = 0;
    uint64_t arrival = 0;
    int32_t priority = 0;
    uint64_t key = 0;  // the pacer's; 0 without one
    int32_t num_prompt = 0;
    int32_t limit = 0;  // tokens at which it ends: prompt + max_tokens or the context
    int32_t min_tokens = 0;
    bool read_cache = true;
    bool prompt_logprobs = false;
    bool tainted = false;  // a row failed: its pages are not published any more
    std::vector<int32_t> stop_ids;
    std::vector<int32_t> tokens;  // prompt, then committed output
    std::vector<int32_t> draft;   // guesses at what follows `tokens`, for the next row that samples
    int32_t num_propose = 0;      // ids that a drafter on the device proposes after that row
    Hash128 root;                 // of the salt
    std::vector<Hash128> chain;   // of tokens' full pages, as far as anybody asked
    int32_t retractions = 0;
    int32_t num_cached = -1;  // of the prompt, when first admitted; -1 before
    Miss miss = Miss::kNone;  // why not more, said with the first report
    bool reported = false;
    FairQueue::User* user = nullptr;  // while it is live
    Retention retention;
    int32_t chunk = 0;        // of the plan being made
    Loss loss;                // ... where pages may be lacking, with a pacer
    uint64_t served = 0;      // its last row's number among all rows
    uint64_t refused_at = 0;  // the room_version at which it did not fit
    uint64_t twin = 0;        // arrival of the request that computes pages [0, twin_pages) now
    int32_t twin_pages = 0;
    State state;

    FairQueue::Place place() const { return {priority, key, arrival}; }
    int32_t known() const { return static_cast<int32_t>(tokens.size()); }
    int32_t num_outputs() const { return known() - num_prompt; }
    bool wants_prompt_logits() const { return prompt_logprobs && num_outputs() == 0; }
    bool speculates() const { return !draft.empty() || num_propose > 0; }
};

// What one commit produced; one entry per request that got tokens or ended. The receipts are of
// those requests that had no entry before.
struct Updates {
    std::vector<uint64_t> request_ids;
    std::vector<int32_t> finish, num_ids, num_cached, ids;
    std::vector<uint64_t> receipt_ids;
    std::vector<int32_t> receipt_miss;    // Miss
    std::vector<TimeUs> receipt_kept_us;  // how long the prompt's pages are meant to stay
    void clear();
};

struct Stats {
    int64_t num_running = 0, num_waiting = 0, num_pages = 0, num_free_pages = 0;
    int64_t num_cached_pages = 0, num_preemptions = 0, prefix_queries = 0, prefix_hits = 0;
    int64_t num_steps = 0, num_retained_pages = 0, num_pinned_pages = 0;
};

class Scheduler {
  public:
    // Throws std::invalid_argument for impossible options.
    Scheduler(const SchedulerOptions& options, HashKey key);
    ~Scheduler();
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;

    // Asks `pacer` from now on; it outlives this. Throws std::invalid_argument if there have been
    // requests, with several micro-steps (a request is not in each), and with a log of events (it
    // would have to tell step times too).
    void pace(Pacer* pacer);
    // Throws std::invalid_argument: empty, too long, duplicate id, can never fit, terms that need a
    // pacer, or a floor or wait that is no number >= 0. Nothing changed.
    void submit(const NewRequest& request);
    bool abort(uint64_t request_id);
    // For the request's next row that samples: ids to verify, guesses at what follows its tokens as
    // they are now, and how many further ids the device shall propose. A later call replaces it.
    // The last row of a prompt verifies nothing. False: no such live request. Throws
    // std::invalid_argument for negative ids or numbers; then nothing changed.
    bool speculate(uint64_t request_id, std::span<const int32_t> draft, int32_t num_propose);
    // The next step's Plan, valid until the next call; empty when nothing can run now.
    std::span<const int32_t> next_plan();
    // Takes the StepResult of the oldest plan in flight. Throws std::invalid_argument if it is
    // malformed or late; then nothing changed. The updates are valid until the next call.
    const Updates& commit(std::span<const int32_t> result);
    // How many of these tokens a request that comes now need not compute. Changes nothing, not even
    // which page is evicted next. O(tokens found).
    int32_t match_prefix(std::span<const int32_t> tokens, std::span<const uint8_t> salt) const;
    // Tells the time. It never goes back: an earlier one is ignored.
    void advance(TimeUs now);
    // Marks the cached pages of these tokens, in use or not; returns how many there are. A
    // retention of nothing takes the marks back from those pages on which no other branch builds.
    int retain(std::span<const int32_t> tokens, std::span<const uint8_t> salt,
               const Retention& retention);
    // Drops the cached pages of these tokens that nobody uses and on which no other branch builds;
    // returns how many.
    int release(std::span<const int32_t> tokens, std::span<const uint8_t> salt);
    bool has_work() const { return !live_.empty() || !draining_.empty(); }
    Stats stats() const;
    int flush_cache();
    const std::vector<uint8_t>& events() const { return log_.bytes(); }

    // For tests. Returns the first broken invariant, or "". O(everything).
    std::string broken_invariant() const;
    // Equal for states from which the same events lead to the same plans, up to page names.
    uint64_t state_hash() const;
    const SchedulerOptions& options() const { return options_; }
    const Request* find(uint64_t request_id) const;
    int num_in_flight() const { return static_cast<int>(in_flight_.size()); }
    int max_in_flight() const { return options_.overlap_depth + options_.num_micro_steps; }

  private:
    friend class Inspector;  // tests/cpp/explore_inspect.h reads everything, changes nothing
    struct Row {
        Request* request;
        int32_t slot, flags, start, num_tokens;  // tokens: the draft's too
        int32_t num_propose;
        std::vector<int32_t> draft;
        Lease lease;

        bool samples() const { return (flags & kRowSample) != 0; }
        int32_t end() const { return start + num_tokens; }
        int32_t num_draft() const { return static_cast<int32_t>(draft.size()); }
        bool speculates() const { return !draft.empty() || num_propose > 0; }
        bool only_decodes() const {
            return flags == kRowSample && num_tokens == 1 && num_propose == 0;
        }
    };
    struct Step {
        uint64_t number = 0;
        std::vector<Row> rows;
    };
    // The sections of the plan being made, in the layout's units.
    struct Sections {
        std::vector<int32_t> deltas, binds;
    };

    // planner.cpp
    Decoding* decodable(Request& request) const;
    int32_t take_turns();
    void plan_decodes();
    void plan_drafts();
    void plan_prefills();
    int32_t share_budget();

    // paced.cpp
    void check_terms(const Terms& terms) const;
    void queue(Request& request, const Terms& terms);
    StepLoad load() const;
    void order_by_loss();
    Request* cheapest_to_retract() const;
    int32_t num_lost(const Request& request) const;
    void pace_prefills();
    bool prompts_before(const Request& request) const;

    // admission.cpp
    Request* admit_next();
    Request* start(Request& request);
    Miss why_not_more(Request& request);
    bool reads_cache(const Request& request) const;
    template <class Chain>
    void find_pages(std::span<const int32_t> tokens, Chain chain, std::vector<PageId>& found) const;
    void match(Request& request);
    bool held_back(Request& request);
    bool admit(Request& request);
    void bind(const Request& request, const Holdings& held);

    // planner.cpp
    void add_delta(const Holdings& held, int index);
    void unsend(int32_t slot);
    void take_page(Holdings& held);
    bool take_pages(Holdings& held, int32_t num_tokens);
    int32_t pages_for_draft(Holdings& held, int32_t num_draft);
    bool reclaim_spare();
    bool prompts_wait() const;
    void plan_row(Request& request, Holdings& held, int32_t num_tokens);
    Request* retractable() const;
    void retract(Request& request);
    void write_rows();
    std::span<const int32_t> emit();

    // scheduler.cpp
    void check_result(std::span<const int32_t> result) const;
    void check_ids(const Row& row, int32_t status, std::span<const int32_t> ids) const;
    void settle(Row& row, int32_t status, std::span<const int32_t> ids);
    Finish take_ids(Request& request, std::span<const int32_t>& ids);
    void publish(Request& request, Holdings& held, const Settled& settled);
    void report(Request& request, Finish finish, std::span<const int32_t> ids);
    void end_running(Request& request, Finish finish, std::span<const int32_t> ids);
    void leave(Request& request);
    void check_idle() const;
    Hash128 chain_at(Request& request, int page);

    // retention.cpp
    std::vector<PageId> cached_run(std::span<const int32_t> tokens,
                                   std::span<const uint8_t> salt) const;
    void retain_pages(Request& request);
    TimeUs kept_us(const Request& request) const;
    TimeUs deadline_of(const Retention& retention) const;
    int max_retained() const {
        return static_cast<int>(int64_t{options_.num_pages} * options_.retention_permille / 1000);
    }

    std::span<const int32_t> page_tokens(std::span<const int32_t> tokens, int page) const {
        return tokens.subspan(page * options_.page_size, options_.page_size);
    }
    int32_t micro_share(int64_t whole) const {
        return static_cast<int32_t>((whole + options_.num_micro_steps - 1) /
                                    options_.num_micro_steps);
    }
    int32_t pages_for(int32_t num_tokens) const {
        return (num_tokens + options_.page_size - 1) / options_.page_size;
    }
    void check_pages(std::string& broken) const;
    void check_retention(std::string& broken) const;
    void check_requests(std::string& broken) const;
    uint64_t turn(const Request& request) const;
    std::vector<const Request*> all_requests() const;

    SchedulerOptions options_;
    PagePool pool_;
    PrefixIndex index_;
    FullAttention group_;
    SlotPool slots_;
    Ledger ledger_;
    EventLog log_;

    std::unordered_map<uint64_t, std::unique_ptr<Request>> live_;  // never iterated
    FairQueue waiting_;
    std::vector<Request*> running_;  // by arrival
    std::vector<std::unique_ptr<Request>> draining_;
    std::deque<Step> in_flight_;
    std::vector<Step> spare_steps_;

    uint64_t next_arrival_ = 0;
    uint64_t next_step_ = 0;
    uint64_t num_rows_ = 0;
    TimeUs now_ = 0;
    uint64_t room_version_ = 1;  // rises when a request that did not fit may fit
    Stats counters_;
    Pacer* pacer_ = nullptr;

    // Of the plan being made; kept to reuse their memory.
    Step step_;
    Sections sections_;  // outlive a plan that was none
    std::vector<int32_t> plan_;
    std::vector<PageId> hits_;
    std::vector<Request*> turns_;  // who may decode, then who prefills
    std::vector<FairQueue::User*> looked_at_;
    int32_t budget_ = 0;
    Request* left_out_ = nullptr;  // to be retracted once its step in flight committed
    Updates updates_;
};

}  // namespace tokenspeed
