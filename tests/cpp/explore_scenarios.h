// SPDX-License-Identifier: MIT
// The bounds within which everything is explored: few requests and pages, and prompts that share
// prefixes, so that hits, retractions, evictions and reuse all happen.
#pragma once

#include <string>
#include <vector>

#include "explore_world.h"

namespace tokenspeed {

// How steps may overlap: not at all, a token read on the device, or micro-steps.
struct Mode {
    const char* name;
    int overlap_depth, num_micro_steps;
};
inline constexpr Mode kModes[] = {{"depth 0", 0, 1}, {"depth 1", 1, 1}, {"2 micro-steps", 0, 2}};

inline SchedulerOptions tight_options(int num_pages, int page_size, Mode mode) {
    return {.num_pages = num_pages,
            .page_size = page_size,
            .max_num_seqs = 2,
            .max_num_batched_tokens = mode.num_micro_steps > 1 ? 2 * mode.num_micro_steps : 3,
            .max_model_len = 16,
            .max_num_partial_prefills = 2,
            .overlap_depth = mode.overlap_depth,
            .num_micro_steps = mode.num_micro_steps,
            .max_retractions = 1};
}

inline std::string in_mode(const char* name, Mode mode) {
    return std::string(name) + ", " + mode.name;
}

// Requests that speculate. Whatever is told to them, they end as they would without.
inline void add_drafts(std::vector<Scenario>& all, Mode mode) {
    SchedulerOptions wide = tight_options(3, 2, mode);
    wide.max_num_batched_tokens = 5 * mode.num_micro_steps;
    all.push_back(
        {.name = in_mode("1x3 drafts with stops, pages of 2", mode),
         .options = wide,
         .specs = {{.prompt = {1, 2}, .max_tokens = 4, .min_tokens = 2}},
         .again = mode.overlap_depth == 0,
         .guesses = {{.num_draft = 3, .num_propose = 1}, {.stops = true, .num_draft = 2}}});
    wide.num_pages = 5;
    // Drafts meet a prompt that comes in chunks, and what was promised to it.
    all.push_back(
        {.name = in_mode("2x5 drafts and chunks, pages of 2, once", mode),
         .options = wide,
         .specs = {{.prompt = {1}, .max_tokens = 7}, {.prompt = {2, 3, 4, 5}, .max_tokens = 1}},
         .again = false,
         .guesses = {{.num_draft = 3}},
         .num_speculating = 1});
    // The first is left with pages for rejected drafts when the second one needs a page.
    wide.num_pages = 9;
    wide.page_size = 1;
    all.push_back({.name = in_mode("2x9 drafts, pages of 1, once", mode),
                   .options = wide,
                   .specs = {{.prompt = {1}, .max_tokens = 5}, {.prompt = {2}, .max_tokens = 5}},
                   .again = false,
                   .guesses = {{.num_draft = 3}},
                   .num_speculating = 1});
}

// "turns": the second request goes on where the first one ends (the device's output at position p
// is 10 + p), so that it can hit decoded pages.
inline std::vector<Scenario> quick_scenarios() {
    std::vector<Scenario> all;
    for (const Mode mode : kModes) {
        all.push_back(
            {in_mode("2x3 twins, pages of 2", mode),
             tight_options(3, 2, mode),
             {{.prompt = {1, 2, 3}, .max_tokens = 3}, {.prompt = {1, 2, 3}, .max_tokens = 2}}});
        all.push_back(
            {in_mode("2x3 chunks, pages of 2", mode),
             tight_options(3, 2, mode),
             {{.prompt = {1, 2, 3, 4}, .max_tokens = 3}, {.prompt = {1, 2, 5}, .max_tokens = 2}}});
        all.push_back(
            {in_mode("2x3 turns, pages of 1", mode),
             tight_options(3, 1, mode),
             {{.prompt = {1}, .max_tokens = 3}, {.prompt = {1, 11, 5}, .max_tokens = 1}}});
        all.push_back({in_mode("2x3 crowd, pages of 1", mode),
                       tight_options(3, 1, mode),
                       {{.prompt = {1}, .max_tokens = 3}, {.prompt = {2}, .max_tokens = 3}}});
        all.push_back({in_mode("2x3 salts, pages of 2", mode),
                       tight_options(3, 2, mode),
                       {{.prompt = {1, 2, 3}, .max_tokens = 3},
                        {.prompt = {1, 2, 3}, .max_tokens = 2, .salt = {7}}}});
        SchedulerOptions kept = tight_options(3, 1, mode);
        kept.retention_permille = 700;  // two of the pages
        all.push_back({in_mode("2x3 retention, pages of 1", mode),
                       kept,
                       {{.prompt = {1, 2}, .max_tokens = 2, .retention = {.for_us = 1}},
                        {.prompt = {1, 3, 4}, .max_tokens = 1, .retention = {.pinned = true}}},
                       /*again=*/true,
                       /*time=*/true});
        SchedulerOptions one = tight_options(3, 1, mode);
        one.max_num_seqs = 1;
        all.push_back({in_mode("3x3 users, one slot, once", mode),
                       one,
                       {{.prompt = {1}, .max_tokens = 3, .user = 1},
                        {.prompt = {2}, .max_tokens = 2, .user = 1},
                        {.prompt = {3}, .max_tokens = 2, .user = 2}},
                       /*again=*/false});
        add_drafts(all, mode);
        if (mode.num_micro_steps > 1) {
            all.push_back({in_mode("2x3 chunks in flight, pages of 2", mode),
                           tight_options(3, 2, mode),
                           {{.prompt = {1, 2, 3, 4, 5}, .max_tokens = 1},
                            {.prompt = {1, 2, 6}, .max_tokens = 3}}});
            // Both decode; the first runs out of pages while the second is in flight.
            all.push_back({in_mode("2x4 crowd, pages of 1, once", mode),
                           tight_options(4, 1, mode),
                           {{.prompt = {1}, .max_tokens = 4}, {.prompt = {2}, .max_tokens = 3}},
                           /*again=*/false});
        }
        if (mode.overlap_depth > 0) continue;
        // Only here can an older request grow into the pages that a retracted one was promised.
        SchedulerOptions six = tight_options(6, 1, mode);
        six.max_num_seqs = 3;
        six.max_num_batched_tokens = 4;
        all.push_back({in_mode("3x6 ageing, pages of 1, once", mode),
                       six,
                       {{.prompt = {1}, .max_tokens = 4},
                        {.prompt = {2, 2}, .max_tokens = 2},
                        {.prompt = {3}, .max_tokens = 3}},
                       /*again=*/false});
    }
    return all;
}

// The quick ones too: what is rare need happen in one of all only.
inline std::vector<Scenario> full_scenarios() {
    std::vector<Scenario> all = quick_scenarios();
    for (const Mode mode : kModes) {
        SchedulerOptions three = tight_options(4, 1, mode);
        three.max_num_seqs = 3;
        all.push_back({in_mode("3x4 crowd, pages of 1, three slots", mode),
                       three,
                       {{.prompt = {1}, .max_tokens = 3},
                        {.prompt = {2}, .max_tokens = 2},
                        {.prompt = {1}, .max_tokens = 2, .salt = {7}}}});
        three.page_size = 2;
        three.max_num_batched_tokens = 4;
        all.push_back({in_mode("3x4 turns, pages of 2", mode),
                       tight_options(4, 2, mode),
                       {{.prompt = {1, 2, 3}, .max_tokens = 3},
                        {.prompt = {1, 2, 4}, .max_tokens = 2},
                        {.prompt = {1, 2, 3, 13, 5}, .max_tokens = 1}}});
        all.push_back({in_mode("3x4 turns, pages of 1", mode),
                       tight_options(4, 1, mode),
                       {{.prompt = {1, 2}, .max_tokens = 3},
                        {.prompt = {1}, .max_tokens = 2},
                        {.prompt = {1, 2, 12, 5}, .max_tokens = 1}}});
        all.push_back({in_mode("3x4 chunks, pages of 2", mode),
                       tight_options(4, 2, mode),
                       {{.prompt = {1, 2, 3, 4, 5}, .max_tokens = 2},
                        {.prompt = {1, 2, 3, 4, 6}, .max_tokens = 2},
                        {.prompt = {1, 2, 3}, .max_tokens = 4}}});
        all.push_back({in_mode("3x4 salts and options, three slots", mode),
                       three,
                       {{.prompt = {1, 2, 3}, .max_tokens = 3, .min_tokens = 2},
                        {.prompt = {1, 2, 3}, .max_tokens = 2, .salt = {7}},
                        {.prompt = {1, 2}, .max_tokens = 3, .prompt_logprobs = true}}});
        if (mode.overlap_depth > 0) continue;
        SchedulerOptions wide = tight_options(4, 2, mode);
        wide.max_num_batched_tokens *= 2;
        all.push_back(
            {.name = in_mode("2x4 drafts, pages of 2", mode),
             .options = wide,
             .specs = {{.prompt = {1}, .max_tokens = 5}, {.prompt = {1, 11, 5}, .max_tokens = 2}},
             .guesses = {{.stops = true, .num_draft = 2}, {.num_draft = 3}},
             .num_speculating = 1});
    }
    constexpr Mode kThree{"3 micro-steps", 0, 3};
    SchedulerOptions three = tight_options(4, 1, kThree);
    three.max_num_seqs = 3;
    all.push_back({in_mode("3x4 crowd, pages of 1, three slots", kThree),
                   three,
                   {{.prompt = {1}, .max_tokens = 3},
                    {.prompt = {2}, .max_tokens = 2},
                    {.prompt = {3}, .max_tokens = 2}}});
    all.push_back({in_mode("2x4 chunks, pages of 2", kThree),
                   tight_options(4, 2, kThree),
                   {{.prompt = {1, 2, 3, 4, 5, 6, 7}, .max_tokens = 1},
                    {.prompt = {1, 2, 3}, .max_tokens = 3}}});
    return all;
}

}  // namespace tokenspeed
