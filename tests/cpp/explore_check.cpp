// SPDX-License-Identifier: MIT
// What every state between two moves must satisfy, and what must be refused in it. Numbers I.. and
// K.. as in docs/scheduler.md. Makes no moves.
#include <algorithm>

#include "explore_world.h"

namespace tokenspeed {

void World::check_state() const {
    const std::string broken = scheduler_->broken_invariant();
    if (!broken.empty()) throw Violation(broken);
    const Inspector inspect(*scheduler_);
    int num_live = 0;
    for (int i = 0; i < static_cast<int>(clients_.size()); ++i) {
        num_live += live(i);
        demand((scheduler_->find(id_of(i)) != nullptr) == live(i), "I7: who is live is not agreed");
    }
    for (const Flight& flight : flights_) {
        for (const Row& row : flight.rows) {
            for (PageId page : row.pages) {
                demand(!inspect.is_free_or_kept(page), "K2: a page in flight has no owner");
            }
        }
    }
    for (PageId page = 0; page < scenario_.options.num_pages; ++page) {
        if (!inspect.is_published(page)) continue;
        for (int offset = 0; offset < page_size_; ++offset) {
            demand(cell(page, offset).prefix != kUnwritten, "I3: published before it was written");
            demand(!cell(page, offset).poison, "K5: what a failed row wrote is published");
        }
        const Prefix prefix = cell(page, page_size_ - 1).prefix;
        demand(trie_.length(prefix) % page_size_ == 0 &&
                   trie_.key(prefix, inspect.index(), page_size_) == inspect.hash(page),
               "I4: a published page holds other content than its key says");
    }
    const Stats stats = scheduler_->stats();
    demand(stats.num_running + stats.num_waiting == num_live, "live requests are miscounted");
    demand(scheduler_->num_in_flight() == num_in_flight(), "steps in flight are miscounted");
    demand(scheduler_->has_work() || quiet(), "I8: work is forgotten");
    if (!quiet()) return;
    demand(!scheduler_->has_work(), "I8: idle, yet there is work");
    demand(stats.num_free_pages + stats.num_cached_pages == stats.num_pages, "I8: a page is lost");
}

// I12: what is refused changes nothing.
void World::check_rejections() const {
    const uint64_t before = hash();
    const auto throws = [](auto&& act) {
        try {
            act();
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    for (int i = 0; i < static_cast<int>(clients_.size()); ++i) {
        if (live(i)) {
            demand(throws([&] { scheduler_->submit(request(i)); }), "I12: a taken id is accepted");
        } else {
            demand(!scheduler_->abort(id_of(i)), "I7: aborts a request that is not live");
        }
    }
    NewRequest huge = request(0);
    huge.id = 77;
    huge.max_tokens = scenario_.options.max_model_len;
    const std::vector<int32_t> prompt(scenario_.options.max_model_len - 1, 1);
    huge.prompt = prompt;
    const int needed = pages_for(scenario_.options.max_model_len - 1);
    if (needed > scenario_.options.num_pages) {
        demand(throws([&] { scheduler_->submit(huge); }), "what can never fit is accepted");
    }
    check_match();
    if (num_in_flight() == scheduler_->max_in_flight()) {
        demand(throws([&] { scheduler_->next_plan(); }), "I12: plans beyond the depth");
    }
    if (flights_.empty()) {
        const Flight none{.header = {static_cast<int32_t>(next_step_) - 1, 0}, .rows = {}};
        refuses(result(none, 0), "I7: a duplicate completion is accepted");
    } else {
        const std::vector<int32_t> good = result(flights_.front(), 0);
        for (size_t i = 0; i < good.size(); ++i) {
            if (i == kResultHeaderWords - 1) continue;  // a spare word
            std::vector<int32_t> bad = good;
            bad[i] = -7;
            refuses(bad, "I12: a damaged result is accepted");
        }
        refuses({good.begin(), good.end() - 1}, "I12: a short result is accepted");
        if (num_in_flight() > 1) refuses(result(flights_[1], 0), "I12: a later step is accepted");
    }
    demand(hash() == before, "I12: a refusal changed the state");
}

// `match_prefix` finds the longest run of published pages, and never the last token.
void World::check_match() const {
    const Inspector inspect(*scheduler_);
    for (int i = 0; i < static_cast<int>(clients_.size()); ++i) {
        const Spec& spec = scenario_.specs[i];
        int expected = 0;
        Prefix prefix = trie_.root(spec.salt);
        for (int at = 0; at + 1 < std::ssize(spec.prompt); ++at) {
            prefix = trie_.child(prefix, spec.prompt[at]);
            if ((at + 1) % page_size_ != 0) continue;
            if (!inspect.finds(trie_.key(prefix, inspect.index(), page_size_))) break;
            expected = at + 1;
        }
        const int32_t found = scheduler_->match_prefix(spec.prompt, spec.salt);
        demand(found == expected, "match_prefix tells a wrong length");
        coverage_.foretold += found > 0;
    }
}

void World::refuses(const std::vector<int32_t>& result, const char* what) const {
    try {
        scheduler_->commit(result);
    } catch (const std::invalid_argument&) {
        return;
    }
    throw Violation(what);
}

}  // namespace tokenspeed
