// SPDX-License-Identifier: MIT
// A scheduler, a device that only writes down what it was told to compute, and clients that know
// what they must get. Every move checks the scheduler against both. Knows plan.h's layouts.
//
// The device runs a step when it is committed, the last moment it can: what a step reads must have
// been written by committed steps when it is planned, and still be there when it runs.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "explore_inspect.h"
#include "explore_trie.h"
#include "scheduler/scheduler.h"

namespace tokenspeed {

struct Violation : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void demand(bool condition, const char* what) {
    if (!condition) throw Violation(what);
}

struct Spec {
    std::vector<int32_t> prompt;
    int32_t max_tokens = 2;
    int32_t min_tokens = 0;
    std::vector<uint8_t> salt = {};
    bool read_cache = true;
    bool prompt_logprobs = false;
    Retention retention = {};
    uint64_t user = 0;
};

inline constexpr int32_t kStopId = 9;
inline constexpr int32_t kFirstOutput = 10;  // a row that is ok samples this + its position

// What a request is told to verify next: a stop id or not, then what rows that are ok sample.
struct Guess {
    bool stops = false;
    int32_t num_draft = 0;  // the stop id counted
    int32_t num_propose = 0;
};

struct Scenario {
    std::string name;
    SchedulerOptions options;
    std::vector<Spec> specs;
    bool again = true;  // clients submit again when they are over, and the cache is flushed
    bool time = false;  // it passes while anything is retained
    std::vector<Guess> guesses = {};  // that requests of the first clients may verify
    int num_speculating = 2;          // of the clients
};

// How often the rarer things happened. An exploration that never sees one of them proves nothing of
// it, so the explorer demands them all.
struct Coverage {
    size_t hits = 0;          // resumed on cached pages
    size_t decoded_hits = 0;  // ... that hold sampled tokens
    size_t chunks = 0;        // prefill rows that do not end the prompt
    size_t retractions = 0;
    size_t firm = 0;       // admissions with a firm promise
    size_t held_back = 0;  // waiting for a twin's pages
    size_t evictions = 0;  // published pages that were taken for others
    size_t late_rows = 0;  // rows of requests that are over
    size_t id_reuse = 0;   // ids submitted again while their last life is in flight
    size_t failed_rows = 0;
    size_t micro_steps = 0;       // steps planned beside others in flight, without overlap
    size_t chunks_in_flight = 0;  // chunks planned behind a chunk in flight
    size_t foretold = 0;          // non-zero answers of match_prefix
    size_t overtaken = 0;         // admissions of a later arrival of another user
    size_t retained = 0;          // plans made while pages are marked, by time or pinned
    size_t marks_evicted = 0;     // pages that were taken although they were marked
    size_t drafts = 0;            // rows that verify drafts
    size_t cut = 0;               // ... fewer than they were told to
    size_t accepted = 0;          // ... and accept some
    size_t rejected = 0;          // ... and reject some
    size_t stop_inside = 0;       // ends before the last id that a row gave
    size_t proposing = 0;         // rows after which the device proposes
    size_t reclaimed = 0;         // pages of rejected drafts that were needed elsewhere
    size_t late_drafts = 0;       // rows with drafts of requests that are over
};

// What may happen next. A commit's `detail` has four bits for each row of the step: its outcome.
// kStop + i: the stop id is sampled at the row's place i. kShort: only the first place is finite.
// A kSpeculate's has the client, and above it the index of the guess.
struct Move {
    enum Kind : uint8_t { kSubmit, kAbort, kPlan, kCommit, kFlush, kTime, kSpeculate };
    enum Outcome : int32_t { kToken = 0, kFail = 1, kShort = 2, kStop = 3 };
    Kind kind;
    uint32_t detail;
};

class World {
  public:
    World(const Scenario& scenario, Trie& trie, Coverage& coverage);

    std::vector<Move> moves() const;
    void apply(Move move, bool check);
    uint64_t hash() const;
    int num_in_flight() const { return static_cast<int>(flights_.size()); }
    bool planned() const { return planned_; }  // whether the last kPlan gave a plan
    bool quiet() const { return !any_live() && flights_.empty(); }
    void check_state() const;       // everything that must hold between two moves
    void check_rejections() const;  // what must be refused, and change nothing
    void check_match() const;       // what a router is told of the cache
    std::string describe(Move move) const;

