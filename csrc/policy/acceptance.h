// SPDX-License-Identifier: MIT
// How often drafts are what is sampled: for each request, drafter and place. Knows no tokens and no
// costs.
//
// A place's rate is that of drafts all of whose predecessors were accepted, a moving mean. A
// request's rates lean on those of all requests (beta prior), as much as would have foretold best:
// little where requests differ or change, much where all are alike. What its first places say of it
// carries over to places that it has not reached. Drafts of token drafters are kept apart by how
// long a piece of text matched, in powers of two; 0 for drafters that match nothing.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace tokenspeed::policy {

constexpr int kPlaces = 16;  // the last stands for all behind it
constexpr int kMatches = 7;  // match lengths 0, 1, 2-3, 4-7, 8-15, 16-31, 32-
// Drafts that the drafter's rate may count for in a request's.
constexpr std::array<double, 4> kShrinkages = {2, 8, 32, 128};

struct AcceptanceOptions {
    int num_drafters = 1;
    double prior = 0.5;           // a rate, before anything is known
    double request_memory = 16;   // drafts, of a place, that a request's rates remember
    double shared_memory = 1024;  // ... that the drafter's do
    double shared_shrinkage = 4;  // drafts that a place's predecessor counts for
};

// When a drafter is tried on a request although it does not look worth it.
struct Tries {
    uint32_t waited = 0, interval = 8;  // choices
    int32_t place = -1;                 // of the draft that was tried, until it is known; -1: none
    float expected = 0;                 // its rate as believed
};

class Acceptance {
  public:
    struct Counts {
        std::array<float, kPlaces> hits{}, drafts{};
        void observe(int place, bool hit, float keep);
    };
    struct Cell {
        int32_t kind;
        Counts counts;
        Tries tries;
    };

    // REQUIRES: 1 <= num_drafters <= 64; 0 < prior < 1; memories >= 1; shrinkages > 0.
    explicit Acceptance(const AcceptanceOptions& options);

    int num_drafters() const { return options_.num_drafters; }

    // `hits` leading drafts were what was sampled; `missed`: the next one was not (false: there was
    // none, or nobody knows). Of a request that expect() has not seen, or that was forgotten, the
    // drafter alone learns.
    // REQUIRES: 0 <= drafter < num_drafters; hits >= 0.
    void observe(uint64_t request_id, int drafter, int match_len, int hits, bool missed);

    // Appends the probabilities that the first 1, 2, .. `max_depth` drafts are accepted, falling,
    // and stops before one below `least`. Makes the request's cell, which lives until forget() or
    // the next call that makes one for the same request.
    Cell& expect(uint64_t request_id, int drafter, int match_len, int max_depth, double least,
                 std::vector<double>* probabilities);

    // The rate at one place; O(place). An unknown request has the drafter's.
    double rate(uint64_t request_id, int drafter, int match_len, int place) const;

    void forget(uint64_t request_id) { requests_.erase(request_id); }
    size_t num_requests() const { return requests_.size(); }

  private:
    // What all requests together say; `rates` is derived from the counts.
    struct Shared {
        Counts counts;
        std::array<double, kPlaces> rates;
        std::array<double, kShrinkages.size()> losses{};  // moving means, in nats
        size_t best = 1;                                  // of kShrinkages
    };
    using Cells = std::vector<Cell>;  // few: searched from the start

    int kind(int drafter, int match_len) const;
    void refresh(Shared* shared) const;
    static void compare(Shared* shared, const Counts& own, bool hit);
    static double own_rate(const Shared& shared, const Counts& own, int place, double before);
    static Cell& cell(Cells* cells, int kind);

    AcceptanceOptions options_;
    float keep_own_, keep_shared_;
    std::vector<Shared> shared_;  // [num_drafters * kMatches]
    std::unordered_map<uint64_t, Cells> requests_;
};

}  // namespace tokenspeed::policy