  private:
    // One life of a client's request: a client may submit the same request again, under the same
    // id, as soon as it is over, while steps of the life before are still in flight.
    struct Life {
        int client = 0;
        bool live = true;
        std::vector<int32_t> tokens;         // prompt, then what was reported
        std::vector<int32_t> device_tokens;  // prompt, then what the device sampled
        int slot = -1;                       // what the device was told
        int retractions = 0;                 // when it was bound
        int resumed_at = -1;                 // when it was first bound
        int next = -1;                       // position of the next row; -1: the first one says
        bool sampled = false;                // since it was bound
        bool poisoned = false;               // a row failed
        bool heard = false;                  // something was reported
        std::vector<int32_t> draft = {};     // told, for the next row that samples
        int num_propose = 0;
    };
    using LifeOf = std::shared_ptr<Life>;
    struct Row {
        LifeOf life;
        int slot, start, num_tokens;  // tokens: the draft's too
        bool sample, prefill;
        std::vector<int32_t> draft = {};
        int num_propose = 0;
        std::vector<PageId> pages = {};  // of positions [0, start + num_tokens)
        int end() const { return start + num_tokens; }
        int firm_end() const { return end() - static_cast<int>(draft.size()); }
        bool speculates() const { return !draft.empty() || num_propose > 0; }
    };
    struct Flight {
        std::vector<int32_t> header;  // step number, low and high
        std::vector<Row> rows;
    };
    struct Cell {
        Prefix prefix = kUnwritten;
        bool poison = false;
        bool sampled = false;  // not of the writer's prompt
    };

    void submit(int client);
    void abort(int client);
    void plan();
    void commit(uint32_t outcomes);
    void speculate(int client, const Guess& guess);

    void unbind_retracted();
    void unbind(Life& life);
    void unbind_if_over(Life& life);
    void take_binds(std::span<const int32_t> words);
    void demand_kind(int32_t only_decodes, std::span<const int32_t> rows);
    void take_deltas(std::span<const int32_t> words);
    void take_row(std::span<const int32_t> row, std::span<const int32_t> tokens, Flight& flight);
    void check_shape(const Row& row, int32_t flags) const;
    void check_tokens(const Row& row, std::span<const int32_t> tokens) const;
    void check_draft(const Row& row) const;
    void check_victims(const Flight& flight) const;
    void check_draft_pages(const Flight& flight) const;
    void forget_guess(const Row& row);
    void check_reads(const Row& row) const;
    void check_writes(const Row& row, const Flight& flight) const;
    void check_disjoint(const Row& row) const;
    void check_budget(const Flight& flight) const;
    int num_decoding() const;
    void count(const Flight& flight);
    void run(const Row& row, Move::Outcome outcome, const std::vector<int32_t>& ids);
    void settle(const Row& row, Move::Outcome outcome, std::vector<int32_t> ids, Updates& expected);
    Finish take(Life& life, std::vector<int32_t>& ids) const;
    std::vector<int32_t> sampled(const Row& row, Move::Outcome outcome) const;
    std::vector<Move::Outcome> outcomes_of(const Row& row) const;
    std::vector<int32_t> result(const Flight& flight, uint32_t outcomes) const;
    void refuses(const std::vector<int32_t>& result, const char* what) const;

    static uint64_t id_of(int client) { return (client + 1) * ((uint64_t{1} << 40) + 1); }
    bool live(int client) const { return clients_[client] && clients_[client]->live; }
    bool any_live() const;
    bool in_flight(const Life& life) const;
    const Spec& spec_of(const Life& life) const { return scenario_.specs[life.client]; }
    int limit(const Life& life) const;
    int pages_for(int num_tokens) const;
    NewRequest request(int client) const;
    Prefix root_of(const Life& life) const { return trie_.root(spec_of(life).salt); }
    const Cell& cell(PageId page, int position) const {
        return cells_[page * page_size_ + position % page_size_];
    }

    const Scenario& scenario_;
    Trie& trie_;
    Coverage& coverage_;
    int page_size_;
    std::unique_ptr<Scheduler> scheduler_;
    std::vector<LifeOf> clients_;              // the last life of each, live or over; or null
    std::vector<std::vector<PageId>> tables_;  // [slot][index]
    std::vector<LifeOf> owner_;                // [slot] whom the device bound, or null
    std::vector<Cell> cells_;                  // [page * page_size + offset]
    std::deque<Flight> flights_;
    uint64_t next_step_ = 0;
    TimeUs now_ = 0;
    bool planned_ = false;
    // Of the plan that is being checked, before and while it was made.
    int num_decoding_ = 0;
    bool prompts_wait_ = false;
    int num_victims_ = 0;
    bool victim_grows_ = false;            // one of them needed a page for its next token
    std::set<std::pair<int, int>> fresh_;  // slot, index of pages
    bool check_ = true;
};

}  // namespace tokenspeed
